"""Finished work is reused while the code that decides it is the same, and no longer."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kvpress import KnormPress

import sparsekv_pl
from sparsekv_pl.analysis.anchor_attention import AnchorAnalysis
from sparsekv_pl.evaluation.evaluation_module import EvaluationModule
from sparsekv_pl.models.anchors import Anchors
from sparsekv_pl.reporting.public_settings import public_settings
from sparsekv_pl.storage import source_digests
from sparsekv_pl.storage.result_keys import settings_of
from sparsekv_pl.storage.source_digests import APART, NOT_MEASURING, measuring_digest, own_digest

PRESS = """
from dataclasses import dataclass
from kvpress import ScorerPress

@dataclass
class MyPress(ScorerPress):
    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        return values.norm(dim=-1)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that modules are imported from; they are forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = {*sys.modules}
    yield tmp_path
    for name in {*sys.modules} - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def described(module: str, kind: str = "MyPress") -> str:
    """The settings of a press in the key, after an import by a new process."""
    for name in [name for name in sys.modules if name.partition(".")[0] == module.partition(".")[0]]:
        del sys.modules[name]
    importlib.invalidate_caches()
    return json.dumps(settings_of(getattr(importlib.import_module(module), kind)()))


def test_a_press_of_ones_own_is_another_once_its_code_changed(folder: Path) -> None:
    file = folder / "own_press.py"
    file.write_text(PRESS)
    first = described("own_press")
    assert described("own_press") == first
    file.write_text(PRESS.replace("return values", "return -values"))
    changed = described("own_press")
    assert changed != first
    file.write_text(PRESS)
    assert described("own_press") == first


def test_code_that_changes_after_the_import_is_not_what_ran(folder: Path) -> None:
    file = folder / "own_press.py"
    file.write_text(PRESS)
    first = described("own_press")
    press: Any = sys.modules["own_press"].MyPress()
    file.write_text(PRESS.replace("return values", "return -values"))
    assert json.dumps(settings_of(press)) == first


@pytest.mark.parametrize(
    "line",
    [
        "from own_presses.scale import factor",
        "from .scale import factor",
        "from . import scale",
        "import own_presses.scale",
        "def late():\n    from own_presses import scale",
    ],
)
def test_what_a_press_imports_of_ones_own_counts_and_its_neighbours_do_not(folder: Path, line: str) -> None:
    package = folder / "own_presses"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "press.py").write_text(f"{line}\n{PRESS}")
    (package / "scale.py").write_text("from own_presses.depth import twice\nfactor = 2")
    (package / "depth.py").write_text("import own_presses.press\ntwice = 2")
    first = described("own_presses.press")
    (package / "another.py").write_text("factor = 3")
    assert described("own_presses.press") == first
    (package / "depth.py").write_text("import own_presses.press\ntwice = 4")
    assert described("own_presses.press") != first


def test_a_base_class_of_ones_own_counts(folder: Path) -> None:
    (folder / "own_base.py").write_text(PRESS)
    (folder / "own_press.py").write_text("import own_base\nclass Child(own_base.MyPress):\n    pass\n")
    first = described("own_press", "Child")
    (folder / "own_base.py").write_text(PRESS.replace("return values", "return -values"))
    del sys.modules["own_base"]
    assert described("own_press", "Child") != first


def test_a_class_in_no_file_is_never_taken_for_one_of_another_session() -> None:
    scope: dict[str, Any] = {"__name__": "__main__"}
    kinds = []
    for _ in range(2):
        exec(PRESS, scope)
        scope["MyPress"].__module__ = "a_notebook"
        kinds.append(scope["MyPress"])
    assert own_digest(kinds[0]) == own_digest(kinds[0]) != own_digest(kinds[1])


def test_a_reports_settings_show_no_digest(folder: Path) -> None:
    (folder / "own_press.py").write_text(PRESS)
    assert "source" in described("own_press")
    assert public_settings(sys.modules["own_press"].MyPress()) == {"class": "own_press.MyPress"}


@pytest.mark.parametrize("value", [KnormPress(), Anchors()])
def test_a_class_of_kvpress_or_the_library_has_no_digest_of_its_own(value: Any) -> None:
    assert own_digest(type(value)) is None


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the library's rooms with one file each, in place of the library."""
    root = Path(sparsekv_pl.__file__).parent
    for room in (path.name for path in root.iterdir() if (path / "__init__.py").exists()):
        (tmp_path / room).mkdir()
        (tmp_path / room / "one.py").write_text("x = 1")
    monkeypatch.setattr(source_digests, "__file__", str(tmp_path / "storage" / "source_digests.py"))
    return tmp_path


def test_the_librarys_own_code_counts_where_it_decides_records(library: Path) -> None:
    measure: Any = measuring_digest.__wrapped__
    rooms = {path.name for path in library.iterdir()}
    assert rooms > NOT_MEASURING | APART
    for kind, counted in ((EvaluationModule, rooms - NOT_MEASURING - APART), (AnchorAnalysis, {"analysis"})):
        for room in rooms:
            first = measure(kind)
            (library / room / "one.py").write_text("x = 23")
            decides = measure(kind) != first
            (library / room / "one.py").write_text("x = 1")
            if room in counted:
                assert decides, room
            elif kind is EvaluationModule:
                assert not decides, room


def test_an_editors_leftovers_and_compiled_code_do_not_count(library: Path) -> None:
    measure: Any = measuring_digest.__wrapped__
    first = measure(EvaluationModule)
    (library / "presses" / "__pycache__").mkdir()
    (library / "presses" / "__pycache__" / "one.cpython-311.pyc").write_bytes(b"x")
    (library / "presses" / "one.py~").write_text("x")
    assert measure(EvaluationModule) == first
