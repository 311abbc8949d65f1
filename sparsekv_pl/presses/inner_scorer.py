"""The scorer inside a press that ranks keys by its scores and by a rule of its own."""

from typing import Any

from kvpress import ScorerPress
from torch import Tensor, nn

from sparsekv_pl.presses.ratio import at_ratios


def check_inner_scorer(owner: str, press: object, more: str = "") -> None:
    """Raise ``ValueError`` unless ``press``, inside the press ``owner``, scores every key and has no ratio of its own.

    ``more`` ends the message about a ratio.
    """
    if not isinstance(press, ScorerPress):
        raise ValueError(
            f"{owner}.press is {press!r}: give a press that scores every key, such as KeyDiffPress, and put others "
            f"(AdaKVPress, KeyRerotationPress) around {owner}"
        )
    if press.compression_ratio != 0:
        raise ValueError(
            f"{owner}.press has a compression_ratio of {press.compression_ratio}: leave it out, and set "
            f"{owner}.compression_ratio{more}"
        )


def inner_scores(press: ScorerPress, ratio: float, module: nn.Module, *inputs: Any) -> Tensor:
    """Return the scores (B, K, S) float32 that ``press`` gives at the ratio of the press around it.

    CriticalKVPress's depend on the ratio.
    """
    with at_ratios([(press, ratio)]):
        scores: Tensor = press.score(module, *inputs)
        return scores.float()
