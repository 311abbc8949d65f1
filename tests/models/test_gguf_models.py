"""Whole models from GGUF files: the same logits as before, RoPE's scaling, ends of a text, the licence."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from sparsekv_pl.models.backbone import Backbone
from sparsekv_pl.models.base_model import base_record
from sparsekv_pl.models.chat_frame import chat_frame
from sparsekv_pl.models.gguf_checkpoint import convert
from sparsekv_pl.models.stop_tokens import stop_ids
from tests.models.gguf_cases import (
    byte_level_pieces,
    scored_pieces,
    settings_of,
    tensors_of,
    write_gguf,
)

MERGES = ["t h", "Ġ th", "th e"]
SPECIAL = ["<bos>", "<eos>", "<turn>"]
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
BUILDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM, {"num_hidden_layers": 6, "sliding_window": 8}),
    "llama": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
}


def gguf_of(kind: str, folder: Path, **changed: Any) -> tuple[Path, PreTrainedModel]:
    """Write a random model of ``kind`` with its vocabulary; ``changed`` fields replace its own."""
    scored = kind == "gemma3"
    pieces = scored_pieces("the cat") if scored else byte_level_pieces(MERGES, [], SPECIAL)
    config_class, model_class, settings = BUILDS[kind]
    config = config_class(
        **{
            "vocab_size": len(pieces),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "initializer_range": 0.2,
            "max_position_embeddings": 64,
        }
        | ({} if kind != "qwen2" else {"head_dim": 8})
        | settings
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config).eval()
    tensors = tensors_of(model, kind)
    if kind == "llama":
        scaled = model.model.rotary_emb.inv_freq.numpy()
        plain = LLAMA3_ROPE["rope_theta"] ** -(np.arange(0, 16, 2) / 16)  # type: ignore[operator]
        tensors["rope_freqs.weight"] = (plain / scaled).astype(np.float32)
        tensors |= changed.pop("tensors", {})
    pre = {"llama": {"tokenizer__ggml__pre": "llama-bpe"}, "qwen2": {"tokenizer__ggml__pre": "qwen2"}}.get(kind, {})
    fields = {
        "general__name": "tiny",
        "general__license": "gemma",
        "bos": "<bos>",
        "eos": "<eos>",
        **({"unknown": "<unk>", "tokenizer__ggml__add_space_prefix": False} if scored else {"eot": "<turn>"}),
        **({"llama__rope__dimension_count": 16, "llama__attention__key_length": 16} if kind == "llama" else {}),
    }
    path = write_gguf(
        folder / f"{kind}.gguf",
        pieces,
        "llama" if scored else "gpt2",
        changed.pop("architecture", kind),
        merges=None if scored else MERGES,
        tensors=tensors,
        **pre,
        **fields,
        **settings_of(model, kind),
        **changed,
    )
    return path, model


@pytest.mark.parametrize("kind", BUILDS)
def test_a_model_from_a_file_computes_as_before(kind: str, tmp_path: Path) -> None:
    path, model = gguf_of(kind, tmp_path)
    backbone = Backbone(str(path), dtype="float32", lora=None, cache_dir=str(tmp_path / "cache"))
    loaded, tokenizer = backbone.load(trainable=False)
    ids = torch.tensor([tokenizer.encode("the cat the cat the cat that at the cat")])
    assert ids.shape[1] > 12  # beyond the window of Gemma
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    assert base_record(backbone)["base_licence"] == "gemma"
    prefix, suffix = chat_frame(tokenizer)
    assert (prefix, suffix) == ("" if kind == "qwen2" else "<bos>", "\n")
    ends = {"<eos>"} if kind == "gemma3" else {"<eos>", "<turn>"}
    assert stop_ids(loaded, tokenizer) == set(tokenizer.convert_tokens_to_ids(sorted(ends)))


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "linear": ("gemma3", {"gemma3__rope__scaling__factor": 8.0}, "scales RoPE by linear, factor 8.0"),
    "yarn": ("qwen2", {"qwen2__rope__scaling__type": "yarn"}, "scales RoPE by yarn, factor None"),
    "architecture": ("qwen2", {"architecture": "qwen9"}, "holds a model of architecture 'qwen9'"),
    "other factors": (
        "llama",
        {"tensors": {"rope_freqs.weight": np.linspace(1, 32, 8, dtype=np.float32)}},
        "scales RoPE by factors that are not Llama 3.1's",
    ),
}


@pytest.mark.parametrize("fault", WRONG)
def test_what_is_not_carried_over_is_refused(fault: str, tmp_path: Path) -> None:
    kind, changed, said = WRONG[fault]
    path, _ = gguf_of(kind, tmp_path, **changed)
    with pytest.raises(ValueError, match=rf"^{kind}.gguf {said}.*give that folder") as refused:
        convert(path, tmp_path / "cache")
    assert "\n" not in str(refused.value)
    assert not list((tmp_path / "cache").glob("[!.]*"))
