"""Check that a model's head and attention are of the kind that this project computes itself.

Logits are hidden states times the head's weight, and attention is a softmax over scaled products of queries and keys.
"""

import sys
from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel

from sparsekv_pl.models.decoder import decoder_of

HEAD_SETTINGS: dict[str, float | None] = {
    "final_logit_softcapping": None,  # Gemma 2, Gemma 3n, NanoChat, VaultGemma
    "logits_soft_cap": None,  # RecurrentGemma
    "logits_scaling": 1,  # Granite
    "logit_scale": 1,  # Cohere
    "lm_head_multiplier": 1,  # Falcon H1
}
"""Config settings that change the logits -> their neutral values."""

ATTENTION_SETTINGS: dict[str, float | None] = {"attn_logit_softcapping": None}  # Gemma 2, VaultGemma
"""Config settings that change attention -> their neutral values."""


def check_computed(model: PreTrainedModel) -> None:
    """Raise ``ValueError`` if ``model``'s head or attention computes more than this project does.

    Ignoring a scale or a cap would give the losses, perplexities and answers of another model.
    """
    config = model.config.get_text_config()
    found = {
        f"config.{name}={getattr(config, name)}"
        for name, neutral in (HEAD_SETTINGS | ATTENTION_SETTINGS).items()
        if getattr(config, name, neutral) not in (neutral, None)
    }
    head = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        found.add("a bias in the head")
    if any(name.rpartition(".")[2] == "sinks" for name, _ in model.named_parameters()):
        found.add("learnt attention sinks (sinks)")
    if not any(
        hasattr(sys.modules[type(module).__module__], "ALL_ATTENTION_FUNCTIONS") for module in _attention(model)
    ):
        found.add("an attention of its own, which does not go through transformers' AttentionInterface")
    if found:
        raise ValueError(
            f"{type(model).__name__} has {', '.join(sorted(found))}: logits are computed here as hidden states times "
            "the head's weight, and attention as a softmax over queries times keys, so every number would be another "
            "model's. Choose a model without"
        )


def _attention(model: PreTrainedModel) -> Iterator[nn.Module]:
    """Return the attention modules of ``model``'s decoder, which have a ``layer_idx``."""
    return (module for module in decoder_of(model).modules() if hasattr(module, "layer_idx"))
