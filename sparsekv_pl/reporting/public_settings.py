"""Settings for publication: without this machine's folders, secrets, and private parts of addresses."""

import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsekv_pl.reporting.public_addresses import ADDRESS, public_address
from sparsekv_pl.reporting.redaction import redacted
from sparsekv_pl.storage.result_keys import class_path, settings_of

FOLDERS = re.compile(r"(?<![\w.:/~-])(?:~[\w.-]*|[A-Za-z]:)?[/\\](?:[^\s\"',;:\[\]{}=]*[/\\])?")
"""The folders of an absolute path in a text; not a part of a relative path or of an address."""
CHANGED = "compression_ratio"
"""A press's setting that the curriculum sets."""


def public_text(text: str) -> str:
    """Return ``text`` without the folders of absolute paths, without secrets, and with hosts for whole addresses.

    >>> public_text("--data.text.paths=['/home/me/a.txt','b/c.txt']")
    "--data.text.paths=['a.txt','b/c.txt']"
    """
    whole = Path(text).expanduser() if text.startswith(("/", "~/")) else None
    shown = whole.name if whole is not None else FOLDERS.sub("", text)
    return redacted(ADDRESS.sub(lambda found: public_address(found[0]), shown))


def public_settings(value: Any) -> Any:
    """Return JSON-able settings of ``value``, an object as its class and constructor's arguments, for publication.

    Of an object that does not keep its arguments, the class alone.
    """
    try:
        return _without_changed(settings_of(value, public_text, class_path))
    except TypeError:
        return {"class": class_path(type(value))}


def public_command(program: str) -> str | None:
    """Return this process's command; None if it did not start ``program`` ("train.py"), whose options are settings."""
    started, *arguments = sys.argv or [""]
    return shlex.join(["python", program, *map(public_text, arguments)]) if Path(started).name == program else None


def in_words(settings: Any) -> str:
    """Return settings in one line: {"class": "a.B", "c": [1.5, None]} -> "B(c=[1.5, none])".

    Also of a configuration, {"class_path": "a.B", "init_args": {...}}.
    """
    if isinstance(settings, Mapping):
        if "class_path" in settings:
            settings = {"class": settings["class_path"], **settings.get("init_args", {})}
        inside = ", ".join(f"{key}={in_words(value)}" for key, value in settings.items() if key != "class")
        name = str(settings.get("class", "")).rpartition(".")[2]
        return f"{name}({inside})" if inside or not name else name
    if isinstance(settings, list | tuple):
        return f"[{', '.join(map(in_words, settings))}]"
    return "none" if settings is None else str(settings).lower() if isinstance(settings, bool) else str(settings)


def _without_changed(settings: Any) -> Any:
    if isinstance(settings, Mapping):
        return {key: _without_changed(value) for key, value in settings.items() if key != CHANGED}
    return [_without_changed(value) for value in settings] if isinstance(settings, list) else settings
