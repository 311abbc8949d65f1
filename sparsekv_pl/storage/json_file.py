"""Reading JSON files that may be damaged."""

import json
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
