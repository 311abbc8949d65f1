"""The public shapes of two models of 8 billion parameters, whole or smaller."""

from typing import Any

from transformers import LlamaConfig, PreTrainedConfig, Qwen3Config

QWEN3_8B: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
}
LLAMA31_8B = QWEN3_8B | {
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}
EIGHTH = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 64,
}


def shape(kind: str, layers: int | None = None, **settings: Any) -> PreTrainedConfig:
    """Qwen3-8B's or Llama-3.1-8B's shape with ``layers`` layers and other ``settings``."""
    made, public = (Qwen3Config, QWEN3_8B) if kind == "qwen3" else (LlamaConfig, LLAMA31_8B)
    fewer = {} if layers is None else {"num_hidden_layers": layers}
    return made(**(public | fewer | settings), pad_token_id=0, bos_token_id=0, eos_token_id=0)
