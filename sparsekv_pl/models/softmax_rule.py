"""Softmax rules: what a model does between the products of queries and keys and its attention weights.

Gemma 2 caps the products (https://arxiv.org/abs/2408.00118, section 2). GPT-OSS has learnt sinks: one logit per head
that takes a share of the softmax and has no value (https://arxiv.org/abs/2309.17453).
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class SoftmaxRule(NamedTuple):
    """Weights are the softmax over the logits ``cap * tanh(products / cap)`` and, if there is one, the head's sink."""

    cap: float | None = None
    sinks: Tensor | None = None
    """(H,), logits; they take a share of the softmax, so that the weights of the keys sum to less than 1."""

    @property
    def plain(self) -> bool:
        """Whether this is the usual softmax."""
        return self.cap is None and self.sinks is None

    def logits(self, products: Tensor) -> Tensor:
        """Cap scaled dot products."""
        return products if self.cap is None else (products / self.cap).tanh() * self.cap

    def weights(self, logits: Tensor) -> Tensor:
        """Normalise logits (B, H, T, S), -inf where hidden, to weights of the same shape."""
        if self.sinks is None:
            return logits.softmax(-1)
        sinks = self.sinks.to(logits.dtype)[:, None, None].expand(*logits.shape[:-1], 1)
        return torch.cat([logits, sinks], dim=-1).softmax(-1)[..., :-1]


PLAIN = SoftmaxRule()


class KnowsRules:
    """The base of observers (evicted_attention.py) that take a layer's ``SoftmaxRule`` as a fifth argument."""


def rule_of(module: nn.Module) -> SoftmaxRule:
    """Return the rule of an attention layer."""
    cap: Any = getattr(module, "attn_logit_softcapping", None)
    sinks: Any = getattr(module, "sinks", None)
    return SoftmaxRule(cap, sinks)


def scaling_of(module: nn.Module) -> float:
    """Return the factor of an attention layer's products of queries and keys."""
    dim: Any = module.head_dim
    return float(getattr(module, "scaling", dim**-0.5))


def unusual(module: nn.Module) -> str:
    """Describe in a few words how a layer's attention differs from the usual softmax; empty if it does not."""
    described = _described(rule_of(module))
    dim: Any = module.head_dim
    if described or math.isclose(scaling_of(module), dim**-0.5, rel_tol=1e-6):
        return described
    return f"multiplies the products of queries and keys by {scaling_of(module):.4g}, not by 1 / sqrt({dim})"


def check_plain(rule: SoftmaxRule, what: str) -> None:
    """Raise ``ValueError`` if ``what`` would be computed under another rule than the usual softmax."""
    if not rule.plain:
        raise ValueError(
            f"{what} is computed under the usual softmax, and this model {_described(rule)}: use another model, or an "
            "analysis that knows them (attention statistics, anchors, oracle blocks)"
        )


def _described(rule: SoftmaxRule) -> str:
    if rule.cap is not None:
        return "caps the products of queries and keys"
    return "" if rule.sinks is None else "has learnt attention sinks"
