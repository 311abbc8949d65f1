"""The language-model head: from hidden states to logits, as the model itself computes them."""

from typing import NamedTuple, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

FACTORS = {"logits_scaling": -1, "logit_scale": 1, "lm_head_multiplier": 1}
"""Config settings by which logits are divided (-1: Granite) or multiplied (1: Cohere, Falcon-H1)."""
CAPS = ("final_logit_softcapping", "logits_soft_cap")
"""Config settings that cap the logits: Gemma 2, Gemma 3n, NanoChat, VaultGemma; RecurrentGemma."""


class Head(NamedTuple):
    """Logits are ``scale * (hidden @ weight.T + bias)``, squeezed below ``cap`` by ``cap * tanh(logits / cap)``."""

    weight: Tensor
    """(V, E)."""
    bias: Tensor | None = None
    """(V,)."""
    scale: float = 1.0
    cap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute logits (..., V) of hidden states (..., E), after the product in float32 or wider."""
        products = hidden @ self.weight.T
        logits = products.to(torch.promote_types(products.dtype, torch.float32))
        if self.bias is not None:
            logits.add_(self.bias)
        if self.scale != 1:
            logits.mul_(self.scale)
        return logits if self.cap is None else logits.div_(self.cap).tanh_() * self.cap

    def to(self, dtype: torch.dtype) -> Self:
        """Return the head with weight and bias in ``dtype``."""
        return self._replace(weight=self.weight.to(dtype), bias=None if self.bias is None else self.bias.to(dtype))

    def detach(self) -> Self:
        """Return the head without gradients."""
        return self._replace(weight=self.weight.detach(), bias=None if self.bias is None else self.bias.detach())


def as_head(head: Head | Tensor) -> Head:
    """Return ``head``; a weight (V, E) alone stands for a head without bias, scale and cap."""
    return head if isinstance(head, Head) else Head(head)


def head_of(model: PreTrainedModel) -> Head:
    """Return ``model``'s head with its own tensors, gathered if they are sharded."""
    config, layer = model.config.get_text_config(), model.get_output_embeddings()
    scale = 1.0
    for name, power in FACTORS.items():
        scale *= (getattr(config, name, None) or 1.0) ** power
    cap = next((value for name in CAPS if (value := getattr(config, name, None)) is not None), None)
    bias = getattr(layer, "bias", None)
    return Head(_whole(layer.weight), None if bias is None else _whole(bias), scale, cap)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
