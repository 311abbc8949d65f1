"""Random models of every architecture, built in memory."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

Build = Callable[..., PreTrainedModel]

KINDS: dict[str, Any] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "phi3": (Phi3Config, Phi3ForCausalLM),
}


def random_model(kind: str, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """In float32: two layers, 4 query and 2 KV heads of 8, vocabulary 64, unless the settings say otherwise."""
    config_class, model_class = KINDS[kind]
    defaults: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
        **({"pad_token_id": 0} if kind == "phi3" else {"head_dim": 8}),
    }
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model: PreTrainedModel = model_class(config_class(**(defaults | settings))).eval()
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:  # norms of 1 make all keys of Qwen3 equally long, and scores tie
                parameter.uniform_(0.5, 1.5)
    return model
