"""Measuring: cases to records."""

from sparsekv_pl.measures.measurement import Measurement

__all__ = ["Measurement"]
