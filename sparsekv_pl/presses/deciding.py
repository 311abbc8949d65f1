"""The press that decides what stays, behind those that choose one or only look on."""

from kvpress import BasePress

from sparsekv_pl.presses.eviction_aug import EvictionAugPress
from sparsekv_pl.presses.sparse_reg import SparseRegPress


def deciding_press(press: BasePress | None) -> BasePress | None:
    """The press drawn by EvictionAugPress, or the one inside SparseRegPress; ``press`` itself where it is neither."""
    while isinstance(press, (EvictionAugPress, SparseRegPress)) and press.press is not None:
        press = press.press
    return press
