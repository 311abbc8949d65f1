"""Helpers for the tests of the planner."""

from typing import Any

import torch
from transformers import (
    Llama4Config,
    Llama4TextConfig,
)


def scout(layers: int = 48) -> Llama4Config:
    """Llama-4-Scout-17B-16E as its config.json describes it; transformers' own defaults are not relied on."""
    text = {
        "vocab_size": 202048,
        "hidden_size": 5120,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "num_hidden_layers": layers,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_local_experts": 16,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
        "no_rope_layer_interval": 4,
        "attention_chunk_size": 8192,
        "max_position_embeddings": 10_485_760,
        "tie_word_embeddings": False,
    }
    return Llama4Config(text_config=text)


def tiny_llama4() -> Llama4TextConfig:
    return Llama4TextConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        attention_chunk_size=32,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )


def cache_bytes(cache: Any) -> int:
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def loaded_bytes(model: torch.nn.Module) -> int:
    """Sum the bytes of every storage of the loaded model, including quantisation states, once each."""
    tensors = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            tensors += [state.absmax, state.code, state.offset, state.state2.absmax]  # state2.code: one for all layers
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def random_ids(rows: int, tokens: int) -> torch.Tensor:
    return torch.randint(0, 100, (rows, tokens), generator=torch.Generator().manual_seed(0))
