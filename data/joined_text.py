"""Several sources of text as one."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from data.documents import Document, TextSource
from data.text import HubText


@dataclass
class JoinedText(TextSource):
    """The documents of several sources, one source after the other; training shuffles them together.

    Parameters
    ----------
    sources
        At least one source that ends: local files, the embedded text, or datasets that are not streamed.

    Raises
    ------
    ValueError
        If there is no source, or one is a stream.
    """

    sources: list[TextSource]
    skipped: int = field(default=0, init=False, compare=False)

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("JoinedText.sources is []: name at least one source")
        for i, source in enumerate(self.sources):
            if isinstance(source, HubText) and source.streaming:
                raise ValueError(
                    f"JoinedText.sources[{i}] streams {source.name!r}, which may never end: set its streaming "
                    "to false, or mix the sources by weight with data.mixed_text.MixedText"
                )

    def documents(self) -> Iterator[Document]:
        """Yield every source's documents, in the sources' order."""
        self.skipped = 0
        for source in self.sources:
            yield from source.documents()
            self.skipped += source.skipped
