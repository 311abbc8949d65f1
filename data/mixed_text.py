"""Several sources of text, streams among them, in given shares of the tokens."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from data.documents import Document, DocumentBlocks, TextSource

NO_DOCUMENTS = (
    "MixedText gives training and evaluation windows of its sources and has no order of documents: give this data one "
    "of its sources, or data.joined_text.JoinedText"
)


@dataclass
class MixedText(TextSource):
    """Windows of several sources, each drawn from a source by weight; a source that ends begins again.

    Sources may be streams of any length. Validation and held-out text have the same shares, in tokens.

    Parameters
    ----------
    sources
        At least one source.
    weights
        A positive weight per source; null weights all alike.

    Raises
    ------
    ValueError
        If there is no source, a source is itself mixed, or the weights do not fit.
    """

    sources: list[TextSource]
    weights: list[float] | None = None
    skipped: int = field(default=0, init=False, compare=False)

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("MixedText.sources is []: name at least one source")
        if any(isinstance(source, MixedText) for source in self.sources):
            raise ValueError("MixedText.sources has a MixedText: name its sources and weights in one list")
        weights = [1.0] * len(self.sources) if self.weights is None else self.weights
        if len(weights) != len(self.sources):
            raise ValueError(f"weights is {weights}: give one per source, {len(self.sources)} numbers")
        if not all(0 < weight < float("inf") for weight in weights):
            raise ValueError(f"weights is {weights}: give numbers above 0")
        self.weights = [float(weight) for weight in weights]

    def parts(self) -> list[tuple[TextSource, float]]:
        """Return the sources with their shares, which add up to 1."""
        assert self.weights is not None
        return [(source, weight / sum(self.weights)) for source, weight in zip(self.sources, self.weights, strict=True)]

    def documents(self) -> Iterator[Document]:
        """Raise ``ValueError``: only windows are mixed."""
        raise ValueError(NO_DOCUMENTS)

    def blocks(self, keep: Callable[[str], bool], number: int = 0, total: int = 1) -> DocumentBlocks:  # noqa: ARG002
        """Raise ``ValueError``: only windows are mixed."""
        raise ValueError(NO_DOCUMENTS)
