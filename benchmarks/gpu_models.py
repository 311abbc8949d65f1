"""Random Llama models, batches and students for gpu_parts.py, without downloads."""

from pathlib import Path
from typing import Any

import torch
from kvpress import ExpectedAttentionPress, KnormPress
from transformers import LlamaConfig, LlamaForCausalLM

from sparsekv_pl.eviction import Eviction
from sparsekv_pl.eviction.dropout import KVDropout
from sparsekv_pl.eviction.real import RealEviction
from sparsekv_pl.models.anchors import Anchors, AnchorTable
from sparsekv_pl.models.batch import IGNORE, Batch, Supervised
from sparsekv_pl.models.lora import Lora, inject_lora
from sparsekv_pl.objectives import EIT, Mixed, Objective, SelectionObjective
from sparsekv_pl.presses import BlockDropoutPress
from sparsekv_pl.training.student import Student
from sparsekv_pl.training.teacher import Teacher

Shape = dict[str, Any]
BILLION: Shape = {
    "vocab_size": 128_256,
    "hidden_size": 2_048,
    "intermediate_size": 8_192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "tie_word_embeddings": True,
}
"""Sizes of Llama 3.2 1B."""
TINY: Shape = {
    "vocab_size": 1_024,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1_024,
    "tie_word_embeddings": True,
}


def random_model(shape: Shape, device: str, lora: bool = True) -> Any:
    """A model with random weights, in bfloat16 on a GPU, and a trainable new adapter unless ``lora`` is false."""
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**shape)).to(torch.bfloat16 if device == "cuda" else torch.float32)
    return inject_lora(model, Lora()).to(device).train() if lora else model


def saved(folder: Path, shape: Shape) -> str:
    """Save a random model and a byte-level tokenizer to ``folder``, and return it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**shape)).to(torch.bfloat16).save_pretrained(folder)
    letters = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    raw = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(letters[:2])
    words = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    words.save_pretrained(folder)
    return str(folder)


def batch_of(tokens: int, context: int, device: str) -> Batch:
    """One row of random ids; the continuation is supervised except for its first token."""
    ids = torch.randint(2, 1_000, (1, tokens), generator=torch.Generator().manual_seed(0))
    labels = ids[:, context:].clone()
    labels[:, 0] = IGNORE
    columns, counts = Supervised.of(labels)
    return Batch(
        context_ids=ids[:, :context].to(device),
        continuation_ids=ids[:, context:].to(device),
        labels=labels.to(device),
        supervised=Supervised(columns.to(device), counts),
        document_ids=["random"],
        tasks=["text"],
    )


def student_of(model: Any, kind: str) -> Student:
    """A student: ``selection`` has ExpectedAttention and both losses; the other kinds name an eviction and have EIT."""
    objective: Objective = Mixed([EIT(), SelectionObjective()]) if kind == "selection" else EIT()
    evictions: dict[str, Eviction] = {
        "selection": RealEviction(ExpectedAttentionPress()),
        "kv_dropout": KVDropout(Anchors(recent=16, special=False, punctuation=False)),
        "blocks": RealEviction(BlockDropoutPress(block_size=16, protect_recent=16)),
        "nothing": RealEviction(KnormPress()),
    }
    eviction = evictions[kind]
    if isinstance(eviction, KVDropout):
        vocabulary = model.config.vocab_size
        device = next(model.parameters()).device
        eviction.tokenizer = AnchorTable(*torch.zeros(2, vocabulary, dtype=torch.bool, device=device))
    return Student(model, eviction, Teacher(model), objective)
