"""Let kvpress's presses that compute attention by themselves follow the model's own: its cap, sinks and scaling.

They compute the usual softmax of products times 1 / sqrt(D), see models/softmax_rule.py.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from kvpress import ExpectedAttentionPress
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from sparsekv_pl.models.layer_kinds import attentions, evicted_layers
from sparsekv_pl.models.softmax_rule import SoftmaxRule, rule_of, scaling_of, unusual
from sparsekv_pl.presses.shadowed_method import shadowed
from sparsekv_pl.presses.traits import PressTraits
from sparsekv_pl.presses.window_attention import window_attention

NODES, REACH = 161, 12.0
"""Points of the trapezoidal rule and how many standard deviations they reach: logits are exact to 1e-5 where the spread
is up to 2.5 times the cap, 2e-4 at 4 times it and 4e-3 at 8 times it (caps of 2 to 50)."""
KEYS = 4096
"""Keys that are integrated together."""


def check_rule(model: PreTrainedModel, traits: PressTraits) -> None:
    """Raise ``ValueError`` if a press of ``traits`` would score by another attention than ``model``'s."""
    why = _unusual(model)
    for part in traits.parts if why else ():
        if part.attends == "by itself" or (part.attends == "expected" and not _is_kvpress_score(part)):
            raise ValueError(
                f"{part.name} computes attention by itself, as the usual softmax of products times 1 / sqrt(D), and "
                f"{type(model).__name__} {why}: take a press that reads no attention (KeyDiffPress) or "
                "that follows the model's here (SnapKVPress, TOVAPress, ExpectedAttentionPress)"
            )


@contextmanager
def scores_by_rule(model: PreTrainedModel, traits: PressTraits) -> Iterator[None]:
    """Let the presses of ``traits`` score by ``model``'s own attention inside the block; classes do not change.

    Nothing changes on a model with the usual attention.
    """
    with ExitStack() as stack:
        parts = {id(part.press): part for part in traits.parts} if _unusual(model) else {}
        for part in parts.values():
            if part.attends == "window":
                stack.enter_context(shadowed(part.press, "score", partial(_by_window, part)))
            if part.attends == "expected":
                stack.enter_context(shadowed(part.press, "score", partial(_expected, part.press)))
        yield


def _unusual(model: PreTrainedModel) -> str:
    modules = attentions(model)
    return next(
        filter(None, (unusual(modules[layer]) for layer in evicted_layers(model.config) if layer in modules)), ""
    )


def _is_kvpress_score(part: PressTraits) -> bool:
    return type(part.press).score is ExpectedAttentionPress.score


def _by_window(
    part: PressTraits,
    score: Callable[..., Tensor],
    module: nn.Module,
    hidden_states: Tensor,
    keys: Tensor,
    values: Tensor,
    attentions: Tensor | None,  # noqa: ARG001
    kwargs: dict[str, Any],
) -> Tensor:
    """Score with the model's attention of the last queries, as kvpress does with weights that a model returns."""
    rows = window_attention(module, hidden_states, keys, kwargs, max(1, part.window)).to(keys.dtype)
    return score(module, hidden_states, keys, values, rows, kwargs)


def _expected(
    press: ExpectedAttentionPress,
    score: Callable[..., Tensor],  # noqa: ARG001
    module: nn.Module,
    hidden_states: Tensor,
    keys: Tensor,
    values: Tensor,
    attentions: Tensor | None,  # noqa: ARG001
    kwargs: dict[str, Any],  # noqa: ARG001
) -> Tensor:
    """Score as ExpectedAttentionPress does, (B, K, S), with the expectation under the module's rule and scaling.

    A query is Gaussian, so its scaled product with a key is, too: mean m, variance v. kvpress's logit m + v / 2 is the
    logarithm of the expected exponential. With a cap that expectation is a quadrature over ``NODES`` points.
    """
    mean, covariance = press.get_query_statistics(module, hidden_states)  # (B or 1, H, D), (B or 1, H, D, D)
    later, scaling, rule = keys[:, :, press.n_sink :], scaling_of(module), rule_of(module)
    groups = mean.shape[1] // keys.shape[1]
    exact = torch.promote_types(keys.dtype, torch.float32)
    with torch.autocast(keys.device.type, enabled=False):
        repeated = later.repeat_interleave(groups, dim=1).to(exact)
        products = (repeated @ mean.to(exact)[..., None]).squeeze(-1) * scaling
        spread = None
        if press.use_covariance:
            spread = ((repeated @ covariance.to(exact)) * repeated).sum(-1) * scaling**2
        weights = rule.weights(_log_expected(rule, products, spread)[:, :, None]).squeeze(2)
    scores = weights.unflatten(1, (keys.shape[1], groups)).mean(2)
    if press.use_vnorm:
        scores = (scores + press.epsilon) * values[:, :, press.n_sink :].norm(dim=-1)
    pinned = scores.detach().max() + 1
    return torch.cat([pinned.expand(*scores.shape[:2], press.n_sink), scores], dim=-1)


def _log_expected(rule: SoftmaxRule, mean: Tensor, variance: Tensor | None) -> Tensor:
    """Return the logarithm of the expected exponential of a product's logit, all of one shape."""
    if variance is None:
        return rule.logits(mean)
    if rule.cap is None:
        return mean + variance / 2
    spread = variance.clamp(min=torch.finfo(variance.dtype).tiny).sqrt()  # at 0 the root's gradient is infinite
    parts = zip(mean.split(KEYS, dim=-1), spread.split(KEYS, dim=-1), strict=True)
    return torch.cat([checkpoint(_integrated, rule, *part, use_reentrant=False) for part in parts], dim=-1)


def _integrated(rule: SoftmaxRule, mean: Tensor, spread: Tensor) -> Tensor:
    """Integrate over Gaussian products (B, H, S); backward computes the ``NODES`` times as many numbers again."""
    points = torch.linspace(-REACH, REACH, NODES, dtype=mean.dtype, device=mean.device)[:, None, None, None]
    shares = (-points.square() / 2).log_softmax(0)
    return (rule.logits(mean + spread * points) + shares).logsumexp(0)
