"""LoRA's product and RMSNorm on a CPU: the values and gradients of peft and transformers, from fewer passes."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from sparsekv_pl.models.cpu_kernels import quicken


class Layer(nn.Module):
    """A norm and a projection, as in a decoder layer."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.norm = LlamaRMSNorm(24)
        self.q_proj = nn.Linear(24, 12, bias=bias)

    def forward(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.q_proj(self.norm(hidden))
        return output


def adapted(dtype: torch.dtype, bias: bool = False, **settings: Any) -> Any:
    """``Layer`` in ``dtype`` with a LoRA adapter in float32 whose second factor is not zero."""
    torch.manual_seed(0)
    layer = Layer(bias).to(dtype)
    layer.norm.weight.data.normal_()
    model = get_peft_model(layer, LoraConfig(r=4, target_modules=["q_proj"], **settings))  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.data = torch.randn_like(parameter.data, dtype=torch.float32)
    return model


def learnt(model: Any, rows: Tensor, bfloat16: bool) -> list[Tensor]:
    """Output, and gradients of input and adapter, of a weighted sum."""
    model.zero_grad()
    rows = rows.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        output = model(rows)
    (output.float() * torch.linspace(-1, 1, output.numel()).view(output.shape)).sum().backward()
    found = [output, rows.grad, *(p.grad for p in model.parameters() if p.requires_grad)]
    return [part.detach().clone().float() for part in found if part is not None]


def compare(model: Any, dtype: torch.dtype, tolerance: float) -> None:
    rows = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1)).to(dtype)
    reference = learnt(model, rows, dtype == torch.bfloat16)
    quick = deepcopy(model)
    quicken(quick)
    for mine, theirs in zip(learnt(quick, rows, dtype == torch.bfloat16), reference, strict=True):
        assert (mine - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
def test_values_and_gradients_are_those_of_peft_and_transformers(dtype: torch.dtype, tolerance: float) -> None:
    compare(adapted(dtype), dtype, tolerance)


def test_both_products_are_in_the_graph_and_a_copy_computes_with_its_own_weights() -> None:
    model = adapted(torch.float32)
    quicken(model)
    other = deepcopy(model)
    for parameter in other.parameters():
        parameter.data.zero_()
    rows = torch.randn(2, 5, 24, requires_grad=True)
    assert other(rows).abs().sum() == 0 < model(rows).abs().sum()
    graph, names = [model(rows).grad_fn], set()
    while graph:
        node = graph.pop()
        names.add(node.name())
        graph += [following for following, _ in node.next_functions if following is not None]
    assert {"_LoraProductBackward", "_FrozenNormBackward"} <= names and "PowBackward0" not in names


def off(model: Any) -> Any:
    return model.disable_adapter()


@pytest.mark.parametrize("case", ["dropout", "bias", "dora", "two adapters", "merged", "off", "trained norm"])
def test_every_other_case_is_left_to_peft_and_transformers(case: str) -> None:
    settings = {"dropout": {"lora_dropout": 0.5}, "dora": {"use_dora": True}}.get(case, {})
    model = adapted(torch.float32, bias=case == "bias", **settings)
    projection = next(module for module in model.modules() if isinstance(module, LoraLinear))
    if case == "two adapters":
        model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))  # type: ignore[arg-type]
        model.base_model.set_adapter(["default", "second"])
    if case == "merged":
        model.merge_adapter()
    if case == "trained norm":
        model.base_model.model.norm.weight.requires_grad_()
    quick = deepcopy(model)
    quicken(quick)
    rows = torch.randn(2, 5, 24, requires_grad=True)

    def run(which: Any) -> Tensor:
        torch.manual_seed(2)
        output: Tensor = which(rows)
        return output

    if case == "off":
        with model.disable_adapter(), quick.disable_adapter():
            torch.testing.assert_close(run(quick), run(model), rtol=0, atol=0)
        return
    torch.testing.assert_close(run(quick), run(model), rtol=1e-5, atol=1e-5)
    if case == "trained norm":
        run(quick).sum().backward()
        assert quick.base_model.model.norm.weight.grad is not None
    assert projection is not None


def test_the_embedded_kind_of_model_gets_them_when_it_is_loaded(tiny_backbone: Callable[..., Any]) -> None:
    model, _ = tiny_backbone("qwen3").load()
    quick = [module for module in model.modules() if "forward" in vars(module)]
    assert {type(module).__name__ for module in quick} == {"Qwen3RMSNorm", "Linear"}
