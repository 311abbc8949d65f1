"""Text without a download: the source of the interpreter's standard library."""

import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data.text import Document, TextSource

LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data", "__pycache__"}
"""Folders left out: tests, installed packages, character tables, and the text of ``EmbeddedText``."""


@dataclass
class PythonSource(TextSource):
    """The modules of the standard library, one document per file, with ids like "python/json/decoder.py".

    Python 3.11.7 on Linux: 606 documents with 9.9 million characters, 2.5 million tokens of SmolLM2's tokenizer.
    The text differs between Python versions, and a little between platforms. No download.
    """

    def documents(self) -> Iterator[Document]:
        """Yield the documents in the order of their ids; ``ValueError`` if the installation has no sources."""
        library = Path(sysconfig.get_path("stdlib"))
        found = False
        for path in sorted(library.rglob("*.py"), key=lambda path: path.relative_to(library).as_posix()):
            inside = path.relative_to(library)
            if LEFT_OUT.intersection(inside.parts) or _made_at_build(inside):
                continue
            with tokenize.open(path) as file:  # in the encoding that the file declares
                text = file.read()
            if text.strip():
                found = True
                yield Document(f"python/{inside.as_posix()}", text)
        if not found:
            raise ValueError(f"{library}: holds no Python sources. Use EmbeddedText, LocalText or HubText")


def _made_at_build(path: Path) -> bool:
    """Return whether a file was generated at build time, with settings and folders of the build machine."""
    return path.parts[0].startswith(("_sysconfigdata", "config-"))
