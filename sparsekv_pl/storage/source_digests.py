"""Digests of Python source for keys of finished work: of the library's measuring code, and of a user's own classes."""

import ast
import hashlib
import sys
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec, resolve_name
from pathlib import Path
from uuid import uuid4

from sparsekv_pl.storage.fingerprint import digest_of, folder_digest

LIBRARIES = ("kvpress", "torch", "transformers")
"""Packages of presses, kernels and models that a key holds by version."""
LIBRARY = "sparsekv_pl"
NOT_MEASURING = frozenset({"ask", "cli", "reporting", "serve", "training", "usage"})
"""Rooms of the library that change no record: command lines, reports, training, use."""
APART = frozenset({"analysis", "blocksparse"})
"""Rooms that only their own modules' records depend on."""


@cache
def measuring_digest(module: type) -> str:
    """Digest of the library's source that decides the records of a measuring module of this class.

    It is that of the first call: a file that changes during a run was imported before.
    """
    paths = [base.__module__.split(".") for base in module.__mro__]
    own = {path[1] for path in paths if path[0] == LIBRARY and len(path) > 1}
    root = Path(__file__).parents[1]
    rooms = {path.name for path in root.iterdir() if path.is_dir()} - NOT_MEASURING - (APART - own)
    return folder_digest(root, [f"{room}/**/*.py" for room in rooms])


@cache
def own_digest(kind: type) -> str | None:
    """Digest of the source of a class, its bases, and all of a user's own modules that these import.

    None for a class of Python, ``LIBRARIES`` or this library. Of another installed package only the modules of the
    class and its bases count. A class that is in no file (a notebook's) gets a digest that no other process has.
    It is that of the first call, as for ``measuring_digest``.
    """
    if _keyed(kind.__module__):
        return None
    files: dict[str, Path] = {}
    for name in {base.__module__ for base in kind.__mro__ if not _keyed(base.__module__)}:
        path = getattr(sys.modules.get(name), "__file__", None)
        if path is None or not Path(path).is_file():
            return uuid4().hex
        files[name] = Path(path)
    found: dict[str, str] = {}
    while files:
        name, path = files.popitem()
        found[name] = digest_of(path)
        named = {one: _own_file(one) for one in _imported(name, path) if one not in found}
        files |= {one: file for one, file in named.items() if file is not None}
    return hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()


def _keyed(module: str) -> bool:
    """Whether a key holds the package of ``module`` by version or by ``measuring_digest``, or it is Python's."""
    package = module.partition(".")[0]
    return package in (*LIBRARIES, LIBRARY) or package in sys.stdlib_module_names


def _imported(name: str, path: Path) -> Iterator[str]:
    """Yield the names that the module ``name`` imports anywhere in its source: modules, and what may be in them."""
    if path.suffix != ".py":
        return
    loaded = sys.modules.get(name)
    package = loaded.__package__ if loaded else name if path.stem == "__init__" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package or "")
            yield from (base, *(f"{base}.{alias.name}" for alias in node.names))


def _own_file(name: str) -> Path | None:
    """Return the file of a user's own module; None for an installed package's, and if there is no such module."""
    try:
        if _keyed(name) or _installed(name.partition(".")[0]):
            return None
        spec = find_spec(name)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin) if spec is not None and spec.has_location and spec.origin else None


def _installed(package: str) -> bool:
    spec = find_spec(package)
    places = [] if spec is None else [spec.origin or "", *(spec.submodule_search_locations or [])]
    return any(part in ("site-packages", "dist-packages") for place in places for part in Path(place).parts)
