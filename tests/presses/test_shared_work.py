"""Within one prefill, scorers reuse results of layers and of other scorers: fewer products, equal scores."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from kvpress import BasePress, ExpectedAttentionPress, ScorerPress, SnapKVPress, TOVAPress
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from sparsekv_pl.eviction.prefill import continue_from
from sparsekv_pl.models.backbone import causal_lm
from sparsekv_pl.models.decoder import decoder_of
from sparsekv_pl.presses.caught_scores import catch_scores
from sparsekv_pl.presses.shadowed_method import shadowed
from sparsekv_pl.presses.shared_work import shared_work
from sparsekv_pl.presses.traits import traits_of

IDS = torch.randint(5, 1000, (2, 48), generator=torch.Generator().manual_seed(0))
PRESSES = [ExpectedAttentionPress(0.5), SnapKVPress(0.5, window_size=8), TOVAPress(0.5)]


@pytest.fixture(scope="module")
def model(tiny_backbone: Callable[..., Any]) -> Any:
    found, _ = tiny_backbone("llama").load()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in found.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1, generator=generator)
    return found


@contextmanager
def projected(model: PreTrainedModel) -> Iterator[list[int]]:
    """Record the rows whose queries the layers really projected."""
    rows: list[int] = []

    def count(original: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        rows.append(hidden.shape[1])
        return original(hidden)

    with ExitStack() as stack:
        for layer in decoder_of(model).layers:
            stack.enter_context(shadowed(layer.self_attn.q_proj, "forward", count))
        yield rows


def run(model: PreTrainedModel, press: BasePress, shared: bool) -> tuple[list[Tensor], list[Tensor], DynamicCache]:
    """Scores by layer, gradients of their weighted sum, and the cache, of one prefill under kvpress's own hook."""
    model.zero_grad()
    cache = DynamicCache()
    sharing = shared_work(model, traits_of(press)) if shared else nullcontext()
    with catch_scores(press) as caught, sharing, press(model):
        continue_from(model, IDS, cache, 0)
    scores = [one.scores for one in caught]
    weights = torch.linspace(-1, 1, IDS.shape[1])
    torch.stack([(one * weights).sum() for one in scores]).sum().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return scores, gradients, cache


@pytest.mark.parametrize("press", PRESSES, ids=lambda press: type(press).__name__)
def test_scores_gradients_and_kept_pairs_are_those_of_kvpress_alone(model: Any, press: ScorerPress) -> None:
    ours, theirs = (run(causal_lm(model), press, shared) for shared in (True, False))
    for mine, reference in zip(ours[0] + ours[1], theirs[0] + theirs[1], strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-5)
    for mine, reference in zip(ours[2].layers, theirs[2].layers, strict=True):
        torch.testing.assert_close(mine.keys, reference.keys)
    assert any(gradient.abs().sum() > 0 for gradient in ours[1])


@pytest.mark.parametrize("press", PRESSES, ids=lambda press: type(press).__name__)
def test_queries_are_projected_once_a_layer(model: Any, press: ScorerPress) -> None:
    network = causal_lm(model)
    with projected(network) as rows:
        run(network, press, shared=True)
    assert rows == [IDS.shape[1]] * 2


def test_the_mean_rotation_is_computed_once_for_all_layers(model: Any) -> None:
    network, calls = causal_lm(model), list[int]()
    rotary = decoder_of(network).rotary_emb
    hook = rotary.register_forward_hook(lambda *_: calls.append(1))
    run(network, ExpectedAttentionPress(0.5), shared=True)
    hook.remove()
    assert len(calls) == 2, "one for the model, one for the press"


def test_other_hidden_states_are_projected(model: Any) -> None:
    """The same layer's, but not a view of what it has just seen; and what it has seen, after a write."""
    network = causal_lm(model)
    projection = decoder_of(network).layers[0].self_attn.q_proj
    hidden, forward = torch.randn(2, 6, 64), projection.forward
    with torch.no_grad(), shared_work(network, traits_of(SnapKVPress())):
        first = projection(hidden)
        assert projection(hidden[:, 2:]).data_ptr() == first[:, 2:].data_ptr()
        other = hidden[:, 2:].clone().mul_(2)
        torch.testing.assert_close(projection(other), 2 * first[:, 2:])
        projection(hidden)
        torch.testing.assert_close(projection(hidden.mul_(2)), 2 * first)
    assert projection.forward == forward
