"""Keys of finished work: equal exactly when everything that decides its outcome is equal."""

import hashlib
import inspect
import json
from collections.abc import Mapping
from importlib.metadata import version
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsekv_pl.storage.fingerprint import path_digest

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule


LIBRARIES = ("kvpress", "torch", "transformers")
"""What presses, kernels and models come from: another version may compute something else."""
PACKED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def key_of(**described: Any) -> str:
    """A key for a piece of work.

    >>> key_of(press="SnapKV", ratio=0.5) == key_of(ratio=0.5, press="SnapKV")
    True
    """
    return hashlib.blake2b(canonical(described).encode(), digest_size=16).hexdigest()


def canonical(value: Any) -> str:
    """JSON that is the same for equal values."""
    return json.dumps(value, sort_keys=True, allow_nan=False)


def settings_of(value: Any) -> Any:
    """``value`` as JSON can hold it, with all that its constructor takes, to any depth, and nothing else.

    Of an object those are the attributes with the names of the constructor's public arguments: what a run leaves on it
    beside them is not among them. A file or folder that is named stands for its content, however the path is spelled.

    Raises
    ------
    TypeError
        For what cannot be told from others of its kind. A setting that is passed over would be a wrong number.
    """
    if isinstance(value, str):
        path = Path(value).expanduser()
        return {"content": path_digest(path)} if "/" in value and path.exists() else value
    if isinstance(value, float):
        return str(value) if not isfinite(value) else int(value) if value.is_integer() else value
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, Mapping):
        return sorted(([settings_of(key), settings_of(item)] for key, item in value.items()), key=canonical)
    if isinstance(value, list | tuple):
        return [settings_of(item) for item in value]
    kind = type(value)
    try:
        taken = inspect.signature(kind).parameters.values()
        names = [given.name for given in taken if given.kind not in PACKED and given.name[0] != "_"]
        settings = {name: settings_of(getattr(value, name)) for name in names}
    except (ValueError, AttributeError) as error:
        raise TypeError(
            f"{kind.__qualname__} does not show what it was built with ({error}): it fits no key"
        ) from error
    return {"class": f"{kind.__module__}.{kind.__qualname__}", **settings}


def computed_by(module: "LightningModule") -> dict[str, str]:
    """What computes: a device's kind decides roundings and times, its number does not; a library's version may."""
    return {
        "precision": str(module.trainer.precision),
        "device": module.device.type,
        **{name: version(name) for name in LIBRARIES},
    }
