"""What made a cache, besides its model and its tokens: the press with its settings, chunks and budget."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from kvpress import BasePress

from sparsekv_pl.eviction.quantised_pairs import PairQuantisation
from sparsekv_pl.models.cache_shape import kept_pairs
from sparsekv_pl.presses.nesting import press_name
from sparsekv_pl.presses.press_text import press_from, press_text
from sparsekv_pl.presses.ratio import compression_ratio_of
from sparsekv_pl.presses.traits import traits_of


@dataclass(frozen=True)
class CacheOrigin:
    """The settings of an eviction, as a file holds them."""

    press: str | None = None
    """The press with its settings, see ``press_text``, or its name if no text can say them; None for the full cache."""
    name: str = "full cache"
    """The press's name in reports."""
    compression_ratio: float | None = None
    """The press's; None without a press, or for one without a ratio. The share planned of all, if it is ``fixed``."""
    re_rotated: bool = False
    """Whether the press moved the kept keys to the positions 0..S-1."""
    chunk_tokens: int | None = None
    budget: int | None = None
    fixed: str = ""
    """Why nothing can be appended; empty if something can."""
    quantisation: PairQuantisation | None = None
    """How the pairs are stored; None if they are whole."""

    @classmethod
    def read(cls, saved: Mapping[str, Any]) -> "CacheOrigin":
        """Return the settings that a file holds; raise ``TypeError`` for others."""
        packed = saved.get("quantisation")
        return cls(**{**saved, "quantisation": None if packed is None else PairQuantisation(**packed)})

    @classmethod
    def of(
        cls,
        press: BasePress | None,
        chunk_tokens: int | None,
        budget: int | None,
        quantisation: PairQuantisation | None = None,
    ) -> "CacheOrigin":
        """Describe an eviction.

        Raises
        ------
        ValueError
            For numbers out of range, and a budget without a press.
        """
        for name, value in {"chunk_tokens": chunk_tokens, "budget": budget}.items():
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1 token")
        if press is None:
            if budget is not None:
                raise ValueError(f"budget={budget} needs a press that evicts: name one, or leave the budget out")
            return cls(chunk_tokens=chunk_tokens, quantisation=quantisation)
        return cls(
            press=_text(press),
            name=press_name(press),
            compression_ratio=_ratio(press),
            re_rotated=traits_of(press).re_rotates,
            chunk_tokens=chunk_tokens,
            budget=budget,
            quantisation=quantisation,
        )

    def __str__(self) -> str:
        if self.fixed:
            return self.name
        name = self.name if self.compression_ratio is None else f"{self.name} {self.compression_ratio:g}"
        return name if self.quantisation is None else f"{name}, {self.quantisation}"

    def merged(self, tokens: int, theirs: "CacheOrigin", more: int) -> "CacheOrigin":
        """Return the settings of a cache merged from these, for ``tokens`` tokens, and ``theirs`` for ``more``."""
        if self == theirs and not self.fixed:
            return self
        name, kept = f"{self} and {theirs}", self.planned_pairs(tokens) + theirs.planned_pairs(more)
        return replace(
            self,
            name=name,
            compression_ratio=max(0.0, 1 - (kept + 0.5) / (tokens + more)),  # half a pair more is safe
            budget=None,
            re_rotated=self.re_rotated and theirs.re_rotated,
            fixed=f"this cache was merged from {name}, evicted in different ways, so it is open how to evict from "
            "both: append before merging",
        )

    def planned_pairs(self, tokens: int) -> int:
        """Return the KV pairs a head that stay of ``tokens`` tokens by ratio and budget; all without either."""
        return kept_pairs(tokens, self.compression_ratio, self.budget)

    def press_again(self, given: BasePress | None) -> BasePress | None:
        """Return the press that evicts what is appended; None for the full cache, or if it is not known.

        Raises ``ValueError`` if ``given`` is another one.
        """
        if given is not None:
            if _text(given) != self.press:
                raise ValueError(f"the cache was evicted by {self.press or 'no press'}, not by {_text(given)}")
            return given
        try:
            return None if self.press is None else press_from(self.press)
        except ValueError:
            return None


def _text(press: BasePress) -> str:
    try:
        return press_text(press)
    except ValueError:
        return press_name(press)


def _ratio(press: BasePress) -> float | None:
    try:
        return compression_ratio_of(press)
    except ValueError:
        return None
