"""Users' errors are one line with the key or file, the value and the fix; bugs keep their traceback."""

import errno
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException

from callbacks.checkpoint_files import CheckpointError
from evaluate import EvaluateCommandLine
from sparsekv_pl.cli.command_line import run
from sparsekv_pl.cli.output_folder import check_output
from sparsekv_pl.storage.user_errors import log_failure, user_message
from tests.refusals import refusal
from train import TrainCommandLine

MODEL = "--model=lightning.pytorch.demos.boring_classes.BoringModel"


pytestmark = pytest.mark.usefixtures("elsewhere")


def said(command_line: Any, *arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    shown = refusal(command_line, *arguments, capsys=capsys)
    assert shown.startswith("error: ") and len(shown) < 900
    assert not any(text in shown for text in ("Namespace(", "object at 0x", "<unicode string>"))
    return shown


@pytest.mark.parametrize(
    ("number", "fix"),
    [
        *((errno.ENOENT, "give a path that exists"), (errno.ENOSPC, "make room"), (errno.EROFS, "can be written")),
        *((errno.EACCES, "may read and write"), (errno.ENOTDIR, "a file stands"), (errno.ENAMETOOLONG, "shorter path")),
    ],
)
def test_an_error_of_the_system_names_the_file_and_a_fix(number: int, fix: str) -> None:
    def fail() -> None:
        raise OSError(number, os.strerror(number), "/data/it")

    with pytest.raises(SystemExit, match=f"^error: /data/it: {os.strerror(number)}: .*{fix}"):
        run(fail)


@pytest.mark.parametrize(
    "error",
    [
        *(OSError("the hub has no such model"), ValueError("x"), MisconfigurationException("x"), yaml.YAMLError("x")),
        *(CheckpointError("x"), BrokenPipeError(errno.EPIPE, "Broken pipe"), ConnectionRefusedError("refused")),
    ],
    ids=lambda error: type(error).__name__,
)
def test_other_errors_for_users_are_a_line(error: Exception) -> None:
    assert user_message(error)


@pytest.mark.parametrize(
    "error",
    [*(KeyError("x"), TypeError("x"), AttributeError("x"), RuntimeError("x"), RecursionError("x"), IndexError("x"))],
    ids=lambda error: type(error).__name__,
)
def test_a_mistake_of_ours_keeps_its_traceback(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(type(error)):
        run(fail)
    for failure, traced in ((error, True), (ValueError("too long"), False)):
        caplog.clear()
        log_failure(logging.getLogger("x"), "a point", failure)
        assert bool(caplog.records[0].exc_info) is traced
        assert caplog.messages[0].startswith("a point failed, the others go on: ")


FILES = {
    "holds itself": ("trainer: &a\n  callbacks: *a\n", "trainer is more than 50 levels deep"),
    "a list holds itself": ("trainer:\n  callbacks: &a [*a]\n", "trainer is more than 50 levels deep"),
    "init_args hold it": ("model: &a\n  class_path: a.B\n  init_args: *a\n", "model is more than 50 levels deep"),
    "deep": (f"trainer: {'[' * 100_000}", "line 1 is more than 50 levels deep"),
    "a bomb": (
        "\n".join(
            [f"a0: &a0 [{', '.join('x' * 9)}]"]
            + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
        ),
        "100,000 values large",
    ),
    "no text": (b"a: \xff\xfe", "no text in UTF-8"),
    "empty": ("", "holds no settings"),
    "a word": ("word", "holds no settings"),
    "cut": ("trainer: {max_steps: 1", "line 2"),
    "a tag": ("!!python/object/apply:os.mkdir ['ran']", "could not determine a constructor"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_configuration_that_is_none_is_named(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, message = FILES[kind]
    path = tmp_path / "it.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    shown = said(TrainCommandLine, "fit", "--config", str(path), capsys=capsys)
    assert message in shown and str(path) in shown
    assert not Path("ran").exists()


def test_two_curricula_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    schedule = "{class_path: sparsekv_pl.schedules.Fixed, init_args: {compression_ratio: 0.5}}"
    one = f"{{class_path: callbacks.curriculum.Curriculum, init_args: {{schedule: {schedule}}}}}"
    shown = said(TrainCommandLine, "fit", MODEL, f"--trainer.callbacks=[{one}, {one}]", capsys=capsys)
    assert shown.startswith("error: trainer: ") and shown.endswith("trainer.callbacks is [Curriculum, Curriculum]")


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "training.json", "../checkpoints/step=1.ckpt", "../config.yaml"]
)
def test_a_report_does_not_go_where_a_training_exports(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "final"
    file = folder / name
    for parent in (folder, file.parent):
        parent.mkdir(parents=True, exist_ok=True)
    file.write_text("{}")
    with pytest.raises(ValueError, match=rf"^model\.output={folder} is where a training exports to.* give a folder"):
        check_output("model.output", folder)
    check_output("model.output", folder.parent / "evaluation")


def test_a_report_does_not_go_below_a_file(tmp_path: Path, tiny_models: dict[str, str], capsys: Any) -> None:
    (tmp_path / "file").write_text("")
    config = Path(__file__).parents[2] / "configs" / "evaluate" / "quickstart.yaml"
    options = ["--model.output=file/below", f"--model.backbone.pretrained={tiny_models['llama']}"]
    shown = said(EvaluateCommandLine, "test", "--config", str(config), *options, capsys=capsys)
    assert "\n" not in shown
    assert shown.startswith(f"error: model.output=file/below: {tmp_path}/file: ")
    assert shown.endswith("a file stands where a folder should be: give another path")
