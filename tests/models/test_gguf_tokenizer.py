"""Tokenizers rebuilt from fields of GGUF files: SentencePiece's BPE, the byte-level ones of Llama 3 and Qwen."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from sparsekv_pl.models.gguf_file import read_gguf
from sparsekv_pl.models.gguf_tokenizer import NORMAL, scored_merges, tokenizer_from_gguf
from tests.models.gguf_cases import byte_level_pieces, scored_pieces, write_gguf

TEXT = "A press keeps what the continuation reads, and the cache that it leaves is small. The cat sat there.\n"
TEXTS = [
    TEXT,
    "the  cache\n\n\n\n that   sat",
    " kept ",
    "naïve 🦙 cat\x07",
    "the<eos>cat",
    "",
    "\n",
    "thethethe reads  reads",
]
Piece = tuple[str, float, int]


def pieces_by_hand(text: str, pieces: list[Piece]) -> list[str]:
    """SentencePiece's rule, slowly: merge the neighbours that form the best piece, the leftmost of equals."""
    scores = {piece: score for piece, score, kind in pieces if kind == NORMAL}
    parts = list(text.replace(" ", "▁"))
    while True:
        found = [(-scores[a + b], at) for at, (a, b) in enumerate(pairwise(parts)) if a + b in scores]
        if not found:
            return parts
        at = min(found)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def alone(tokenizer: Any, folder: Path) -> Any:
    """The tokenizer reloaded from a folder without a model, as that of an exported adapter."""
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def gemma(tmp_path: Path) -> Any:
    path = write_gguf(
        tmp_path / "gemma.gguf",
        scored_pieces(TEXT),
        bos="<bos>",
        eos="<eos>",
        unknown="<unk>",
        padding="<pad>",
        tokenizer__ggml__add_space_prefix=False,
        tokenizer__ggml__add_bos_token=True,
        llama__context_length=77,
    )
    return tokenizer_from_gguf(read_gguf(path))


@pytest.mark.parametrize("seed", range(3))
def test_scores_merge_as_sentencepiece_merges(seed: int, tmp_path: Path) -> None:
    pieces = scored_pieces(TEXT, seed)
    path = write_gguf(tmp_path / "it.gguf", pieces, unknown="<unk>", tokenizer__ggml__add_space_prefix=False)
    tokenizer = tokenizer_from_gguf(read_gguf(path))
    for text in (TEXT[:-1], "that cat reads the cache", "tttthhhheeee", " "):
        assert tokenizer.tokenize(text) == pieces_by_hand(text, pieces)


def test_of_equal_scores_the_lower_ids_merge_first() -> None:
    tokens, scores = ["b", "a", "c", "ab", "bc", "abc", "aa"], [0.0, 0.0, 0.0, -1.0, -1.0, -0.5, -2.0]
    assert list(scored_merges(tokens, scores, [NORMAL] * 7)) == [
        ("a", "bc"),
        ("ab", "c"),
        ("a", "b"),
        ("b", "c"),
        ("a", "a"),
    ]


def test_special_and_own_pieces_bytes_and_spaces_as_in_gemma(gemma: Any) -> None:
    tokens = {text: gemma.convert_ids_to_tokens(gemma(text)["input_ids"]) for text in TEXTS}
    assert all(found[0] == "<bos>" and "<bos>" not in found[1:] for found in tokens.values())
    assert tokens["the<eos>cat"].count("<eos>") == 1
    assert tokens["\n"] == ["<bos>", "\n"]
    assert {"  ", "\n\n\n", "\n"} <= set(tokens["the  cache\n\n\n\n that   sat"])
    assert {"<0xF0>", "<0x9F>", "<0xA6>", "<0x99>", "<0x07>"} <= set(tokens["naïve 🦙 cat\x07"])
    assert [gemma.decode(gemma.encode(text, add_special_tokens=False)) for text in TEXTS] == TEXTS
    assert (gemma.bos_token, gemma.eos_token, gemma.pad_token, gemma.unk_token) == ("<bos>", "<eos>", "<pad>", "<unk>")
    assert gemma.model_max_length == 77
    assert sorted(gemma.get_vocab().values()) == list(range(len(gemma)))
    assert gemma.decode(gemma("a cat")["input_ids"], skip_special_tokens=True) == "a cat"


def test_without_bytes_unknowns_are_one(tmp_path: Path) -> None:
    pieces = scored_pieces(TEXT, with_bytes=False)
    path = write_gguf(tmp_path / "it.gguf", pieces, unknown="<unk>", tokenizer__ggml__add_space_prefix=False)
    assert tokenizer_from_gguf(read_gguf(path)).tokenize("🦙🦙a") == ["<unk>", "a"]


def test_a_space_in_front_where_the_file_says_so(tmp_path: Path) -> None:
    """As Llama 2: no field means a space in front of the text and behind each special token, and BOS first."""
    path = write_gguf(tmp_path / "it.gguf", scored_pieces(TEXT), bos="<bos>", eos="<eos>", unknown="<unk>")
    tokenizer = alone(tokenizer_from_gguf(read_gguf(path)), tmp_path / "alone")
    first = tokenizer("cat")["input_ids"]
    assert first[0] == tokenizer.bos_token_id
    assert "".join(tokenizer.convert_ids_to_tokens(first[1:])) == "▁cat"
    assert tokenizer("<eos>cat", add_special_tokens=False)["input_ids"] == [tokenizer.eos_token_id, *first[1:]]
    assert tokenizer.decode(first[1:]) == "cat"


def test_what_the_file_puts_around_a_text(tmp_path: Path) -> None:
    says = {"tokenizer__ggml__add_bos_token": False, "tokenizer__ggml__add_eos_token": True}
    path = write_gguf(tmp_path / "it.gguf", scored_pieces(TEXT), bos="<bos>", eos="<eos>", unknown="<unk>", **says)
    tokenizer = tokenizer_from_gguf(read_gguf(path))
    ids = tokenizer("cat", "sat")["input_ids"]
    assert tokenizer.bos_token_id not in ids and [i for i, id_ in enumerate(ids) if id_ == tokenizer.eos_token_id] == [
        len(tokenizer("cat")["input_ids"]) - 1,
        len(ids) - 1,
    ]


MERGES = ["1 2", "12 3", "t h", "Ġ th", "' s", "Ã ©"]
WHOLE = ["Ġwhole"]
SPECIAL = ["<|begin|>", "<|end|>"]
BYTE_LEVEL = {
    "llama-bpe": {
        "12345": ["123", "4", "5"],
        "1212": ["12", "1", "2"],
        "a whole": ["a", "Ġwhole"],
        "it's the!\n\n": ["i", "t", "'s", "Ġth", "e", "!", "Ċ", "Ċ"],
        "e\u0301": ["e", "Ì", "ģ"],
    },
    "qwen2": {
        "12345": ["1", "2", "3", "4", "5"],
        "a whole": ["a", "Ġ", "w", "h", "o", "l", "e"],
        "it'S the": ["i", "t", "'", "S", "Ġth", "e"],
        "e\u0301": ["Ã©"],
    },
    "smollm": {"12345": ["1", "2", "3", "4", "5"], "a whole": ["a", "Ġ", "w", "h", "o", "l", "e"]},
}


@pytest.mark.parametrize("pre", BYTE_LEVEL)
def test_byte_level_kinds_cut_and_merge_by_their_own_rules(pre: str, tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "it.gguf",
        byte_level_pieces(MERGES, WHOLE, SPECIAL),
        "gpt2",
        merges=MERGES,
        bos="<|begin|>",
        eos="<|end|>",
        tokenizer__ggml__pre=pre,
        tokenizer__chat_template="{{ messages[0].content }}",
    )
    tokenizer = tokenizer_from_gguf(read_gguf(path))
    for text, tokens in BYTE_LEVEL[pre].items():
        assert tokenizer.tokenize(text) == tokens
        assert tokenizer.tokenize(f"{text}<|end|>{text}") == [*tokens, "<|end|>", *tokens]
    bos = {"llama-bpe": "<|begin|>", "qwen2": None, "smollm": "<|begin|>"}[pre]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (bos, "<|end|>", None)
    again = alone(tokenizer, tmp_path / "alone")
    for text in [*BYTE_LEVEL[pre], *TEXTS]:
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert (again(text)["input_ids"][:1] == [again.bos_token_id]) == (pre == "llama-bpe")
    assert again.chat_template == tokenizer.chat_template == "{{ messages[0].content }}"


def test_reloaded_alone_it_gives_the_same_ids(gemma: Any, tmp_path: Path) -> None:
    again = alone(gemma, tmp_path / "alone")
    assert [again(text)["input_ids"] for text in TEXTS] == [gemma(text)["input_ids"] for text in TEXTS]
    assert again.get_vocab() == gemma.get_vocab()
    assert (again.bos_token_id, again.eos_token_id, again.pad_token_id) == (2, 1, 0)


OTHERS: list[tuple[str, dict[str, Any], str]] = [
    ("gpt2", {"tokenizer__ggml__pre": "falcon"}, r"of kind \('gpt2', 'falcon'\)"),
    ("gpt2", {}, r"of kind \('gpt2', None\)"),
    ("t5", {}, r"of kind \('t5', None\)"),
    ("llama", {"tokenizer__ggml__pre": "qwen2"}, r"of kind \('llama', 'qwen2'\)"),
    ("llama", {"tokenizer__ggml__precompiled_charsmap": "x"}, "precompiled_charsmap"),
    ("llama", {"tokenizer__ggml__remove_extra_whitespaces": True}, "remove_extra_whitespaces"),
]


@pytest.mark.parametrize(("family", "fields", "said"), OTHERS)
def test_another_kind_is_refused_by_name(family: str, fields: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "other.gguf", scored_pieces("a"), family, **fields)
    with pytest.raises(ValueError, match=rf"^other.gguf holds a tokenizer .*{said}.*give that folder") as refused:
        tokenizer_from_gguf(read_gguf(path))
    assert "\n" not in str(refused.value)


def test_a_piece_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "it.gguf", [("a", 0.0, NORMAL)] * 2)
    with pytest.raises(ValueError, match="1 pieces that are there twice"):
        tokenizer_from_gguf(read_gguf(path))
