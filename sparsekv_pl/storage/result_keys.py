"""Keys of finished work: equal if and only if everything that decides its outcome is equal."""

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from math import isfinite
from typing import TYPE_CHECKING, Any

from sparsekv_pl.storage.fingerprint import path_digest
from sparsekv_pl.storage.given_paths import named_by
from sparsekv_pl.storage.source_digests import LIBRARIES, LIBRARY, measuring_digest, own_digest

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule


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
    path = named_by(text) if "/" in text else None
    return text if path is None else {"content": path_digest(path)}


def class_path(kind: type) -> str:
    """Return the class's module and name."""
    return f"{kind.__module__}.{kind.__qualname__}"


def by_source(kind: type) -> str:
    """Return the path of a class, with the digest of its source if it is a user's own."""
    digest = own_digest(kind)
    return class_path(kind) if digest is None else f"{class_path(kind)}, source {digest}"


def settings_of(
    value: Any, text: Callable[[str], Any] = by_content, described: Callable[[type], str] = by_source
) -> Any:
    """Convert ``value`` to JSON-able settings, recursively.

    An object becomes its class, as ``described``, and the attributes named like its constructor's public arguments;
    other attributes, which a run may have changed, are left out. Texts become what ``text`` returns. Raises
    ``TypeError`` for an object without such attributes: leaving a setting out would reuse wrong results.
    """
    convert = partial(settings_of, text=text, described=described)
    if isinstance(value, str):
        return text(value)
    if isinstance(value, float):
        return str(value) if not isfinite(value) else int(value) if value.is_integer() else value
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, Mapping):
        return sorted(([convert(key), convert(item)] for key, item in value.items()), key=canonical)
    if isinstance(value, list | tuple):
        return [convert(item) for item in value]
    kind = type(value)
    try:
        taken = inspect.signature(kind).parameters.values()
        names = [given.name for given in taken if given.kind not in PACKED and given.name[0] != "_"]
        settings = {name: convert(getattr(value, name)) for name in names}
    except (ValueError, AttributeError) as error:
        raise TypeError(
            f"{kind.__qualname__} does not store its constructor's arguments ({error}): no key can be made"
        ) from error
    return {"class": described(kind), **settings}


def computed_by(module: "LightningModule") -> dict[str, str]:
    """What computes: precision, the device's type (not its number), package versions, and the source of own code."""
    kind: type = type(module)
    return {
        "precision": str(module.trainer.precision),
        "device": module.device.type,
        **{name: version(name) for name in LIBRARIES},
        LIBRARY: measuring_digest(kind),
        "module": own_digest(kind) or "",
    }
