"""The one line with which a command ends that refuses its settings."""

from typing import Any

import pytest

from sparsekv_pl.cli.command_line import run


def refusal(line: Any, *arguments: str, capsys: pytest.CaptureFixture[str] | None = None) -> str:
    """What ``run`` ends with; the parser's own errors are printed, and read from ``capsys``."""
    with pytest.raises(SystemExit) as end:
        run(lambda: line(args=list(arguments), save_config_callback=None))
    if isinstance(end.value.code, str):
        shown = end.value.code
    else:
        assert capsys is not None
        shown = capsys.readouterr().err.strip().splitlines()[-1]
    assert "\n" not in shown
    return shown
