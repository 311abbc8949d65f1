"""A search that finds nothing must not end a loop: Lightning takes StopIteration for the end of the data."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_no_search_is_without_a_default() -> None:
    files = [path for folder in ("sparsekv_pl", "callbacks", "data") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "next"
        if len(node.args) == 1 and isinstance(node.args[0], ast.GeneratorExp)
    ]
    assert not found
