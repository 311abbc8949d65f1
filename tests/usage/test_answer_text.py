"""Pieces of an answer joined are the answer: no half characters, no beginnings of a stop string."""

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
