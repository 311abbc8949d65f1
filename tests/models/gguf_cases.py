"""Tiny GGUF files, written with the gguf package: vocabularies of every kind, and whole models."""

from pathlib import Path
from typing import Any

import numpy as np
from gguf import MODEL_ARCH, GGUFWriter, get_tensor_name_map
from transformers import PreTrainedModel

from sparsekv_pl.models.gguf_tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED

ADD = {bool: "add_bool", int: "add_uint32", float: "add_float32", str: "add_string"}
ROLES = ("bos", "eos", "unknown", "padding", "eot")


def write_gguf(
    path: Path,
    pieces: list[tuple[str, float, int]],
    family: str = "llama",
    architecture: str = "llama",
    merges: list[str] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    **fields: Any,
) -> Path:
    """Write a vocabulary of (text, score, token type) and ``fields``: numbers, strings and truths by their names.

    ``bos="<s>"`` names a special token by its text; underscores in other names stand for dots where they are double.
    """
    writer = GGUFWriter(path, architecture)
    writer.add_tokenizer_model(family)
    writer.add_token_list([text for text, _, _ in pieces])
    writer.add_token_scores([score for _, score, _ in pieces])
    writer.add_token_types([kind for _, _, kind in pieces])
    if merges is not None:
        writer.add_token_merges(merges)
    texts = [text for text, _, _ in pieces]
    for name, value in fields.items():
        key = name.replace("__", ".")
        if name in ROLES:
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", texts.index(value))
        else:
            getattr(writer, ADD[type(value)])(key, value)
    for name, values in (tensors or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def scored_pieces(text: str, seed: int = 0, with_bytes: bool = True) -> list[tuple[str, float, int]]:
    """A vocabulary as Gemma's: special tokens, bytes, runs of line ends, and pieces of ``text`` with random scores."""
    text = text.replace(" ", "▁").replace("\n", "")
    pieces = [(name, -1000.0, CONTROL) for name in ("<pad>", "<eos>", "<bos>")] + [("<unk>", -1000.0, UNKNOWN)]
    pieces += [(f"<0x{byte:02X}>", -1000.0, BYTE) for byte in range(256)] if with_bytes else []
    pieces += [("\n" * count, -1000.0, USER_DEFINED) for count in (1, 2, 3)] + [("  ", -1000.0, USER_DEFINED)]
    parts = sorted({text[at : at + size] for at in range(len(text)) for size in (1, 2, 3, 4, 5)})
    scores = np.random.default_rng(seed).permutation(len(parts))
    return pieces + [(part, -float(score), NORMAL) for part, score in zip(parts, scores, strict=True)]


def byte_level_pieces(merges: list[str], whole: list[str], special: list[str]) -> list[tuple[str, float, int]]:
    """A byte-level vocabulary: bytes, what ``merges`` form, ``whole`` pieces that no merge forms, special tokens."""
    from tokenizers.pre_tokenizers import ByteLevel

    texts = sorted(ByteLevel.alphabet()) + [merge.replace(" ", "") for merge in merges] + whole
    return [(text, 0.0, NORMAL) for text in texts] + [(text, 0.0, CONTROL) for text in special]


ARCHITECTURES = {"llama": MODEL_ARCH.LLAMA, "gemma3": MODEL_ARCH.GEMMA3, "qwen2": MODEL_ARCH.QWEN2}


def tensors_of(model: PreTrainedModel, architecture: str) -> dict[str, np.ndarray]:
    """Return ``model``'s weights as llama.cpp's converter stores them."""
    config: Any = model.config
    names = get_tensor_name_map(ARCHITECTURES[architecture], config.num_hidden_layers)
    found = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.float().numpy().copy()
        if architecture == "gemma3" and "norm" in name:
            values += 1  # Gemma multiplies by 1 + weight, llama.cpp by the weight
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            values = _interleaved(values, heads)
        found[str(names.get_name(name, try_suffixes=(".weight", ".bias")))] = values
    return found


def _interleaved(values: np.ndarray, heads: int) -> np.ndarray:
    """Order the rows of queries or keys as llama.cpp's RoPE pairs them: neighbours in place of halves."""
    shape = values.shape
    return values.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def settings_of(model: PreTrainedModel, architecture: str) -> dict[str, Any]:
    """Return the fields of ``model``'s config by their names in GGUF, dots written as two underscores."""
    config: Any = model.config
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    fields = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention__head_count": config.num_attention_heads,
        "attention__head_count_kv": config.num_key_value_heads,
        "attention__layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope__freq_base": float(rope["rope_theta"]),
    }
    if architecture == "gemma3":
        fields |= {"attention__key_length": config.head_dim, "attention__sliding_window": config.sliding_window}
    return {f"{architecture}__{name}": value for name, value in fields.items()}
