"""Words of a passage, and what kinds of questions take from it."""

import random

from data.passage import Passage
from data.question_kinds import QUESTION_KINDS


def test_a_word_that_is_also_inside_another_is_not_left_out() -> None:
    text = (
        " A. The kettle is made of copper. Call f(copper) at last. Nobody ever saw the lighthouse. Some more words. Z "
    )
    drawn = [QUESTION_KINDS["cloze"].ask(Passage([(text, True)]), random.Random(i), "train") for i in range(40)]
    answers = {one.turn.answer for one in drawn if one}
    assert "lighthouse" in answers
    assert "copper" not in answers


def test_half_a_speaker_at_the_beginning_is_none() -> None:
    speech = "I have nothing more to say to you.\n\n"
    text = (
        f" Citizen:\n{speech}Second Citizen:\nWe shall see about that tomorrow.\n\nAll:\nAway, away with him now.\n\nX"
    )
    asked_of = [QUESTION_KINDS["speakers"].ask(Passage([(text, True)]), random.Random(i), "train") for i in range(20)]
    assert "Citizen" not in {one.turn.answer for one in asked_of if one}


def test_words_are_found_where_they_stand_once() -> None:
    passage = Passage(
        [(" Ha ha ha! The end, the END of it. ", True), (" Told in between. ", False), (" More to see, tru", True)]
    )
    assert passage.find(["ha", "ha"]) is None, "twice, overlapping"
    assert passage.find(["The", "end"]) is None
    assert passage.find(["end", "of"]) == range(6, 8)
    assert passage.text(range(6, 8)) == "END of"
    assert passage.runs == [range(0, 9), range(12, 15)], "not the inserted words, not the cut one"
    assert [span.start for span in passage.windows(9)] == [0]
    passage.use(range(2, 4))
    assert {span.start for span in passage.candidates(passage.windows(2), random.Random(0), None)} == {
        0,
        4,
        5,
        6,
        7,
        12,
        13,
    }
