"""Class paths of version 0.1.0: one line that names the new one, for every path of the table."""

from pathlib import Path
from pydoc import locate

import pytest

from sparsekv_pl.cli.command_line import CommandLine
from sparsekv_pl.cli.moved_classes import MOVED, moved

ROOT = Path(__file__).parents[2]
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
