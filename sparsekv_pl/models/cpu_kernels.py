"""LoRA's product and RMSNorm on a CPU, in fewer passes over memory than with peft, transformers and autograd.

Both replace the forward of module instances, and call the class's forward in all but the standard case.
"""

from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.phi3.modeling_phi3 import Phi3RMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

NORMS = (LlamaRMSNorm, MistralRMSNorm, Phi3RMSNorm, Qwen2RMSNorm, Qwen3RMSNorm)
"""Classes (not their subclasses) that compute weight * x / rms(x), with the root mean square in float32."""


def quicken(model: nn.Module) -> None:
    """Replace the forwards of ``model``'s norms and LoRA projections by the faster ones below."""
    for module in model.modules():
        if type(module) in NORMS:
            vars(module)["forward"] = MethodType(_norm, module)
        elif type(module) is LoraLinear and type(module.get_base_layer()) is nn.Linear:
            vars(module)["forward"] = MethodType(_project, module)


def _norm(module: Any, hidden: Tensor) -> Tensor:
    """Normalise with the class's forward, or faster on a CPU if only ``hidden`` needs a gradient."""
    plain = hidden.device.type == "cpu" and torch.is_grad_enabled()
    if not plain or not hidden.requires_grad or module.weight.requires_grad:
        output: Tensor = type(module).forward(module, hidden)
        return output
    normed: Tensor = _FrozenNorm.apply(hidden, module.weight, module.variance_epsilon)
    return normed


def _project(module: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Project with the class's forward, or faster on a CPU with one standard adapter."""
    adapters = module.active_adapters
    plain = hidden.device.type == "cpu" and not (args or kwargs or module.disable_adapters or module.merged)
    base = module.get_base_layer()
    if not plain or len(adapters) != 1 or adapters[0] not in module.lora_A or adapters[0] in module.lora_variant:
        return type(module).forward(module, hidden, *args, **kwargs)
    (name,) = adapters
    down, up = module.lora_A[name], module.lora_B[name]
    active_dropout = module.training and not isinstance(module.lora_dropout[name], nn.Identity)
    if active_dropout or base.weight.requires_grad or base.bias is not None or up.bias is not None:
        return type(module).forward(module, hidden)
    autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast else hidden.dtype
    if not autocast and not (hidden.dtype == base.weight.dtype == down.weight.dtype):
        return type(module).forward(module, hidden)
    with torch.autocast("cpu", enabled=False):
        output: Tensor = _LoraProduct.apply(
            hidden.to(dtype), base.weight.to(dtype), down.weight, up.weight, module.scaling[name]
        )
    return output


class _FrozenNorm(torch.autograd.Function):
    """RMSNorm (https://arxiv.org/abs/1910.07467) of (..., E) that saves only its input and one number per row."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = hidden.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(hidden, weight, scale)
        return weight * (wide * scale).to(hidden.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        hidden, weight, scale = ctx.saved_tensors
        wide, grad = hidden.float(), (grad * weight).float()
        along = (grad * wide).sum(-1, keepdim=True).mul_(scale.pow(3)).div_(-hidden.shape[-1])
        return grad.mul_(scale).addcmul_(wide, along).to(hidden.dtype), None, None


class _LoraProduct(torch.autograd.Function):
    """x W' + scaling (x A') B' for a frozen W, accumulated inside the products; x and W have the same dtype."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, base: Tensor, down: Tensor, up: Tensor, scaling: float) -> Tensor:
        rows = hidden.reshape(-1, hidden.shape[-1])
        inner = rows @ down.to(rows.dtype).T
        output = (rows @ base.T).addmm_(inner, up.to(rows.dtype).T, alpha=scaling)
        ctx.save_for_backward(rows, inner, base, down, up)
        ctx.scaling, ctx.shape = scaling, hidden.shape
        return output.view(*hidden.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor, Tensor, None]:
        rows, inner, base, down, up = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        grad_inner = (grad @ up.to(grad.dtype)).mul_(ctx.scaling)
        grad_hidden = None
        if ctx.needs_input_grad[0]:
            grad_hidden = (grad @ base).addmm_(grad_inner, down.to(grad.dtype)).view(ctx.shape)
        grad_down = (grad_inner.T @ rows).to(down.dtype)
        grad_up = (grad.T @ inner).to(up.dtype).mul_(ctx.scaling)
        return grad_hidden, None, grad_down, grad_up, None
