"""Reading JSON files that may be damaged, and writing them for people to read."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_mapping(path: Path) -> dict[str, Any]:
    """Read the mapping in a JSON file. Raises ``ValueError`` with the path if it is damaged or holds no mapping."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error}): export it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no mapping of names to values: export it again")
    return content


def write_mapping(partial: Path, name: str, content: Mapping[str, Any]) -> None:
    """Write ``content`` to the file ``name`` of ``partial``, a folder of ``written_whole``, indented."""
    (partial / name).write_text(json.dumps(content, indent=2) + "\n")
