"""Every notebook, executed top to bottom on a tiny model by this very interpreter."""

import json
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from ipykernel.kernelspec import write_kernel_spec
from nbclient import NotebookClient
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LARGEST = 400_000  # bytes
MACHINE = re.compile(r"/(?:home|root|Users|tmp|work|mnt|opt|usr|private|var)/|[A-Z]:\\\\")
"""Beginnings of paths on somebody's own machine."""

SMALL = {"CONTEXT_TOKENS": 96, "CONTINUATION_TOKENS": 16, "DEPTHS": [0.0, 1.0]}
SIZES: dict[str, dict[str, Any]] = {
    "own_model": SMALL | {"CASES_PER_DEPTH": 1, "TEXTS": 2, "RATIOS": [0.5]},
    "quickstart": SMALL | {"STEPS": 2, "BATCH_SIZE": 2, "CASES_PER_DEPTH": 1, "TEXTS": 2, "ADAPTER": None},
    "visualization": SMALL | {"LENGTHS": [96, 128], "CASES_PER_CELL": 1, "REPORT": "output/of-no-run"},
}
RESULTS = {
    "own_model": """{
        "presses": len(presses),
        "records": len(records),
        "rows": table.row_count,
        "sizes": sizes.shape,
        "accuracy": accuracy.shape,
        "viewer": sorted({point["press"] for point in SHOWN["points"]}),
    }""",
    "quickstart": """{
        "answers": len(answers),
        "records": len(records),
        "rows": table.row_count,
        "own rows": own_table.row_count,
        "steps": len(losses),
        "adapter": Path(OUTPUT, "final", "adapter_model.safetensors").exists(),
        "gradient": gradient_norm > 0,
        "viewer": [SHOWN["sides"], sorted({point["press"] for point in SHOWN["points"]})],
    }""",
    "visualization": """{
        "sparsity": sorted({np.shape(values) for values in sparsity.values()}),
        "received": received.shape,
        "kept": {name: held.shape for name, held in kept.items()},
        "pairs": sorted({int(held.sum()) for held in kept.values()}),
        "steps": sorted({shares.shape for shares in of_text.values()}),
        "overlap": agreement.shape,
        "pictures": [picture.name for picture in pictures],
    }""",
}
PRESSES = ["ExpectedAttention", "KeyDiff", "SnapKV"]
EXPECTED: dict[str, Any] = {
    # Two facts and two texts; the full cache and three presses at one ratio.
    "own_model": {
        "presses": 3,
        "records": 16,
        "rows": 4,
        "sizes": [3, 2],
        "accuracy": [4, 2],
        "viewer": PRESSES,
    },
    # Two facts and two texts at four points, base and trained; the full cache and three presses.
    "quickstart": {
        "answers": 2,
        "records": 32,
        "rows": 4,
        "own rows": 5,
        "steps": 2,
        "adapter": True,
        "gradient": True,
        "viewer": [["base", "trained"], ["ExpectedAttention", "KeyDiff", "TOVA"]],
    },
    # Two layers of four query heads and two KV heads; half of 96 tokens; one KV head of one layer a row of `steps`.
    "visualization": {
        "sparsity": [[2, 4]],
        "received": [2, 96],
        "kept": {name: [2, 2, 96] for name in ("ExpectedAttention", "SnapKV", "KeyDiff", "StreamingLLM")},
        "pairs": [2 * 2 * 48],
        "steps": [[4, 16]],
        "overlap": [5, 5],
        "pictures": ["curves.png", "needles-expectedattention.png", "needles-snapkv.png"],
    },
}
FIGURES = {"own_model": 1, "quickstart": 1, "visualization": 7}
SHOWN = """
import json, re
from html import unescape
SHOWN = re.search(r'srcdoc="([^"]*)"', viewer._repr_html_()) if "viewer" in globals() else None
SHOWN = SHOWN and json.loads(re.search(r'id="data">(.*?)</script>', unescape(SHOWN[1]))[1])
"""
"""Reads the data of the viewer's page back from the frame."""


def test_every_notebook_is_executed_here() -> None:
    assert {path.stem for path in NOTEBOOKS} == set(EXPECTED)


@pytest.mark.parametrize(
    ("name", "folder"), [("own_model", "notebooks"), ("quickstart", "."), ("visualization", "notebooks")]
)
def test_runs_from_top_to_bottom(
    name: str, folder: str, tiny_models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One from the checkout's root, one from its own folder."""
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    output = {} if name == "own_model" else {"OUTPUT": str(tmp_path / "output")}
    override(notebook, SIZES[name] | {"PRETRAINED": tiny_models["llama"]} | output)
    notebook.cells.append(new_code_cell(f"{SHOWN}\nprint(json.dumps({RESULTS[name]}))"))
    # The kernel "python3" must be this interpreter, whatever is installed under that name.
    write_kernel_spec(tmp_path / "kernels" / "python3")
    for variable in ("JUPYTER_PATH", "IPYTHONDIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(variable, str(tmp_path))
    where = {"metadata": {"path": str(ROOT / folder)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where).execute()
    assert json.loads(notebook.cells[-1].outputs[-1].text) == EXPECTED[name]
    figures = [cell for cell in notebook.cells if "figure" in cell.metadata.get("tags", [])]
    assert len(figures) == FIGURES[name]
    assert all(has_picture(cell) for cell in figures)
    frames = [cell for cell in notebook.cells if "<iframe" in json.dumps(cell.get("outputs", []))]
    assert [cell.source.splitlines()[-1] for cell in frames] == ([] if name == "visualization" else ["viewer"])


def override(notebook: NotebookNode, settings: dict[str, Any]) -> None:
    """Override the names of the cell tagged "parameters" in a new cell after it, as papermill does."""
    (place,) = [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]
    named = set(re.findall(r"^(\w+) =", notebook.cells[place].source, re.MULTILINE))
    assert settings.keys() <= named, f"not set in the first cell: {settings.keys() - named}"
    lines = [f"{name} = {value!r}" for name, value in settings.items()]
    notebook.cells.insert(place + 1, new_code_cell("\n".join(lines)))


def has_picture(cell: NotebookNode) -> bool:
    """Whether a PNG came out of a cell."""
    return any("image/png" in output.get("data", {}) for output in cell.outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_committed_is_small_whole_and_of_no_machine(path: Path) -> None:
    assert path.stat().st_size < LARGEST
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    for cell in cells:
        for output in cell.outputs:
            output.get("data", {}).pop("image/png", None)  # letters that mean nothing
        assert not MACHINE.findall(json.dumps(cell)), cell.source
    executed = [cell.execution_count for cell in cells]
    assert executed in ([None] * len(cells), list(range(1, len(cells) + 1))), "execute it once, in order, or not at all"
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
