"""What ``from sparsekv_pl import X`` gives: complete, lazy, and known to type checkers."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from kvpress import BasePress

import sparsekv_pl
from sparsekv_pl import objectives, presses, schedules
from sparsekv_pl.eviction import Eviction
from sparsekv_pl.eviction.dropout import KVDropout
from sparsekv_pl.eviction.real import RealEviction

ROOT = Path(__file__).parents[1]


def test_every_name_is_the_class_of_that_name() -> None:
    for name in sparsekv_pl.__all__:
        assert getattr(sparsekv_pl, name).__name__ == name
    assert set(sparsekv_pl.__all__) <= set(dir(sparsekv_pl))


def test_presses_objectives_evictions_and_schedules_are_complete() -> None:
    exported = {getattr(sparsekv_pl, name) for name in sparsekv_pl.__all__}
    classes = [value for room in (presses, objectives, schedules) for value in vars(room).values()]
    kinds = {kind for kind in classes if inspect.isclass(kind) and not inspect.isabstract(kind)}
    ours = {kind for kind in kinds if kind.__module__.startswith("sparsekv_pl.")}
    wanted = {kind for kind in ours if issubclass(kind, (BasePress, objectives.Objective, schedules.Schedule))}
    assert len(wanted) > 15
    assert wanted - {schedules.WarmedUp} <= exported
    assert {RealEviction, KVDropout} <= exported
    assert Eviction not in exported, "a protocol that nobody constructs"


def test_the_type_checker_is_shown_the_same_names() -> None:
    tree = ast.parse(Path(sparsekv_pl.__file__).read_text())
    shown = [alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert sorted({*shown} - {"import_module", "TYPE_CHECKING"}) == sorted(sparsekv_pl.__all__)


def test_a_typo_is_refused_by_name_and_by_the_type_checker(tmp_path: Path) -> None:
    with pytest.raises(AttributeError, match=r"no 'AnchorPres'; it exports .*AnchorPress"):
        sparsekv_pl.AnchorPres  # noqa: B018
    script = tmp_path / "script.py"
    lines = ["from sparsekv_pl import EITModule", "from sparsekv_pl import AnchorPres", "number: int = EITModule"]
    script.write_text("\n".join(lines))
    command = [sys.executable, "-m", "mypy", str(script)]  # the project's settings, so that its cache serves
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    errors = [line for line in done.stdout.splitlines() if "error:" in line]
    assert ["script.py:2" in errors[0], 'no attribute "AnchorPres"' in errors[0]] == [True, True], done.stdout
    assert "script.py:3" in errors[1], "a class that is Any would be an int too"
    assert len(errors) == 2


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, sparsekv_pl; sys.exit(bool({'torch', 'kvpress', 'transformers'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
