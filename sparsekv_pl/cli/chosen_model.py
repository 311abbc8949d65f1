"""Make the model and the press that the arguments of model_arguments.py choose."""

from argparse import Namespace

from kvpress import BasePress

from sparsekv_pl.eviction.press_model_check import check_press_alone
from sparsekv_pl.models.backbone import Backbone
from sparsekv_pl.presses.press_text import press_from
from sparsekv_pl.presses.ratio import set_compression_ratio
from sparsekv_pl.presses.traits import traits_of
from sparsekv_pl.usage.usable_press import check_usable


def chosen_backbone(asked: Namespace) -> Backbone:
    """Return the model with its adapter, not yet loaded."""
    backbone = Backbone(asked.pretrained, asked.dtype, adapter=asked.adapter, load_in_4bit=asked.load_in_4bit)
    backbone.revision = asked.revision
    return backbone


def chosen_press(asked: Namespace) -> BasePress | None:
    """Return the press with its ratio; None for the full cache.

    Raises
    ------
    ValueError
        For an unknown press, one that cannot make a cache to keep, and one that would remove nothing.
    """
    if asked.press is None:
        return None
    press = press_from(asked.press)
    check_usable(press)
    check_press_alone(press)
    if asked.compression_ratio is not None:
        set_compression_ratio(press, asked.compression_ratio)
    if traits_of(press).takes_a_ratio and not press.compression_ratio and asked.budget is None:
        raise ValueError(f"--press {asked.press} removes nothing: give --compression_ratio, such as 0.75, or --budget")
    return press
