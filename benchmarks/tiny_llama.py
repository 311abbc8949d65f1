"""Small random Llamas for checks that need a model's files and nothing of what it has learnt."""

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar


def save_llama(
    folder: Path, tokenizer: PreTrainedTokenizerBase, layers: int, width: int, heads: tuple[int, int], **settings: Any
) -> None:
    """Save a model, the same each time, with its tokenizer. ``heads``: of queries, and of keys and values."""
    disable_progress_bar()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        **settings,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
