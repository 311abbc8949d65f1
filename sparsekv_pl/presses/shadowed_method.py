"""Replace one instance's method for a while."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any


@contextmanager
def shadowed(owner: object, name: str, instead: Callable[..., Any]) -> Iterator[None]:
    """Replace ``owner.name`` by ``instead`` inside the block; ``instead`` gets the original as its first argument."""
    own = vars(owner).get(name)
    setattr(owner, name, partial(instead, getattr(owner, name)))
    try:
        yield
    finally:
        vars(owner).pop(name)
        if own is not None:
            setattr(owner, name, own)
