"""OraclePress: keep what the continuation attends to, a ceiling for presses that cannot know it."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from kvpress import BasePress, ScorerPress
from torch import Tensor, nn

from sparsekv_pl.models.compression_ratio import check_compression_ratio
from sparsekv_pl.presses.nesting import presses_in


@dataclass
class OraclePress(ScorerPress):
    """Keep the keys that the model's own continuation, with the full cache, attends to most, per layer and KV head.

    The continuation is the text that follows, or the question with its reference answer: this press sees what no press
    can know when it evicts. Its results are a ceiling to compare others with, and only EvaluationModule measures it.
    For base the attention is base's, for trained it is trained's.

    Parameters
    ----------
    compression_ratio
        Fraction of KV pairs that is removed; ``ValueError`` if it is not from 0 to below 1.

    Attributes
    ----------
    mass
        layer -> (B, K, S), the attention to each key, a mean over the continuation's tokens and the query heads of a KV
        head (``AttentionMass``); None where no continuation is known. ``foreseen`` sets it.
    """

    compression_ratio: float = 0.0
    mass: Mapping[int, Tensor] | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_compression_ratio("OraclePress.compression_ratio", self.compression_ratio)

    def score(
        self,
        module: nn.Module,
        hidden_states: Tensor,  # noqa: ARG002
        keys: Tensor,
        values: Tensor,  # noqa: ARG002
        attentions: Tensor | None,  # noqa: ARG002
        kwargs: Mapping[str, Any],  # noqa: ARG002
    ) -> Tensor:
        """Return the attention (B, K, S) that the continuation pays; ``ValueError`` where none is known."""
        mass = None if self.mass is None else self.mass[int(module.layer_idx)]  # type: ignore[arg-type]
        if mass is None or mass.shape != keys.shape[:3]:
            raise ValueError(
                "OraclePress keeps what the continuation of the whole context attends to, which is not known here: "
                "measure it with EvaluationModule, once after a dense prefill, or take another press"
            )
        return mass


def oracles_in(press: BasePress | None) -> list[OraclePress]:
    """Return every OraclePress in ``press``."""
    return [] if press is None else [inner for inner in presses_in(press) if isinstance(inner, OraclePress)]


@contextmanager
def foreseen(oracles: Iterable[OraclePress], mass: Mapping[int, Tensor]) -> Iterator[None]:
    """Let ``oracles`` know the continuation's attention inside the block: layer -> (B, K, S)."""
    found = list(oracles)
    for oracle in found:
        oracle.mass = mass
    try:
        yield
    finally:
        for oracle in found:
            oracle.mass = None
