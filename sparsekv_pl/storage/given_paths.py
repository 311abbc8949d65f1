"""Paths that a user gave: a text that may name a file, and may as well be no path at all."""

from pathlib import Path


def existing(text: str | Path, *, home: bool = True) -> Path | None:
    """Return the path of the file or folder that ``text`` names; None if there is none.

    A text that no path can be (too long, the home of an unknown user, in a folder that may not be read) names none.
    With ``home``, a "~" at the beginning is expanded.
    """
    try:
        path = Path(text).expanduser() if home else Path(text)
        return path if path.exists() else None
    except (OSError, RuntimeError):  # the second: "~someone" without such a user
        return None


def named_by(setting: str, *, home: bool = True) -> Path | None:
    """Return ``existing`` of a setting's text that may be no path; a delimiter ("", ".", "/") names none."""
    return existing(setting, home=home) if any(map(str.isalnum, setting)) else None
