"""Build the tokenizer that a GGUF file describes, from the file's own fields.

transformers reads GGUF weights exactly and tokenizers wrongly: another end-of-text token, a BOS that the model never
saw or none where it needs one, digits not split, ids outside the embedding, ten pieces for five words.

Two families are rebuilt, named by ``tokenizer.ggml.model``: "gpt2", byte-level BPE, whose regex ``tokenizer.ggml.pre``
names; and "llama", SentencePiece's BPE, which has scores in place of merges.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerFast

from sparsekv_pl.models.gguf_file import GgufFile, damaged

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""GGUF's token types."""

SPACE = "▁"
"""SentencePiece's sign for a space."""

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""The regex of tiktoken's cl100k_base, without its rule for digits."""


@dataclass(frozen=True)
class ByteLevel:
    """A kind of byte-level BPE.

    Parameters
    ----------
    words
        Regex that cuts a text into words, each encoded alone; None for GPT-2's, with every digit alone.
    whole_words
        Takes a word that is in the vocabulary as it is, whatever its merges give.
    composed
        Applies Unicode's NFC first.
    bos
        Puts BOS first where the file does not say.
    names_bos
        The BOS that the file names exists. Qwen's files name one that its tokenizer does not have.
    """

    words: str | None
    whole_words: bool = False
    composed: bool = False
    bos: bool = False
    names_bos: bool = True


LLAMA3 = ByteLevel(WORDS % r"\p{N}{1,3}", whole_words=True, bos=True)
QWEN2 = ByteLevel(WORDS % r"\p{N}", composed=True, names_bos=False)
BYTE_LEVEL = {
    "smollm": ByteLevel(None),
    "llama-bpe": LLAMA3,
    "llama3": LLAMA3,
    "llama-v3": LLAMA3,
    "qwen2": QWEN2,
}
"""``tokenizer.ggml.pre`` -> kind; qwen2 is also Qwen 2.5's and Qwen 3's."""

SCORED_PRE = (None, "default", "llama-spm", "gemma")
"""The values of ``tokenizer.ggml.pre`` beside the model "llama"."""


def tokenizer_from_gguf(file: GgufFile) -> PreTrainedTokenizerFast:
    """Build the tokenizer of ``file``.

    Raises ``ValueError`` if it is of a kind that is not rebuilt here, or its fields contradict each other.
    """
    family, pre = file.fields.get("tokenizer.ggml.model"), file.fields.get("tokenizer.ggml.pre")
    _refuse_other_kinds(file, family, pre)
    try:
        if family == "llama":
            default_bos, named = True, True
            tokenizer = _scored_bpe(file.fields)
        else:
            kind = BYTE_LEVEL[str(pre)]
            default_bos, named = kind.bos, kind.names_bos
            tokenizer = _byte_level_bpe(file.fields, kind)
        return _finished(file, tokenizer, default_bos, named)
    except Exception as error:
        raise damaged(file.path, error) from error


def _refuse_other_kinds(file: GgufFile, family: Any, pre: Any) -> None:
    scored = family == "llama" and pre in SCORED_PRE
    if not scored and not (family == "gpt2" and pre in BYTE_LEVEL):
        raise _refused(file, f"of kind {(family, pre)}")
    if scored and file.fields.get("tokenizer.ggml.precompiled_charsmap"):
        raise _refused(file, "with a table of normalised characters (precompiled_charsmap)")
    if scored and file.fields.get("tokenizer.ggml.remove_extra_whitespaces"):
        raise _refused(file, "that removes spaces (remove_extra_whitespaces)")
    tokens = file.fields.get("tokenizer.ggml.tokens") or []
    if len(set(tokens)) != len(tokens):
        raise _refused(file, f"with {len(tokens) - len(set(tokens))} pieces that are there twice")


def _refused(file: GgufFile, what: str) -> ValueError:
    return file.refused(f"holds a tokenizer {what}, which is not rebuilt from GGUF here")


def _byte_level_bpe(fields: dict[str, Any], kind: ByteLevel) -> "Tokenizer":
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE

    vocab = {token: index for index, token in enumerate(fields["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, ignore_merges=kind.whole_words))
    if kind.composed:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True)
            if kind.words is None
            else pre_tokenizers.Split(Regex(kind.words), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind.words is None),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _scored_bpe(fields: dict[str, Any]) -> "Tokenizer":
    """Build SentencePiece's BPE: of all neighbours the two that form the piece with the highest score merge first."""
    from tokenizers import Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    kinds = fields["tokenizer.ggml.token_type"]
    unknown = fields.get("tokenizer.ggml.unknown_token_id")
    prefix = fields.get("tokenizer.ggml.add_space_prefix", True)
    tokenizer = Tokenizer(
        BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=list(scored_merges(tokens, fields["tokenizer.ggml.scores"], kinds)),
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=BYTE in kinds,
        )
    )
    replace = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace]) if prefix else replace
    spaces = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*spaces, decoders.Strip(" ", 1, 0)] if prefix else spaces)
    return tokenizer


def scored_merges(tokens: list[str], scores: list[float], kinds: list[int]) -> Iterator[tuple[str, str]]:
    """Return the merges that scores stand for, first to last: by the merged piece's score, then by the parts' ids.

    Only normal pieces merge: the others are found in the text before.
    """
    ids = {token: index for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind == NORMAL}
    for token in sorted(ids, key=lambda token: (-scores[ids[token]], ids[token])):
        cuts = [(token[:place], token[place:]) for place in range(1, len(token))]
        parts = [(ids[left], ids[right]) for left, right in cuts if left in ids and right in ids]
        for left, right in sorted(parts):
            yield tokens[left], tokens[right]


def _finished(file: GgufFile, tokenizer: "Tokenizer", default_bos: bool, names_bos: bool) -> PreTrainedTokenizerFast:
    """Add the special tokens, those put around a text, and the chat template."""
    fields = file.fields
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    added = list(_added(tokens, fields["tokenizer.ggml.token_type"]))
    tokenizer.add_special_tokens([token for token in added if token.special])
    tokenizer.add_tokens([token for token in added if not token.special])
    adds_bos = fields.get("tokenizer.ggml.add_bos_token", default_bos)

    def token(role: str) -> str | None:
        index = fields.get(f"tokenizer.ggml.{role}_token_id")
        return None if index is None else tokens[index]

    bos = token("bos") if adds_bos or names_bos else None
    eos = token("eos")
    _put_around(tokenizer, bos if adds_bos else None, eos if fields.get("tokenizer.ggml.add_eos_token") else None)
    length = file.of_architecture("context_length")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        unk_token=token("unknown"),
        pad_token=token("padding"),
        chat_template=fields.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **({} if length is None else {"model_max_length": length}),
    )


def _added(tokens: list[str], kinds: list[int]) -> Iterator["AddedToken"]:
    from tokenizers import AddedToken

    for token, kind in zip(tokens, kinds, strict=True):
        if kind in (CONTROL, USER_DEFINED):
            yield AddedToken(token, normalized=False, special=kind == CONTROL)


def _put_around(tokenizer: "Tokenizer", first: str | None, last: str | None) -> None:
    from tokenizers.processors import TemplateProcessing

    if first is None and last is None:
        return
    before, after = [first] if first else [], [last] if last else []
    tokenizer.post_processor = TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *(f"{token}:1" for token in before), "$B:1", *(f"{token}:1" for token in after)],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in {*before, *after}],
    )
