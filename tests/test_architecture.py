"""docs/architecture.md is true, names say where things are, no load runs code, no search ends a loop."""

import ast
import re
import tomllib
from collections import Counter
from pathlib import Path

from sparsekv_pl.models.backbone import Backbone

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
FILES = [path for name in ("sparsekv_pl", "data", "callbacks") for path in (ROOT / name).rglob("*.py")]
MODULES = [path for path in FILES if path.name not in ("__init__.py", "__main__.py")]


def test_every_file_that_the_page_names_exists() -> None:
    named = re.findall(r"`((?:sparsekv_pl|data|callbacks)/[\w/]*(?:\.py)?)`", PAGE)
    assert len(named) > 20
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_the_page_answers_every_question() -> None:
    rows = re.findall(r"^\| (.+?) \| .*`[\w/]+\.py`", PAGE.partition("## Where is")[2], re.MULTILINE)
    assert len(rows) == 27


def test_the_page_and_the_contract_name_every_room_in_the_same_order() -> None:
    rooms = {path.parent.name for path in (ROOT / "sparsekv_pl").glob("*/__init__.py")}
    tree = set(re.findall(r"^\| `sparsekv_pl/(\w+)/` \|", PAGE, re.MULTILINE))
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if "containers" in contract)
    assert tree == rooms == {room for layer in layers for room in layer.split(" | ")} - {"schedules"}
    assert "```\n" + "\n".join(layers) + "\n```" in PAGE


def test_no_two_files_and_no_two_classes_have_one_name() -> None:
    nodes = [node for path in FILES for node in ast.walk(ast.parse(path.read_text()))]
    classes = [node.name for node in nodes if isinstance(node, ast.ClassDef)]
    assert len(MODULES) > 200
    assert len(classes) > 200
    for names in ([path.name for path in MODULES], classes):
        assert [name for name, count in Counter(names).items() if count > 1] == []


def test_the_root_of_the_library_has_no_loose_files() -> None:
    assert {path.name for path in (ROOT / "sparsekv_pl").glob("*.py")} == {"__init__.py", "schedules.py"}


def test_a_file_is_named_after_its_concept_and_short_enough_to_read() -> None:
    assert not {path.stem for path in MODULES} & {"utils", "helpers", "misc", "common"}
    assert [path for path in MODULES if len(path.read_text().splitlines()) > 300] == []


OURS = ("sparsekv_pl", "data", "callbacks", "benchmarks", "configs")


def unsafe(source: str) -> list[str]:
    """Every call that could run code from a file."""
    found = []
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        called, given = ast.unparse(call.func), {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        wrong = {
            "torch.load": given.get("weights_only") != "True",
            "np.load": given.get("allow_pickle", "False") != "False",
        }
        if wrong.get(called, False) or given.get("trust_remote_code") == "True":
            found.append(f"{call.lineno}: {ast.unparse(call)[:80]}")
    return found


def test_nothing_loads_code() -> None:
    sources = [*(path for name in OURS for path in (ROOT / name).rglob("*.py")), *ROOT.glob("*.py")]
    assert len(sources) > 100
    assert not [(path, *lines) for path in sources if (lines := unsafe(path.read_text()))]


def test_remote_code_is_off_unless_asked_for() -> None:
    assert Backbone().trust_remote_code is False


def test_no_search_is_without_a_default() -> None:
    """A search that finds nothing must not end a loop: Lightning takes StopIteration for the end of the data."""
    assert len(FILES) > 100
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "next"
        if len(node.args) == 1 and isinstance(node.args[0], ast.GeneratorExp)
    ]
    assert not found
