"""The selection loss: align the scores that a press selects by with the attention that the teacher really pays.

What a press drops sends no gradient, so the loss on tokens cannot teach it to keep what it dropped. Its scores can:
most presses score with differentiable functions of queries, keys and hidden states.
"""

from sparsekv_pl.selection.forms import evictable_keys, key_logits, log_share, pinned
from sparsekv_pl.selection.loss import Form, Heads, SelectionLoss
from sparsekv_pl.selection.mass import AttentionMass, Selection, with_mass

__all__ = [
    "AttentionMass",
    "Form",
    "Heads",
    "Selection",
    "SelectionLoss",
    "evictable_keys",
    "key_logits",
    "log_share",
    "pinned",
    "with_mass",
]
