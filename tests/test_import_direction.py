"""Imports run one way: train.py, evaluate.py -> callbacks, data -> sparsekv_pl, and downwards inside it.

A unit is a top-level script or package, or a module or package directly under sparsekv_pl. A new unit must be
placed in the table below: an unknown one fails. Imports inside functions count: they are dependencies too.
"""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = "sparsekv_pl"
SKIPPED_FOLDERS = {
    "tests",
    "output",
    "build",
    "dist",
}  # tests may import everything; the others are made, not written
FORBIDDEN_NAMES = {"utils.py", "helpers.py", "misc.py", "common.py"}

FOUNDATIONS = {
    f"{LIBRARY}.{name}"
    for name in (
        "anchors",
        "attention",
        "backbone",
        "batch",
        "cache_shape",
        "chat_date",
        "config_extent",
        "computed",
        "config_values",
        "cpu_products",
        "decoder",
        "devices",
        "fingerprint",
        "gguf_checkpoint",
        "json_file",
        "keys",
        "layer_outputs",
        "lora",
        "losses",
        "native_precision",
        "out_of_memory",
        "own_folder",
        "output_folder",
        "pace",
        "pieces",
        "placement",
        "public_addresses",
        "quantisation",
        "ranks",
        "redaction",
        "refused_callbacks",
        "run_folders",
        "run_length",
        "run_name",
        "schedules",
        "second_signal",
        "secret_shapes",
        "seeding",
        "selection",
        "shadow",
        "user_errors",
        "weight_match",
        "whole_files",
        "trainer_limits",
        "yaml_keys",
    )
}
PARTS = {
    f"{LIBRARY}.{name}"
    for name in (
        "adapter",
        "condition",
        "eviction",
        "hosted_address",
        "hosted_client",
        "hosted_reply",
        "hosted_requests",
        "hosted_thoughts",
        "measures",
        "measuring",
        "metrics",
        "monitoring",
        "objectives",
        "planner",
        "pressed_lm",
        "presses",
        "reporting",
        "results",
        "run_output",
        "saved_config",
        "sharding",
        "teacher",
    )
}
MODULES = {f"{LIBRARY}.analyses", f"{LIBRARY}.modules"}
WHOLE_LIBRARY = FOUNDATIONS | PARTS | MODULES | {LIBRARY}
COMMAND_LINE = f"{LIBRARY}.cli"  # for the scripts alone
EVERYTHING = WHOLE_LIBRARY | {COMMAND_LINE, "callbacks", "data"}

MAY_IMPORT: dict[str, set[str]] = {
    LIBRARY: set(),  # sparsekv_pl/__init__.py: importing the package imports nothing else
    **dict.fromkeys(FOUNDATIONS, FOUNDATIONS | {LIBRARY}),
    **dict.fromkeys(PARTS, FOUNDATIONS | PARTS | {LIBRARY}),
    **dict.fromkeys(MODULES, FOUNDATIONS | PARTS | {LIBRARY}),
    COMMAND_LINE: WHOLE_LIBRARY,
    "data": {f"{LIBRARY}.{name}" for name in ("batch", "chat_date", "seeding")},
    "callbacks": WHOLE_LIBRARY,
    "benchmarks": EVERYTHING,
    "configs": EVERYTHING,  # what makes the data of a local task
    "evaluate": EVERYTHING,
    "train": EVERYTHING,
}


def python_files(root: Path) -> list[Path]:
    """All .py files of the checkout at ``root``, relative to it; hidden folders (.venv) are not walked."""
    tops = [path for path in root.iterdir() if path.name not in SKIPPED_FOLDERS and path.name[0] != "."]
    files = [f for top in tops for f in (top.rglob("*.py") if top.is_dir() else [top]) if f.suffix == ".py"]
    return sorted(file.relative_to(root) for file in files)


def module_name(file: Path) -> str:
    parts = file.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def unit(module: str) -> str:
    """The unit of a dotted module name: ``sparsekv_pl.eviction.chunked`` -> ``sparsekv_pl.eviction``."""
    return ".".join(module.split(".")[: 2 if module.startswith(f"{LIBRARY}.") else 1])


def imported_modules(file: Path, source: str) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of every import in ``source``, wherever it stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = file.parts[: len(file.parts) - node.level] if node.level else ()
            base = ".".join([*package, *filter(None, [node.module])])
            for name in (alias.name for alias in node.names):
                # "from sparsekv_pl import losses" means the module; __version__ is the package's own.
                is_module = base == LIBRARY and not name.startswith("__")
                yield node.lineno, f"{base}.{name}" if is_module else base


def imports_between_units(root: Path) -> Iterator[tuple[Path, int, str, str]]:
    """(file, line, importing unit, imported unit) for each import of the project's own code."""
    own = set(MAY_IMPORT) | {unit(module_name(file)) for file in python_files(root)} | {"tests"}
    own_roots = {name.split(".")[0] for name in own}
    for file in python_files(root):
        importer = unit(module_name(file))
        for line, module in imported_modules(file, (root / file).read_text(encoding="utf-8")):
            if module.split(".")[0] in own_roots and unit(module) != importer:
                yield file, line, importer, unit(module)


def violations(root: Path) -> list[str]:
    """What breaks the rules below ``root``, one readable line each."""
    found = [f"{f}: name a file after its concept" for f in python_files(root) if f.name in FORBIDDEN_NAMES]
    found += [
        f"{file}: {unit(module_name(file))} has no place in MAY_IMPORT"
        for file in python_files(root)
        if unit(module_name(file)) not in MAY_IMPORT
    ]
    found += [
        f"{file}:{line}: {importer} may not import {imported}"
        for file, line, importer, imported in imports_between_units(root)
        if imported not in MAY_IMPORT.get(importer, set())
    ]
    return list(dict.fromkeys(found))  # a line that imports three names is one breach


def test_imports_run_one_way() -> None:
    assert violations(ROOT) == []


def test_every_unit_of_the_table_exists() -> None:
    found = {unit(module_name(file)) for file in python_files(ROOT)}
    assert set(MAY_IMPORT) - found == set(), "the table names units that have no files"


def test_units_do_not_import_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for _, _, importer, imported in imports_between_units(ROOT):
        graph.setdefault(importer, set()).add(imported)
    assert graph, "found no imports between units"
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"circle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        (
            "sparsekv_pl/losses.py",
            "import sparsekv_pl.eviction.chunked",
            "may not import sparsekv_pl.eviction",
        ),
        ("sparsekv_pl/losses.py", "from sparsekv_pl import eviction", "may not import sparsekv_pl.eviction"),
        ("sparsekv_pl/losses.py", "from . import modules", "may not import sparsekv_pl.modules"),
        ("sparsekv_pl/attention/hot.py", "from ..eviction import x", "may not import sparsekv_pl.eviction"),
        (
            "sparsekv_pl/attention/__init__.py",
            "from ..presses.a import x",
            "may not import sparsekv_pl.presses",
        ),
        (
            "sparsekv_pl/losses.py",
            "def f():\n  import data.text",
            ":2: sparsekv_pl.losses may not import data",
        ),
        ("sparsekv_pl/modules/eit.py", "from callbacks.curriculum import C, D", "may not import callbacks"),
        ("sparsekv_pl/__init__.py", "from .batch import Batch", "may not import sparsekv_pl.batch"),
        ("data/text.py", "from sparsekv_pl.losses import x", "data may not import sparsekv_pl.losses"),
        ("data/text.py", "import sparsekv_pl", "data may not import sparsekv_pl"),
        ("callbacks/a.py", "import data", "callbacks may not import data"),
        ("callbacks/a.py", "from tests.conftest import x", "callbacks may not import tests"),
        ("train.py", "import evaluate", "train may not import evaluate"),
        ("sparsekv_pl/losses.py", "from sparsekv_pl.gone import x", "may not import sparsekv_pl.gone"),
        ("sparsekv_pl/new.py", "", "sparsekv_pl.new has no place"),
        ("script.py", "", "script has no place"),
        ("data/sub/utils.py", "", "name a file after its concept"),
    ],
)
def test_a_breach_is_found(tmp_path: Path, file: str, source: str, complaint: str) -> None:
    write(tmp_path, file, source)
    found = violations(tmp_path)
    assert len(found) == 1
    assert complaint in found[0]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("train.py", "import callbacks.curriculum, data.text, torch\nfrom sparsekv_pl.modules.eit import M"),
        ("callbacks/a.py", "from sparsekv_pl.schedules import Schedule"),
        ("data/text.py", "from sparsekv_pl.batch import Batch\nimport datasets\nfrom data import retrieval"),
        ("sparsekv_pl/modules/eit.py", "from ..eviction.chunked import f\nfrom sparsekv_pl import losses"),
        ("sparsekv_pl/attention/a.py", "from .b import x\nfrom . import c"),
        ("sparsekv_pl/reporting.py", "from sparsekv_pl import __version__\nfrom . import __version__"),
        (".venv/lib/utils.py", "import data"),
        ("tests/a.py", "import data, train"),
    ],
)
def test_what_is_allowed(tmp_path: Path, file: str, source: str) -> None:
    write(tmp_path, file, source)
    assert violations(tmp_path) == []


def write(root: Path, file: str, source: str) -> None:
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).write_text(source, encoding="utf-8")
