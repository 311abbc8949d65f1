"""Digests of files and folders: they depend on the content, not on the spelling of the path."""

import hashlib
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

READ_BY_LOADING = """
    *.safetensors *.safetensors.index.json config.json generation_config.json adapter_config.json tokenizer* *.model
    vocab* merges.txt added_tokens.json special_tokens_map.json chat_template* additional_chat_templates/* *.py
""".split()
"""Files of a model's folder that loading reads: weights, settings, tokenizer, code."""


def digest_of(path: Path) -> str:
    """SHA-256 of a file's bytes, cached while its size and modification time stay the same."""
    real = path.resolve()
    if real.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", real.name):
        return real.name  # Hugging Face's cache names large files after their SHA-256
    stat = real.stat()
    return _digest(real, stat.st_size, stat.st_mtime_ns)


def folder_digest(folder: Path, patterns: Iterable[str] = ("**/*",)) -> str:
    """Digest of the names and contents of files in ``folder`` that match ``patterns``, without compiled Python."""
    paths = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    return _together([(path.relative_to(folder).as_posix(), path) for path in paths if "__pycache__" not in path.parts])


def path_digest(path: Path) -> str:
    """Digest of a file's bytes, or of a folder with its content."""
    return folder_digest(path) if path.is_dir() else digest_of(path)


def weights_digest(source: Path) -> str:
    """Digest of a model's weights only: a GGUF file, or the weights in a Hugging Face folder under any file names."""
    if source.is_file():
        return digest_of(source)
    return _together([("", path) for path in sorted(source.glob("*.safetensors")) if path.stem != "adapter_model"])


def model_digest(source: Path) -> str:
    """Digest of all that loading a GGUF file or a Hugging Face folder reads: weights, settings, tokenizer, code."""
    return digest_of(source) if source.is_file() else folder_digest(source, READ_BY_LOADING)


def _together(named: list[tuple[str, Path]]) -> str:
    with ThreadPoolExecutor(4) as pool:  # hashing releases the interpreter's lock
        digests = list(pool.map(digest_of, (path for _, path in named)))
    lines = sorted(f"{name} {digest}" for (name, _), digest in zip(named, digests, strict=True))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@cache
def _digest(path: Path, size: int, changed_ns: int) -> str:  # noqa: ARG001, they are part of what is cached
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
