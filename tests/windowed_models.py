"""Random models some of whose layers have a window, no attention, or a state space beside it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from tests.architectures import architecture

WINDOW = 12
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "initializer_range": 0.2,
    "max_position_embeddings": 256,
}
SLIDING = {"sliding_window": WINDOW}
KINDS = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
GEMMA_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
MADE: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "gemma3": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(**SIZES | SLIDING, layer_types=KINDS, query_pre_attn_scalar=8, rope_parameters=GEMMA_ROPE)
    ),
    "qwen2": lambda: hf.Qwen2ForCausalLM(
        hf.Qwen2Config(**SIZES | SLIDING, use_sliding_window=True, max_window_layers=2)
    ),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**SIZES | SLIDING)),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**{k: v for k, v in SIZES.items() if k != "head_dim"} | SLIDING)),
    "llama4": lambda: hf.Llama4ForCausalLM(
        hf.Llama4TextConfig(
            **SIZES,
            num_local_experts=2,
            attention_chunk_size=WINDOW,
            layer_types=["chunked_attention", "full_attention"] * 2,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        )
    ),
    "lfm2": lambda: hf.Lfm2ForCausalLM(hf.Lfm2Config(**SIZES, layer_types=["conv", "full_attention"] * 2)),
    "qwen3-next": lambda: hf.Qwen3NextForCausalLM(
        hf.Qwen3NextConfig(
            **SIZES,
            layer_types=["linear_attention", "full_attention"] * 2,
            linear_num_key_heads=2,
            linear_num_value_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            mlp_only_layers=list(range(4)),
        )
    ),
    "falcon-h1": lambda: architecture("falcon_h1"),
}


def windowed_model(kind: str, seed: int = 0) -> hf.PreTrainedModel:
    """In float32, with norms away from 1 so that leaving one out would show."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = MADE[kind]().eval()
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def saved(kind: str, folder: Path, tokenizer: str) -> str:
    """Save a model with the words of another folder's ``tokenizer``, and that beside it; return the folder."""
    words = hf.AutoTokenizer.from_pretrained(tokenizer)
    model = windowed_model(kind)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.resize_token_embeddings(len(words), mean_resizing=False)
    for part in (model, words):
        part.save_pretrained(folder)
    return str(folder)


def ids(tokens: int, rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 60, (rows, tokens), generator=torch.Generator().manual_seed(seed))
