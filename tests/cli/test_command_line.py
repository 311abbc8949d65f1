"""The command lines: help without heavy imports, one clear line for every mistake, null, overrides, moved classes."""

import re
import subprocess
import sys
from pathlib import Path
from pydoc import locate
from typing import Any

import pytest

from evaluate import EvaluateCommandLine
from sparsekv_pl.cli.command_line import CommandLine, plain, run
from sparsekv_pl.cli.moved_classes import MOVED, moved
from train import TrainCommandLine

ROOT = Path(__file__).parents[2]
QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")
HEAVY = ("kvpress", "peft", "datasets", "bitsandbytes", "transformers.models.llama.modeling_llama")

HELP = f"""
import runpy, sys
sys.argv = ["train.py", "--help"]
try:
    runpy.run_path("train.py", run_name="__main__")
except SystemExit as end:
    print("exit", end.code, [name for name in {HEAVY} if name in sys.modules])
"""


pytestmark = pytest.mark.usefixtures("elsewhere")


def train(*args: str) -> None:
    run(lambda: TrainCommandLine(args=list(args), save_config_callback=None))


def test_help_imports_nothing_that_it_does_not_need() -> None:
    command = [sys.executable, "-c", HELP]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said.splitlines()[-1] == "exit 0 []"
    assert "fit " in said
    assert "validate " in said
    assert "predict" not in said


@pytest.mark.parametrize(
    ("command_line", "command", "option"),
    [
        (TrainCommandLine, "fit", "--export.directory"),
        (TrainCommandLine, "fit", "--merge"),
        (TrainCommandLine, "fit", "--ckpt_path"),
        (TrainCommandLine, "validate", "--model"),
        (EvaluateCommandLine, "test", "--data"),
        (EvaluateCommandLine, "predict", "--trainer.precision"),
    ],
)
def test_each_command_lists_its_options(
    command_line: type[CommandLine], command: str, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        run(lambda: command_line(args=[command, "--help"]))
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert option in said
    assert "--optimizer " not in said  # the model has its own


MISTAKES: dict[str, tuple[list[str], str]] = {
    "press": (
        ["--model.eviction.press", "kvpress.NoSuchPress"],
        "model.eviction.press: Problem with given class_path 'kvpress.NoSuchPress': module 'kvpress' has no attribute",
    ),
    "press in a list": (
        ["--model.eviction.press.presses", '[{"class_path": "kvpress.NoSuchPress"}]'],
        "model.eviction.press.presses: Problem with given class_path 'kvpress.NoSuchPress'",
    ),
    "ratio": (["--model.validation_compression_ratio", "1.0"], "validation_compression_ratio is 1.0"),
    "ratio of a schedule": (
        [
            "--trainer.callbacks",
            '[{"class_path": "callbacks.curriculum.Curriculum", "init_args": {"schedule": {"class_path": '
            '"sparsekv_pl.schedules.Fixed", "init_args": {"compression_ratio": 1.0}}}}]',
        ],
        "Fixed.compression_ratio is 1.0",
    ),
    "key": (["--model.compression", "1"], "Option 'compression' is not accepted"),
    "deep key": (["--model.backbone.lora.rank", "1"], "model.backbone.lora: .*Option 'rank' is not accepted"),
    "trainer key": (["--trainer.max_stepss", "3"], "unrecognized arguments: --trainer.max_stepss 3"),
    "type": (["--model.backbone.lora.r", "many"], "model.backbone.lora.r: .*<class 'int'>. Got value: many"),
    "choice": (["--model.backbone.dtype", "int3"], r"model.backbone.dtype: .*'bfloat16'.*Got value: int3"),
    "path": (["--model.backbone.pretrained", "/no/such"], "pretrained='/no/such': there is no such folder"),
    "config": (["--config", "nofile.yaml"], "File does not exist: .*nofile.yaml"),
    "key twice": (["--trainer", "{max_steps: 3, max_steps: 4}"], "key max_steps stands twice, in lines 1 and 1"),
    "steps": (["--trainer.min_steps", "9", "--trainer.max_steps", "4"], "trainer.min_steps is 9, above .*max_steps, 4"),
    "no batches": (["--trainer.limit_train_batches", "0"], "trainer.limit_train_batches is 0, so fit would do nothing"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_in_one_line(
    mistake: str, tiny_models: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, message = MISTAKES[mistake]
    tiny = ["--model.backbone.pretrained", tiny_models["llama"]]
    with pytest.raises(SystemExit) as end:
        train("fit", "--config", QUICKSTART, *tiny, *arguments)
    printed = capsys.readouterr().err.splitlines()
    said = end.value.code if isinstance(end.value.code, str) else printed[-1]
    assert end.value.code not in (0, None)
    assert not any(line.startswith(("usage", "Traceback", " ")) for line in printed)
    assert "\n" not in said
    assert "Union" not in said
    assert len(said) < 400
    assert re.search(message, said)


def printed_config(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    import yaml

    with pytest.raises(SystemExit) as end:
        train("fit", "--config", QUICKSTART, *args, "--print_config")
    assert end.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_null_and_other_values_override_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    config = printed_config(
        capsys,
        "--model.backbone.adapter=null",
        "--model.eviction.chunk_tokens=null",
        "--model.backbone.lora=null",
        "--model.eviction.budget=128",
        "--model.backbone.revision=main",
        "--trainer.max_steps=7",
    )
    model = config["model"]["init_args"]
    assert model["backbone"]["adapter"] is None
    assert model["backbone"]["lora"] is None
    assert model["backbone"]["revision"] == "main"
    assert model["eviction"]["init_args"]["chunk_tokens"] is None
    assert model["eviction"]["init_args"]["budget"] == 128
    assert config["trainer"]["max_steps"] == 7


@pytest.mark.parametrize(("error", "shown"), [(ValueError("first\nsecond"), True), (RuntimeError("a bug"), False)])
def test_only_errors_for_users_lose_their_traceback(error: Exception, shown: bool) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(SystemExit if shown else RuntimeError) as end:
        run(fail)
    assert str(end.value) == ("error: first second" if shown else "a bug")


def test_debugging_shows_where_an_error_came_from(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ValueError("somewhere")

    monkeypatch.setenv("JSONARGPARSE_DEBUG", "true")
    with pytest.raises(ValueError, match="somewhere"):
        run(fail)


def test_a_message_without_noise_stays_as_it_is() -> None:
    assert plain("batch_size is 0: give at least 1") == "batch_size is 0: give at least 1"
    assert plain("Errors:") == "Errors:"


CONFIG = "configs/quickstart.yaml"
REAL = "sparsekv_pl.eviction.real.RealEviction"


@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_an_old_path_is_gone_and_the_new_one_is_a_class(old: str, new: str) -> None:
    assert isinstance(locate(new), type)
    assert not (ROOT / old.rpartition(".")[0].replace(".", "/")).with_suffix(".py").exists()
    said = moved(f"model.init_args: Problem with given class_path '{old}': No module named 'x' Given value: {old}")
    assert said == f"model.init_args: {old} moved in version 0.2.0: write {new}"


def test_no_config_names_an_old_path() -> None:
    texts = {path: path.read_text() for path in (ROOT / "configs").rglob("*.yaml")}
    assert len(texts) > 40
    assert [path for path, text in texts.items() if moved(text) != text] == []


@pytest.mark.parametrize(
    ("arguments", "new"),
    [
        (["--model.eviction", "sparsekv_pl.eviction.chunked.ChunkedEviction"], REAL),
        (["--model", "sparsekv_pl.modules.eit.EITModule"], "sparsekv_pl.training.eit_module.EITModule"),
        (["--config", "old.yaml"], "data.long_haystack.HaystackData"),
    ],
)
def test_the_command_line_names_the_new_path(
    arguments: list[str],
    new: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Fit(CommandLine):
        commands = ("fit",)

    (tmp_path / "old.yaml").write_text("data: {class_path: data.haystack.HaystackData}\n")
    monkeypatch.setattr("sys.argv", ["train.py", "fit", "--config", str(ROOT / CONFIG), *arguments])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        Fit()
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert f"moved in version 0.2.0: write {new}" in error
    assert len(error.strip().splitlines()) == 1


def test_other_errors_stay_as_they_are() -> None:
    line = "model.init_args.eviction: not sparsekv_pl.lora.Loras"
    assert moved(line) == line
