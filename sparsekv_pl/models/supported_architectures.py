"""Check that a model's attention is of the kind that this project computes itself.

Attention is a softmax over scaled products of queries and keys, also with a cap or sinks (models/softmax_rule.py).
Every head is computed (head.py).
"""

import sys

from torch import nn
from transformers import PreTrainedModel

from sparsekv_pl.models.decoder import decoder_of
from sparsekv_pl.models.layer_kinds import attentions, linear_layers
from sparsekv_pl.models.rotary import has_rotary


def check_computed(model: PreTrainedModel) -> None:
    """Raise ``ValueError`` if ``model``'s attention computes more than this project does.

    Ignoring it would give the losses, perplexities and answers of another model.
    """
    found = set()
    decoder = decoder_of(model)
    layers = list(getattr(decoder, "layers", []))
    attending, continued = (attentions(model) if layers else {}), linear_layers(model)
    if any(getattr(layer, "mamba", None) is not None and index not in continued for index, layer in enumerate(layers)):
        found.add("state spaces of a kind that is not continued here (mamba)")
    elif not attending.keys() | continued.keys() >= set(range(len(layers))):
        found.add("layers without an attention that is called self_attn")
    if not attending or not all(map(_by_interface, attending.values())):
        found.add("an attention of its own, which does not go through transformers' AttentionInterface")
    elif not has_rotary(model):
        found.add("other positions than RoPE's (rotary_emb), which do not go on after an eviction")
    text = model.config.get_text_config(decoder=True)
    if getattr(text, "num_kv_shared_layers", None):
        found.add("layers that attend to the keys of others (num_kv_shared_layers)")
    if getattr(text, "kv_lora_rank", None):
        found.add("latent attention (kv_lora_rank), whose keys and values have different dimensions")
    if found:
        raise ValueError(
            f"{type(model).__name__} has {', '.join(sorted(found))}: attention is computed here as a softmax over "
            "queries times keys, so every number would be another model's. Choose a model without"
        )


def _by_interface(attention: nn.Module) -> bool:
    return hasattr(sys.modules[type(attention).__module__], "ALL_ATTENTION_FUNCTIONS")
