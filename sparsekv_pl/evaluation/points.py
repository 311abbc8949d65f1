"""Points of the evaluation matrix: a press, a compression ratio, and when the press evicts."""

import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from kvpress import BasePress

from sparsekv_pl.eviction.chunking import chunk_bounds
from sparsekv_pl.eviction.limits import check_chunks
from sparsekv_pl.eviction.quantised_pairs import PairQuantisation
from sparsekv_pl.eviction.request import NOTHING
from sparsekv_pl.eviction.while_decoding import Decoding
from sparsekv_pl.models.compression_ratio import check_compression_ratio
from sparsekv_pl.presses.nesting import press_name
from sparsekv_pl.presses.ratio import set_compression_ratio, written_ratio
from sparsekv_pl.presses.traits import traits_of
from sparsekv_pl.reporting.condition import Condition
from sparsekv_pl.storage.result_keys import settings_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Point:
    """One point of the matrix: a press (None: the full cache) at one compression ratio."""

    press: BasePress | None = None
    compression_ratio: float = 0.0
    chunk_tokens: int | None = None
    decoding: Decoding | None = None
    quantisation: PairQuantisation | None = None

    @property
    def condition(self) -> Condition:
        """The point's condition in records and reports."""
        stored = "" if self.quantisation is None else str(self.quantisation)
        return Condition(press_name(self.press), self.compression_ratio, self.prefill, stored)

    @property
    def prefill(self) -> str:
        """When the press evicts: once after a dense prefill, after every chunk, or while tokens are decoded."""
        if self.decoding is not None:
            return self.decoding.label
        return "dense" if self.chunk_tokens is None else f"chunks of {self.chunk_tokens}"

    @property
    def name(self) -> str:
        """A name that is valid in file names and in TensorBoard."""
        return self.condition.name

    def unfit(self) -> str | None:
        """Why the press cannot be measured at this ratio; None if it can."""
        try:
            if self.press is not None:
                set_compression_ratio(self.press, self.compression_ratio)
        except ValueError as error:
            return str(error)
        return None

    def described(self) -> dict[str, Any]:
        """All settings that decide what this point measures, JSON-able."""
        described = {
            "press": self._press_settings(),
            "chunk_tokens": self.chunk_tokens,
            "decoding": None if self.decoding is None else asdict(self.decoding),
        }
        if self.quantisation is not None:  # the work done on whole pairs keeps its keys
            described["quantisation"] = asdict(self.quantisation)
        return described

    def _press_settings(self) -> Any:
        if self.press is None:
            return None
        set_compression_ratio(self.press, self.compression_ratio)
        return settings_of(self.press)


@dataclass
class Setting:
    """A press and the ratios to measure it at.

    Parameters
    ----------
    press
        Any press of kvpress or of this project.
    compression_ratios
        Fractions of the KV pairs to remove.
    chunk_tokens
        Prefill in true chunks of at most this many tokens, evicting after each; null evicts once, after a dense
        prefill.
    decoding
        Also evict while text and questions are read and answers written, every so many tokens: see ``Decoding``.
    quantisations
        Ways to store the kept pairs, each measured at every ratio: null leaves them whole, ``{bits: 4}`` rounds them.
        By default whole. At a ratio of 0 every pair is kept and rounded.

    Raises
    ------
    ValueError
        For a ratio or number out of range, chunks or quantisation beside ``decoding``, or a press that evicts only in
        training.
    """

    press: BasePress
    compression_ratios: list[float]
    chunk_tokens: int | None = None
    decoding: Decoding | None = None
    quantisations: list[PairQuantisation | None] | None = None

    def __post_init__(self) -> None:
        for ratio in self.compression_ratios:
            check_compression_ratio("compression_ratios", ratio)
        if self.chunk_tokens is not None and self.chunk_tokens < 1:
            raise ValueError(f"chunk_tokens={self.chunk_tokens} must be at least 1 token, or null")
        check_evicts(self.press)
        if written := written_ratio(self.press):
            log.warning("%s is ignored: compression_ratios sets the ratio", written)
        if self.chunk_tokens is not None and self.decoding is not None:
            raise ValueError("a setting evicts in chunks or during decoding: set chunk_tokens or decoding")
        if self.decoding is not None and any(self.quantisations or []):
            raise ValueError(
                f"decoding={self.decoding} evicts while tokens are read, and quantisations apply to a context's pairs: "
                "leave one of them out"
            )

    def points(self) -> Iterator[Point]:
        """One point per ratio and quantisation."""
        for quantisation in self.quantisations or [None]:
            for ratio in self.compression_ratios:
                yield Point(self.press, ratio, self.chunk_tokens, self.decoding, quantisation)

    def check(self, context_tokens: int) -> None:
        """Raise ``ValueError`` if the press cannot evict from contexts of this length (tokens) in this way."""
        traits = traits_of(self.press)
        check_chunks(traits, chunk_bounds(context_tokens, self.chunk_tokens), NOTHING)
        if self.decoding is not None:
            self.decoding.check(traits)


def check_evicts(press: BasePress) -> None:
    """Raise ``ValueError`` for a press that evicts only in training: an evaluation would measure the full cache."""
    if traits_of(press).deciding.only_trains:
        raise ValueError(
            f"{press_name(press)} evicts only in training, so the full cache would be measured under its name: "
            "evaluate with a press that evicts in evaluation too (SnapKVPress, KeyDiffPress)"
        )


def points_of(settings: list[Setting]) -> list[Point]:
    """The full cache, then every setting's points. Raises ``ValueError`` for two points with the same name."""
    points = [Point(), *(point for setting in settings for point in setting.points())]
    names = [point.name for point in points]
    for point in points:
        if names.count(point.name) > 1:
            raise ValueError(
                f"settings has {point.condition}, more than once: its rows would be indistinguishable; remove one, or "
                "measure it in a separate run"
            )
    return points
