"""Check that a model's attention is of the kind that this project computes itself.

Attention is a softmax over scaled products of queries and keys, also with a cap or sinks (models/softmax_rule.py).
Every head is computed (head.py).
"""

import sys
from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel

from sparsekv_pl.models.decoder import decoder_of


def check_computed(model: PreTrainedModel) -> None:
    """Raise ``ValueError`` if ``model``'s attention computes more than this project does.

    Ignoring it would give the losses, perplexities and answers of another model.
    """
    found = set()
    if any(
        hasattr(layer, "mamba") and hasattr(layer, "self_attn") for layer in getattr(decoder_of(model), "layers", [])
    ):
        found.add("a state space beside the attention of a layer (mamba), whose state no cache here keeps")
    if not any(
        hasattr(sys.modules[type(module).__module__], "ALL_ATTENTION_FUNCTIONS") for module in _attention(model)
    ):
        found.add("an attention of its own, which does not go through transformers' AttentionInterface")
    if found:
        raise ValueError(
            f"{type(model).__name__} has {', '.join(sorted(found))}: attention is computed here as a softmax over "
            "queries times keys, so every number would be another model's. Choose a model without"
        )


def _attention(model: PreTrainedModel) -> Iterator[nn.Module]:
    """Return the attention modules of ``model``'s decoder, which have a ``layer_idx``."""
    return (module for module in decoder_of(model).modules() if hasattr(module, "layer_idx"))
