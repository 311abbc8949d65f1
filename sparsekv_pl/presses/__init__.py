"""This project's presses, and tools that work with any kvpress press."""

from sparsekv_pl.presses.adaptive_block_dropout import AdaptiveBlockDropoutPress
from sparsekv_pl.presses.anchor import AnchorPress
from sparsekv_pl.presses.block_dropout import BlockDropoutPress
from sparsekv_pl.presses.eviction_aug import EvictionAugPress
from sparsekv_pl.presses.kvpress_warnings import shorten_warnings
from sparsekv_pl.presses.oracle import OraclePress
from sparsekv_pl.presses.sentence_dropout import SentenceDropoutPress
from sparsekv_pl.presses.soft_threshold import SoftThresholdPress
from sparsekv_pl.presses.sparse_reg import SparseRegPress
from sparsekv_pl.presses.variable_block import VariableBlockPress
from sparsekv_pl.presses.whole_pages import PagePress

shorten_warnings()

__all__ = [
    "AdaptiveBlockDropoutPress",
    "AnchorPress",
    "BlockDropoutPress",
    "EvictionAugPress",
    "OraclePress",
    "PagePress",
    "SentenceDropoutPress",
    "SoftThresholdPress",
    "SparseRegPress",
    "VariableBlockPress",
]
