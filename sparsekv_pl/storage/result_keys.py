"""Keys of finished work: equal if and only if everything that decides its outcome is equal."""

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from importlib.metadata import version
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsekv_pl.storage.fingerprint import path_digest

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule


LIBRARIES = ("kvpress", "torch", "transformers")
"""Packages of presses, kernels and models: another version may give other results."""
PACKED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def key_of(**described: Any) -> str:
    """A key for the piece of work with these JSON-able settings.

    >>> key_of(press="SnapKV", ratio=0.5) == key_of(ratio=0.5, press="SnapKV")
    True
    """
    return hashlib.blake2b(canonical(described).encode(), digest_size=16).hexdigest()


def canonical(value: Any) -> str:
    """JSON that is equal for equal values."""
    return json.dumps(value, sort_keys=True, allow_nan=False)


def by_content(text: str) -> Any:
    """Return the digest of the content of the file or folder whose path ``text`` is; other text as it is."""
    path = Path(text).expanduser()
    return {"content": path_digest(path)} if "/" in text and path.exists() else text


def settings_of(value: Any, text: Callable[[str], Any] = by_content) -> Any:
    """Convert ``value`` to JSON-able settings, recursively.

    An object becomes its class and the attributes named like its constructor's public arguments; other attributes,
    which a run may have changed, are left out. Texts become what ``text`` returns. Raises ``TypeError`` for an object
    without such attributes: leaving a setting out would reuse wrong results.
    """
    if isinstance(value, str):
        return text(value)
    if isinstance(value, float):
        return str(value) if not isfinite(value) else int(value) if value.is_integer() else value
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, Mapping):
        return sorted(([settings_of(key, text), settings_of(item, text)] for key, item in value.items()), key=canonical)
    if isinstance(value, list | tuple):
        return [settings_of(item, text) for item in value]
    kind = type(value)
    try:
        taken = inspect.signature(kind).parameters.values()
        names = [given.name for given in taken if given.kind not in PACKED and given.name[0] != "_"]
        settings = {name: settings_of(getattr(value, name), text) for name in names}
    except (ValueError, AttributeError) as error:
        raise TypeError(
            f"{kind.__qualname__} does not store its constructor's arguments ({error}): no key can be made"
        ) from error
    return {"class": f"{kind.__module__}.{kind.__qualname__}", **settings}


def computed_by(module: "LightningModule") -> dict[str, str]:
    """What may affect rounding and times: precision, the device's type (not its number) and package versions."""
    return {
        "precision": str(module.trainer.precision),
        "device": module.device.type,
        **{name: version(name) for name in LIBRARIES},
    }
