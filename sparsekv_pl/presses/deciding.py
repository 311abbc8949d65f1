"""The press that decides what stays, behind those that choose one or only look on."""

from kvpress import BasePress, KeyRerotationPress, MergingPress

from sparsekv_pl.presses.eviction_aug import EvictionAugPress
from sparsekv_pl.presses.sparse_reg import SparseRegPress


def deciding_press(press: BasePress | None) -> BasePress | None:
    """The press drawn by EvictionAugPress, or the one inside SparseRegPress; ``press`` itself where it is neither."""
    while isinstance(press, (EvictionAugPress, SparseRegPress)) and press.press is not None:
        press = press.press
    return press


def candidates(press: BasePress) -> list[BasePress]:
    """Every press that may come to decide: ``deciding_press`` of each step is one of them."""
    if isinstance(press, EvictionAugPress):
        return [deciding for member in press.presses for deciding in candidates(member)]
    if isinstance(press, SparseRegPress) and press.press is not None:
        return candidates(press.press)
    return [press]


def selecting_press(deciding: BasePress) -> BasePress:
    """The press that selects for ``deciding``, which may move or blend what was selected."""
    return deciding.press if isinstance(deciding, (KeyRerotationPress, MergingPress)) else deciding
