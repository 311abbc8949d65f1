"""JSON and CSV content of a report, and writing its files."""

import csv
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from sparsekv_pl.storage.whole_files import replace

FORMULA = re.compile(r"[=+\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")
"""Beginning of a cell that a spreadsheet may execute as a formula, full-width signs and line ends included."""


def replace_all(folder: Path, files: Mapping[str, bytes]) -> list[Path]:
    """Write rendered files (name -> content) into `folder`, each in one step, and return their paths.

    The folder is made if missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        replace(folder / name, data)
    return [folder / name for name in files]


def json_bytes(content: Any) -> bytes:
    """Indented JSON. Raises ValueError for NaN and infinities, which JSON does not have."""
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()


def csv_bytes(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """CSV with a line per row and a column per key, in order of first appearance; None is empty, a list is JSON.

    Text that a spreadsheet would execute is prefixed with an apostrophe, as OWASP advises:
    https://owasp.org/www-community/attacks/CSV_Injection
    """
    plain = [{_cell(name): _cell(value) for name, value in row.items()} for row in rows]
    columns = list(dict.fromkeys(key for row in plain for key in row))
    table = pd.DataFrame(plain, columns=columns, dtype=object)  # else integers with gaps would become floats
    # Quoted, because a bare carriage return ends a line for spreadsheets and not for pandas.
    return table.to_csv(index=False, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC).encode()


def _cell(value: Any) -> Any:
    if isinstance(value, (list, dict)):
        return json.dumps(value)
    return f"'{value}" if isinstance(value, str) and FORMULA.match(value) else value
