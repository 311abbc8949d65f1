"""What the project computes of a model by itself, in training, evaluation and analyses alike; more is refused.

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
"""Settings of a configuration with which logits are something else, and where they are not."""

ATTENTION_SETTINGS: dict[str, float | None] = {"attn_logit_softcapping": None}  # Gemma 2, VaultGemma
"""The same of attention."""


def check_computed(model: PreTrainedModel) -> None:
    """Raise ``ValueError`` where ``model``'s head or attention does more than is computed here.

    Dropped in silence, a scale or a cap would make every loss, perplexity and answer those of another model.
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
    """What attends in ``model``'s decoder: modules know the number of their layer."""
    return (module for module in decoder_of(model).modules() if hasattr(module, "layer_idx"))
