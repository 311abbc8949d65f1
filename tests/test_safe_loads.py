"""Nothing in the package loads a file in a way that could run code which the file holds."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = ("sparsekv_pl", "data", "callbacks", "benchmarks", "configs")
SOURCES = sorted([*(path for name in OURS for path in (ROOT / name).rglob("*.py")), *ROOT.glob("*.py")])
RUNS_CODE = {
    *("pickle.load", "pickle.loads", "cPickle.load", "dill.load", "joblib.load", "marshal.loads", "shelve.open"),
    *("yaml.full_load", "yaml.unsafe_load", "pandas.read_pickle", "pd.read_pickle", "eval", "exec"),
}


def unsafe(source: str) -> Iterator[str]:
    """``line: what`` of every call that could run code from a file."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called, given = ast.unparse(node.func), {keyword.arg: keyword.value for keyword in node.keywords}
        said = f"{node.lineno}: {ast.unparse(node)[:80]}"
        if called in RUNS_CODE:
            yield said
        if called == "torch.load" and not _is(given.get("weights_only"), True):
            yield said
        if called in ("np.load", "numpy.load") and "allow_pickle" in given and not _is(given["allow_pickle"], False):
            yield said
        if called == "yaml.load" and "Safe" not in ast.unparse(node):
            yield said
        if _is(given.get("trust_remote_code"), True):
            yield said


def _is(node: ast.expr | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def test_the_sources_are_found() -> None:
    assert len(SOURCES) > 100
    assert {"train.py", "backbone.py", "text.py"} <= {path.name for path in SOURCES}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_loads_code(path: Path) -> None:
    assert list(unsafe(path.read_text())) == []


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=safe)",
        "np.load(path, allow_pickle=True)",
        "pickle.loads(data)",
        "yaml.load(text, Loader=yaml.Loader)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_what_would_is_recognised(line: str) -> None:
    assert len(list(unsafe(line))) == 1


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path, weights_only=True, mmap=True)",
        "np.load(path)",
        "yaml.safe_load(text)",
        "AutoModel.from_pretrained(name, trust_remote_code=self.trust_remote_code)",
        "model.eval()",
    ],
)
def test_what_would_not_is_left_alone(line: str) -> None:
    assert not list(unsafe(line))


def test_remote_code_is_off_unless_asked_for() -> None:
    from sparsekv_pl.models.backbone import Backbone

    assert Backbone().trust_remote_code is False
