"""Selecting what stays: presses of our own, and what every kvpress press has in common."""

from sparsekv_pl.presses.eviction_aug import EvictionAugPress

__all__ = ["EvictionAugPress"]
