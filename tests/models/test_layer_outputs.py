"""The results of layer_outputs against transformers' hidden states and the attention's output in a layer."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsekv_pl.models.layer_outputs import LayerOutput, layer_outputs
from tests.random_models import Build

KINDS = pytest.mark.parametrize("kind", ["hidden", "attention"])


def ids(seed: int = 0) -> Tensor:
    return torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(seed))


def hooks_on(model: PreTrainedModel) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_hidden_is_the_residual_stream_after_each_layer(random_model: Build) -> None:
    model = random_model(num_hidden_layers=3)
    with layer_outputs(model, "hidden") as outputs:
        expected = model.model(input_ids=ids(), output_hidden_states=True).hidden_states
    assert sorted(outputs) == [0, 1, 2]
    for layer in (0, 1):
        assert torch.equal(outputs[layer], expected[layer + 1])
    assert torch.equal(model.model.norm(outputs[2]), expected[3])  # transformers gives the last one after its norm


@pytest.mark.parametrize("random_model", ["llama", "qwen3"], indirect=True)
def test_attention_is_what_the_layer_adds_to_the_residual_stream(random_model: Build) -> None:
    model = random_model()
    sums: list[Tensor] = []
    for layer in model.model.layers:
        layer.post_attention_layernorm.register_forward_pre_hook(lambda _, args: sums.append(args[0]))
    with layer_outputs(model, "attention") as outputs:
        before = model.model(input_ids=ids(), output_hidden_states=True).hidden_states
    for layer in (0, 1):
        torch.testing.assert_close(before[layer] + outputs[layer], sums[layer], rtol=0, atol=0)


@KINDS
def test_the_last_forward_counts_and_the_hooks_go(kind: LayerOutput, random_model: Build) -> None:
    model = random_model()
    assert hooks_on(model) == 0
    with layer_outputs(model, kind) as alone:
        model.model(input_ids=ids(1)[:, :5])
    with layer_outputs(model, kind) as outputs:
        model.model(input_ids=ids(0))
        model.model(input_ids=ids(1)[:, :5])
    assert all(torch.equal(outputs[layer], alone[layer]) for layer in (0, 1))
    with pytest.raises(RuntimeError, match="stop"), layer_outputs(model, kind):
        assert hooks_on(model) == 2
        raise RuntimeError("stop")
    assert hooks_on(model) == 0


@KINDS
@pytest.mark.parametrize("last", [1, 5, 12, 40])
def test_the_newest_tokens_alone_take_no_memory_for_the_others(
    kind: LayerOutput, last: int, random_model: Build
) -> None:
    model = random_model()
    with layer_outputs(model, kind) as everything, layer_outputs(model, kind, last) as outputs:
        model.model(input_ids=ids())
    for layer in (0, 1):
        assert torch.equal(outputs[layer], everything[layer][:, -last:])
        assert outputs[layer].untyped_storage().nbytes() == 2 * min(last, 12) * 32 * 4


@KINDS
@pytest.mark.parametrize("last", [None, 5])
def test_gradients_flow_through_what_is_collected(kind: LayerOutput, last: int | None, random_model: Build) -> None:
    model = random_model()
    with layer_outputs(model, kind, last) as outputs:
        model.model(input_ids=ids())
    outputs[1][:, -5:].square().sum().backward()
    assert all(layer.self_attn.v_proj.weight.grad.abs().sum() > 0 for layer in model.model.layers)
    assert model.model.norm.weight.grad is None
