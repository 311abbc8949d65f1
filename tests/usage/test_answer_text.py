"""Pieces of an answer joined are the answer: no half characters, no beginnings of a stop string."""

import tracemalloc

import pytest

from sparsekv_pl.usage.answer_text import AnswerText


@pytest.mark.parametrize(
    "text, stop, expected",
    [
        ("The sea. ", (), "The sea."),
        ("  The\n\nsea", (), "The\n\nsea"),
        ("Größe ≠ 💧 water", (), "Größe ≠ 💧 water"),
        ("The sea.\nQ: and", ("\nQ:",), "The sea."),
        ("The sea.\nQuiet", ("\nQ:",), "The sea.\nQuiet"),
        ("a\nQ", ("\nQ:", "zz"), "a\nQ"),
        ("STOP", ("STOP",), ""),
        ("", (), ""),
    ],
)
def test_pieces_never_take_anything_back(text: str, stop: tuple[str, ...], expected: str) -> None:
    ids, pieces = list(text.encode()), list[str]()
    answer = AnswerText(lambda ids: bytes(ids).decode(errors="replace"), stop, pieces.append)
    for length in range(1, len(ids) + 1):
        ended = answer.reached(ids[:length])
        assert expected.startswith("".join(pieces))
        if ended:
            ids = ids[:length]
            break
    assert answer.finish(ids) == expected == "".join(pieces)


def test_a_long_stop_string_costs_no_more_than_the_text() -> None:
    """Not its length squared, token by token."""
    answer = AnswerText(lambda _: "xx the sea xx", "x" * 50_000)
    tracemalloc.start()
    try:
        assert not answer.reached([1])
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()
    assert not AnswerText(lambda _: "x" * 49_999, "x" * 50_000).reached([1])
