"""What a case was measured under: one type from a setting over records to the rows of a report."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

FULL_CACHE = "full cache"
"""The press of a record without eviction, as press_name(None) calls it."""
HOSTED = "hosted "
"""How the press of a record begins that a hosted model answered."""


@dataclass(frozen=True)
class Condition:
    """A press by its name, a compression ratio, and when the press evicts."""

    press: str
    compression_ratio: float
    prefill: str = "dense"

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "Condition":
        """The condition that a record was measured under."""
        return cls(record["press"], record["compression_ratio"], record.get("prefill", "dense"))

    def columns(self) -> dict[str, Any]:
        """A record's or row's columns that say it."""
        return asdict(self)

    @property
    def name(self) -> str:
        """Fit for a file's name and for TensorBoard."""
        spelled = f"{self.press}_{self.compression_ratio:g}_{self.prefill}".replace(" ", "_")
        return "".join(letter if letter.isalnum() or letter in "_-" else "-" for letter in spelled)

    def __str__(self) -> str:
        """For messages, exact: "SnapKV at 0.5, chunks of 128"."""
        return f"{self.press} at {self.compression_ratio}, {self.prefill}"

    @property
    def evicts(self) -> bool:
        """Whether anything is removed: then it matters whether the press was seen in training."""
        return self.press != FULL_CACHE and not self.press.startswith(HOSTED)

    @property
    def when(self) -> str:
        """The prefill where it is worth telling: "" for a dense one and for a hosted model."""
        return "" if self.prefill == "dense" or self.press.startswith(HOSTED) else self.prefill

    @property
    def label(self) -> str:
        """For pictures: "full cache", "SnapKV 0.50", "SnapKV 0.50, chunks of 128"."""
        name = f"{self.press} {self.compression_ratio:.2f}" if self.evicts else self.press
        return f"{name}, {self.when}" if self.when else name
