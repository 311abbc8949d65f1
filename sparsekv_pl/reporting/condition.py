"""The condition of a measurement (press, ratio, prefill, storage), for settings, records and rows of a report."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

FULL_CACHE = "full cache"
"""The press of a record without eviction; equals press_name(None)."""
ORACLE = "Oracle"
"""The press of a record whose eviction saw the continuation; equals press_name(OraclePress())."""
HOSTED = "hosted "
"""Beginning of the press of a record that a hosted model answered."""


@dataclass(frozen=True)
class Condition:
    """A press by its name, a compression ratio, when the press evicts, and how kept pairs are stored."""

    press: str
    compression_ratio: float
    prefill: str = "dense"
    stored: str = ""
    """Bits of the kept pairs, "4 bits"; empty if they are whole."""

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "Condition":
        """The condition that a record was measured under."""
        prefill, stored = record.get("prefill", "dense"), record.get("stored", "")
        return cls(record["press"], record["compression_ratio"], prefill, stored)

    def columns(self) -> dict[str, Any]:
        """The condition as columns of a record or row."""
        return asdict(self)

    @property
    def name(self) -> str:
        """A name that is valid in file names and in TensorBoard."""
        spelled = f"{self.press}_{self.compression_ratio:g}_{self.way}".replace(", ", "_").replace(" ", "_")
        return "".join(letter if letter.isalnum() or letter in "_-" else "-" for letter in spelled)

    def __str__(self) -> str:
        """The exact condition for messages: "SnapKV at 0.5, chunks of 128"."""
        return f"{self.press} at {self.compression_ratio}, {self.way}"

    @property
    def way(self) -> str:
        """The prefill, and how pairs are stored if they are not whole: "dense", "chunks of 128, 4 bits"."""
        return f"{self.prefill}, {self.stored}" if self.stored else self.prefill

    @property
    def evicts(self) -> bool:
        """Whether KV pairs are removed."""
        return self.press != FULL_CACHE and not self.press.startswith(HOSTED)

    @property
    def may_be_seen(self) -> bool:
        """Whether training can have evicted under this condition's press: not the full cache, and no ceiling."""
        return self.evicts and not foresees(self.press)

    @property
    def when(self) -> str:
        """What of ``way`` is not the usual: "" for whole pairs after a dense prefill and for a hosted model."""
        if self.press.startswith(HOSTED):
            return ""
        return self.stored if self.prefill == "dense" else self.way

    @property
    def label(self) -> str:
        """A short label for pictures: "full cache", "SnapKV 0.50", "SnapKV 0.50, chunks of 128"."""
        name = f"{marked(self.press)} {self.compression_ratio:.2f}" if self.evicts else self.press
        return f"{name}, {self.when}" if self.when else name


def foresees(press: str) -> bool:
    """Return whether the press of this name, or one inside it, saw the question and its answer."""
    return ORACLE in press.rstrip(")").split("(")


def marked(press: str) -> str:
    """Return a press's name for tables and pictures, which says if it is a ceiling and no method."""
    return f"{press} (ceiling: sees the question)" if foresees(press) else press
