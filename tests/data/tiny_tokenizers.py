"""Tokenizers of a few hundred tokens in the two ways that text is cut: SentencePiece's and byte-level."""

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

ENGLISH = "the code for the red box is 48213 and the key of the door lies in Paris, they said. \n"
CHINESE = "紅色盒子的密碼是四萬八千，鑰匙在巴黎的門邊。他們說：今天的天氣很好！\n"  # noqa: RUF001
SPECIAL = ["<unk>", "<s>", "</s>"]


def sentencepiece(texts: Sequence[str], legacy: bool = True, bos: bool = False) -> PreTrainedTokenizerFast:
    """Spaces are "▁" and each text gets one in front (the dummy prefix); unknown characters fall back to bytes.

    ``legacy`` is Llama 2's form, a normalizer; else it is Metaspace's, a pre-tokenizer. ``bos`` adds <s> to a text, as
    Llama and Gemma do.
    """
    raw = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=[*SPECIAL, *fallback], show_progress=False)
    raw.train_from_iterator(texts, trainer)
    raw = _finished(raw, fallback, legacy)
    if legacy:
        raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return _wrapped(raw, bos)


def byte_level(texts: Sequence[str], bos: bool = False) -> PreTrainedTokenizerFast:
    """Characters beyond ASCII take up to three tokens; merges are learned from ``texts`` alone."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(texts, trainer)
    return _wrapped(raw, bos)


def _finished(raw: Tokenizer, fallback: Sequence[str], legacy: bool) -> Tokenizer:
    """Without what only training needs: bytes as special tokens, and Llama 2's words cut before its merges."""
    import json

    content: dict[str, Any] = json.loads(raw.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in fallback]
    content["pre_tokenizer"] = None if legacy else content["pre_tokenizer"]
    return Tokenizer.from_str(json.dumps(content))


def _wrapped(raw: Tokenizer, bos: bool) -> PreTrainedTokenizerFast:
    if bos:
        raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
