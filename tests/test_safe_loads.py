"""Nothing loads a file in a way that could run code it holds: the cases that ruff's S rules do not know."""

import ast
from pathlib import Path

from sparsekv_pl.models.backbone import Backbone

ROOT = Path(__file__).parents[1]
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


def test_what_would_is_recognised() -> None:
    for line in (
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=safe)",
        "np.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ):
        assert len(unsafe(line)) == 1, line
    for line in (
        "torch.load(path, weights_only=True, mmap=True)",
        "np.load(path)",
        "AutoModel.from_pretrained(name, trust_remote_code=self.trust_remote_code)",
    ):
        assert not unsafe(line), line


def test_remote_code_is_off_unless_asked_for() -> None:
    assert Backbone().trust_remote_code is False
