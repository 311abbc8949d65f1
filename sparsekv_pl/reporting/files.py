"""Files that are either the old ones or the new ones, never half of each."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def replace(path: Path, data: bytes) -> None:
    """Write `data` to `path` in one step; a failure leaves the earlier file whole and nothing beside it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def replace_all(folder: Path, files: Mapping[str, bytes]) -> list[Path]:
    """Write rendered files (name -> content) into `folder`, which is made, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        replace(folder / name, data)
    return [folder / name for name in files]


def json_bytes(content: Any) -> bytes:
    """Indented JSON. Raises ValueError for NaN and infinities, which JSON does not know."""
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()


def csv_bytes(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """A line per row and a column per key, in the order they first appear; None is empty, a list is JSON."""
    import pandas as pd

    plain = [{k: json.dumps(v) if isinstance(v, (list, dict)) else v for k, v in row.items()} for row in rows]
    columns = list(dict.fromkeys(key for row in plain for key in row))
    # dtype object: integers with gaps would become floats.
    return pd.DataFrame(plain, columns=columns, dtype=object).to_csv(index=False, lineterminator="\n").encode()
