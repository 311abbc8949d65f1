"""Anchors: punctuation in any script and tokenizer, padding on either side, the eviction point."""

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from sparsekv_pl.models import anchors
from sparsekv_pl.models.anchors import Anchors, AnchorTable, is_punctuation, table_for

CPU = torch.device("cpu")


def byte_level_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """GPT-2's kind: 256 tokens of one byte each, and one token for each of ``words``."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces += [byte_level.pre_tokenize_str(word)[0][0] for word in words]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def byte_fallback_tokenizer(pieces: list[str]) -> PreTrainedTokenizerFast:
    """Llama 2's kind: pieces with a space mark, and tokens such as <0x2E> for single bytes."""
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def byte_piece(value: int) -> str:
    """The piece that byte-level tokenizers write for one byte: Latin-1 punctuation bytes among them."""
    alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    text = bytes([value]).decode("latin-1")
    return alphabet.pre_tokenize_str(text)[0][0][-1]


def punctuation_of(tokenizer: PreTrainedTokenizerBase, pieces: list[str]) -> list[str]:
    table = AnchorTable.build(tokenizer)
    return [piece for piece in pieces if table.punctuation_V[tokenizer.convert_tokens_to_ids(piece)]]


@pytest.mark.parametrize("text", [".", " ,", "...\n", "?!", "(", "_", "。", "、", " «", "—", "؟", "।", "\u2026"])
def test_punctuation_in_any_script(text: str) -> None:
    assert is_punctuation(text)


@pytest.mark.parametrize("text", ["", " \n", "a", "a.", "1.", "$", "+", "=", "\ufffd", "\ufffd.", "é"])
def test_what_is_not_punctuation(text: str) -> None:
    assert not is_punctuation(text)


def test_byte_level_tokenizer_is_judged_by_its_text() -> None:
    words = [".", " .", "。", " —", "word", " word", "\n", "word."]
    tokenizer = byte_level_tokenizer(words)
    table = AnchorTable.build(tokenizer)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ids = [tokenizer.convert_tokens_to_ids(byte_level.pre_tokenize_str(word)[0][0]) for word in words]
    assert [w for w, i in zip(words, ids, strict=True) if table.punctuation_V[i]] == [".", " .", "。", " —"]


def test_one_byte_of_a_character_is_not_punctuation() -> None:
    # GPT-2 writes byte 0xAB as the letter "«", which is punctuation: only decoding distinguishes them.
    tokenizer = byte_level_tokenizer(["."])
    assert byte_piece(0xAB) == "«"
    assert punctuation_of(tokenizer, ["«", "»", "¿", "."]) == ["."]


def test_byte_fallback_tokenizer_is_judged_by_its_text() -> None:
    pieces = ["<0x2E>", "<0xE3>", "<0x61>", "▁,", ",", "▁", "▁the", "。", "<s>"]
    tokenizer = byte_fallback_tokenizer(pieces)
    assert punctuation_of(tokenizer, pieces) == ["<0x2E>", "▁,", ",", "。"]


def test_python_tokenizer_without_a_rust_backend() -> None:
    tokenizer = ByT5Tokenizer()
    ids_BL = torch.tensor([tokenizer.encode("a.b")])  # ends in the eos token
    mask_BL = Anchors(sinks=0, recent=0).mask(ids_BL, tokenizer)
    assert mask_BL.tolist() == [[False, True, False, True]]


def test_special_tokens_without_a_role_are_special() -> None:
    tokenizer = byte_level_tokenizer(["."])
    tokenizer.add_tokens([AddedToken("<|turn|>", special=True), AddedToken("plain", special=False)])
    turn, plain = tokenizer.convert_tokens_to_ids(["<|turn|>", "plain"])
    assert turn not in tokenizer.all_special_ids  # or this test would prove nothing
    table = AnchorTable.build(tokenizer)
    assert table.special_V[[tokenizer.eos_token_id, turn]].all()
    assert not table.special_V[plain]


def test_the_table_is_built_once_and_again_when_tokens_come(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[int] = []
    build = AnchorTable.build
    monkeypatch.setattr(anchors.AnchorTable, "build", lambda t: built.append(len(t)) or build(t))
    tokenizer = byte_level_tokenizer(["."])
    assert table_for(tokenizer, CPU) is table_for(tokenizer, CPU)
    assert len(built) == 1
    tokenizer.add_tokens([AddedToken("<|new|>", special=True)])
    assert table_for(tokenizer, CPU).special_V[tokenizer.convert_tokens_to_ids("<|new|>")]
    assert len(built) == 2


# Ids of a made-up vocabulary: 0 is a special token, 1 is punctuation, the rest are words.
TABLE = AnchorTable(torch.tensor([1, 0, 0, 0]).bool(), torch.tensor([0, 1, 0, 0]).bool())
IDS_BL = torch.tensor([[0, 2, 2, 1, 2, 2, 0, 2, 1, 2], [2, 2, 2, 2, 2, 2, 2, 2, 2, 2]])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"sinks": 2}, ["##........", "##........"]),
        ({"recent": 3}, [".......###", ".......###"]),
        ({"special": True}, ["#.....#...", ".........."]),
        ({"punctuation": True}, ["...#....#.", ".........."]),
        ({}, ["..........", ".........."]),
        ({"sinks": 2, "recent": 3, "special": True, "punctuation": True}, ["##.#..####", "##.....###"]),
        ({"sinks": 99}, ["##########", "##########"]),
        ({"recent": 99}, ["##########", "##########"]),
    ],
)
def test_each_kind_is_switchable(settings: dict, expected: list[str]) -> None:
    off = {"sinks": 0, "recent": 0, "special": False, "punctuation": False}
    mask_BL = Anchors(**(off | settings)).mask(IDS_BL, TABLE)
    assert mask_BL.dtype == torch.bool
    assert drawn(mask_BL) == expected


def test_padding_on_either_side_is_no_anchor_and_is_not_counted() -> None:
    real_BL = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 0, 0, 0]])
    mask_BL = Anchors(sinks=2, recent=1).mask(IDS_BL, TABLE, attention_mask_BL=real_BL)
    assert drawn(mask_BL) == ["...##.#.##", "##....#..."]


def test_padding_alone_has_no_anchors() -> None:
    assert not Anchors().mask(IDS_BL, TABLE, attention_mask_BL=torch.zeros_like(IDS_BL)).any()


@pytest.mark.parametrize("name", ["sinks", "recent"])
def test_negative_numbers_of_tokens(name: str) -> None:
    with pytest.raises(ValueError, match=f"anchors.{name} is -1"):
        Anchors(**{name: -1})


def test_a_context_must_be_longer_than_its_anchors() -> None:
    chosen = Anchors(sinks=4, recent=12)
    assert chosen.minimum == 16
    chosen.check(17)
    with pytest.raises(ValueError, match=r"context of 16 tokens.*4 sinks.*12 recent.*more than 16"):
        chosen.check(16)


def drawn(mask_BL: torch.Tensor) -> list[str]:
    """One string per row, '#' for an anchor: readable when a test fails."""
    return ["".join("#" if anchor else "." for anchor in row) for row in mask_BL.tolist()]
