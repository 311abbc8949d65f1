"""JSON files that may be damaged."""

import json
from pathlib import Path
from typing import Any


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file. Raises ``ValueError`` that names a file which is damaged or holds something else."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error}): export it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no mapping of names to values: export it again")
    return content
