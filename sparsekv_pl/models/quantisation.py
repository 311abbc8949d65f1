"""4-bit quantisation, and the size of a checkpoint's weights in memory before it is loaded."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

ABSMAX_BLOCK = 256
"""Number of scales per second-level block of double quantisation (https://arxiv.org/abs/2305.14314, section 3)."""


def four_bit(config: PreTrainedConfig, dtype: torch.dtype, trust_remote_code: bool = False) -> BitsAndBytesConfig:
    """Return the NF4 config (with double quantisation) for the model of ``config``, computing in ``dtype``."""
    model = skeleton(config, dtype, trust_remote_code=trust_remote_code)
    # Llama 4's router is a Linear that returns two values: bitsandbytes would replace it by one with a single value.
    routers = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and "Router" in type(m).__name__]
    skipped = None
    if routers:
        from transformers.quantizers.base import get_keys_to_not_convert

        skipped = [*get_keys_to_not_convert(model), *routers]
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skipped,
    )


def skeleton(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    quantisation: BitsAndBytesConfig | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Build the causal LM of ``config`` on the meta device: all modules, no memory.

    Linear layers are replaced as in loading a checkpoint: with ``quantisation``, or with the checkpoint's own if
    bitsandbytes quantised it. Other quantised checkpoints are treated as unquantised. Raises ``ValueError`` for an
    architecture without a causal LM, or one that needs remote code without ``trust_remote_code``.
    """
    stored = stored_quantisation(config)
    known: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if known is not None and known.config_class == config.sub_configs.get("text_config"):
        config = config.get_text_config()  # AutoModelForCausalLM loads only the text model of a multimodal checkpoint
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    method = str(stored.get("quant_method", "")).rsplit(".", 1)[-1].lower()
    if quantisation is not None or method.startswith("bits"):
        from transformers.quantizers.auto import AutoHfQuantizer

        quantiser = AutoHfQuantizer.from_config(quantisation or stored, pre_quantized=quantisation is None)
        quantiser.preprocess_model(model=model, device_map=None)
    return model


def stored_quantisation(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the quantisation config of the checkpoint of ``config``; empty if it is not quantised."""
    parts = (config, config.get_text_config())
    stored: Any = next(filter(None, (getattr(part, "quantization_config", None) for part in parts)), {})
    return stored if isinstance(stored, dict) else stored.to_dict()


def weight_bytes(module: nn.Module) -> int:
    """Return the bytes of ``module``'s parameters and buffers in memory, tied ones once; meta tensors count too."""
    packed = {id(weight): layer for layer, weight in _packed(module)}
    tensors: dict[int, Tensor] = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return sum(_nf4_bytes(packed[k]) if k in packed else t.numel() * t.element_size() for k, t in tensors.items())


def parameter_count(module: nn.Module) -> int:
    """Return the number of parameters of ``module``, tied ones once; 4-bit weights count unpacked."""
    packed = {id(weight): layer for layer, weight in _packed(module)}
    tensors = {id(p): p for p in module.parameters()}
    return sum(_numbers(packed[k]) if k in packed else p.numel() for k, p in tensors.items())


def fused_expert_bytes(module: nn.Module) -> int:
    """Return the bytes of experts fused in one 3-D parameter, which bitsandbytes does not quantise."""
    return sum(p.numel() * p.element_size() for p in module.parameters() if p.ndim == 3)


def keep_unpacked(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights for AVX512 in evaluation, after which gradients are wrong."""
    for layer, _ in _packed(model):
        layer.support_avx512bf16_for_cpu = False


def _packed(module: nn.Module) -> Iterator[tuple[Any, Tensor]]:
    """Yield the 4-bit layers of ``module`` and their weights."""
    if getattr(module, "is_loaded_in_4bit", False) or any(type(m).__name__ == "Linear4bit" for m in module.modules()):
        from bitsandbytes.nn import Linear4bit

        yield from ((m, m.weight) for m in module.modules() if isinstance(m, Linear4bit))


def _numbers(layer: Any) -> int:
    return layer.in_features * layer.out_features


def _nf4_bytes(layer: Any) -> int:
    """Return a layer's bytes: two weights per byte, a scale per block; double quantisation also packs the scales."""
    numbers, block = _numbers(layer), layer.weight.blocksize
    scales = -(-numbers // block)
    code = 16 * 4
    if not layer.weight.compress_statistics:
        return -(-numbers // 2) + 4 * scales + code
    offset = 4
    return -(-numbers // 2) + scales + 4 * -(-scales // ABSMAX_BLOCK) + offset + code
