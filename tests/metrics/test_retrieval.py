"""Retrieval scores: by hand, against plain references, and over ranks."""

import random
import re
import string
import unicodedata
from collections import Counter
from typing import Any

import pytest

from sparsekv_pl.metrics import retrieval_scores

NUMBERS = ("4823915", "1749302", "6650021")
WORDS = "red blue Number is The 42 4823915, silent-lantern. and".split()


@pytest.mark.parametrize(
    ("prediction", "answers", "substring"),
    [
        (" 4823915.", ["4823915"], 1),
        ("it was 4823915, I think", ["4823915"], 1),
        ("482391", ["4823915"], 0),
        ("SILENT-Lantern", ["silent-lantern"], 1),
        ("", ["x"], 0),
        ("4823915 and 6650021", NUMBERS, 2 / 3),
    ],
)
def test_substring_is_the_share_of_answers_contained(prediction: str, answers: list[str], substring: float) -> None:
    assert retrieval_scores(prediction, answers)["substring"] == pytest.approx(substring)


@pytest.mark.parametrize(
    ("prediction", "answer", "exact"),
    [
        ("4823915", "4823915", True),
        (' "4823915".\nThe text', "4823915", True),
        (": 4823915 is the number", "4823915", True),
        ("Silent-Lantern!", "silent-lantern", True),
        ("a brass lamp, which", "A brass lamp", True),
        ("48239156", "4823915", False),
        ("the 4823915", "4823915", False),
        ("is: 4823915", "4823915", False),
        ("a brass", "a brass lamp", False),
        ("", "4823915", False),
    ],
)
def test_exact_compares_the_first_words(prediction: str, answer: str, exact: bool) -> None:
    assert retrieval_scores(prediction, [answer])["exact"] == exact


@pytest.mark.parametrize(
    ("prediction", "exact"),
    [
        ("4823915, 1749302, and 6650021.", True),
        (" 6650021 1749302 4823915", True),
        ("1. 4823915 2. 6650021 3. 1749302", True),
        ("1) 4823915\n2) 6650021\n3) 1749302\n4) 1111111", True),
        ("- 4823915\n- 6650021\n- 1749302", True),
        ("4823915, 1749302, 6650021\nQuestion: what", True),
        ("4823915, 1749302 and 6650021. Also 9999999", True),
        ("4823915, 1749302, 6650021, 6650021", True),
        ("4823915, 1749302", False),
        ("4823915, 1749302, 6650021, 9999999", False),
        ("4823915, 1749302. And 6650021", False),
        ("4823915, 1749302\n\n6650021", False),
        ("", False),
    ],
)
def test_exact_compares_the_set_of_listed_items(prediction: str, exact: bool) -> None:
    assert retrieval_scores(prediction, NUMBERS)["exact"] == exact


def test_items_of_several_words_are_split_at_commas_alone() -> None:
    answers = ["Maria Keller", "Kofi Sato"]
    assert retrieval_scores("Kofi Sato and Maria Keller.", answers)["exact"] == 1
    assert retrieval_scores("1. maria keller\n2. kofi sato", answers)["exact"] == 1
    assert retrieval_scores("Maria, Keller, Kofi, Sato", answers)["exact"] == 0


def test_f1_and_rouge_by_hand() -> None:
    scores = retrieval_scores("the brass lamp of old", ["an old brass lamp"])
    # SQuAD drops articles: {brass, lamp, of, old} against {old, brass, lamp}.
    assert scores["f1"] == pytest.approx(2 * (3 / 4) * (3 / 3) / (3 / 4 + 3 / 3))
    # Longest common subsequence "brass lamp" of 5 and 4 words.
    assert scores["rouge_l"] == pytest.approx(2 * (2 / 5) * (2 / 4) / (2 / 5 + 2 / 4))
    several = retrieval_scores("6650021 4823915", NUMBERS)
    assert several["f1"] == pytest.approx(2 * 1 * (2 / 3) / (1 + 2 / 3))
    assert several["rouge_l"] == pytest.approx(2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3))


def _f1(prediction: str, target: str) -> float:
    def tokens(text: str) -> list[str]:
        bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
        return re.sub(r"\b(a|an|the)\b", " ", bare).split()

    ours, theirs = tokens(prediction), tokens(target)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs)) if common else 0.0


@pytest.mark.parametrize(
    ("prediction", "answers", "words"),
    [
        ("The old mill stands by the river. It", ["the old mill stands by the river it"], 1.0),
        ("the old house stands by a river", ["the old mill stands by the river it"], 5 / 8),
        ("old mill stands by the river it", ["the old mill stands by the river it"], 0.0),
        ("", ["the old mill"], 0.0),
        ("1. 48213\n2. 99999", ["48213", "48231"], 1 / 2),
        ("48231, 48213 and 5", ["48213", "48231"], 1.0),
        ("天気だ", ["天気が"], 2 / 3),
    ],
)
def test_words_are_the_share_that_is_right(prediction, answers, words):
    scores = retrieval_scores(prediction, answers)
    assert scores["words"] == pytest.approx(words)
    assert scores["words"] >= scores["exact"]


def _rouge_l(prediction: str, target: str) -> float:
    ours, theirs = (re.findall("[a-z0-9]+", text.lower()) for text in (prediction, target))

    def longest(i: int, j: int) -> int:
        if i == len(ours) or j == len(theirs):
            return 0
        if ours[i] == theirs[j]:
            return 1 + longest(i + 1, j + 1)
        return max(longest(i + 1, j), longest(i, j + 1))

    return 2 * longest(0, 0) / (len(ours) + len(theirs))


def test_f1_and_rouge_equal_plain_references() -> None:
    rng = random.Random(0)
    for _ in range(60):
        prediction = " ".join(rng.choices(WORDS, k=rng.randint(1, 7)))
        answers = [rng.choice(["4823915", "silent-lantern", "red number 42"]) for _ in range(rng.randint(1, 3))]
        scores = retrieval_scores(prediction, answers)
        assert scores["f1"] == pytest.approx(_f1(prediction, " ".join(answers)))
        assert scores["rouge_l"] == pytest.approx(_rouge_l(prediction, " ".join(answers)))


@pytest.mark.parametrize("answers", [["4823915"], ["c2ce6f44-7ed4-457b-9e2f-eb89414c343c"], list(NUMBERS)])
def test_a_copy_scores_one_and_something_else_zero(answers: list[str]) -> None:
    assert set(retrieval_scores(" " + ", ".join(answers) + ".", answers).values()) == {1.0}
    assert set(retrieval_scores(" nothing of it", answers).values()) == {0.0}
    assert set(retrieval_scores("", answers).values()) == {0.0}


@pytest.mark.parametrize("answers", [[], [""], ["42", "..."]])
def test_answers_must_be_something(answers: list[str]) -> None:
    with pytest.raises(ValueError, match="at least one, each with a letter or digit"):
        retrieval_scores("42", answers)


def test_scoring_needs_no_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    import nltk

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("nltk was asked for data")

    monkeypatch.setattr(nltk, "download", refuse)
    monkeypatch.setattr(nltk.data, "find", refuse)
    assert retrieval_scores("42", ["42"])["rouge_l"] == 1


SPACELESS = [
    ("東京。", "東京", True),
    ("東京是日本的首都", "東京", True),
    ("「東京」", "東京", True),
    ("京都", "東京", False),
    ("48213。接下來", "48213", True),
    ("482130。接下來", "48213", False),
    ("東京タワーです", "東京タワー", True),
    ("กรุงเทพฯ เป็นเมือง", "กรุงเทพ", True),
    ("ปารีส", "กรุงเทพ", False),
]


@pytest.mark.parametrize(("prediction", "answer", "exact"), SPACELESS)
def test_in_scripts_without_spaces_every_character_is_a_word(prediction: str, answer: str, exact: bool) -> None:
    scores = retrieval_scores(prediction, [answer])
    assert scores["exact"] == exact
    if exact:
        assert scores["substring"] == 1
        assert scores["f1"] > 0.3 and scores["rouge_l"] > 0.3
    assert retrieval_scores(answer, [answer]) == dict.fromkeys(scores, 1.0)


@pytest.mark.parametrize("listed", ["紅色、藍色。", "藍色, 紅色", "紅色 藍色", "藍色\n紅色"])
def test_lists_in_scripts_without_spaces(listed: str) -> None:
    assert retrieval_scores(listed, ["紅色", "藍色"])["exact"] == 1
    assert retrieval_scores(listed, ["紅色", "綠色"])["exact"] == 0


@pytest.mark.parametrize("answer", ["café", "Ångström", "naïve Zoë", "हिन्दी", "Ünïcödé"])
def test_composed_and_decomposed_letters_are_the_same(answer: str) -> None:
    for form in ("NFC", "NFD"):
        for other in ("NFC", "NFD"):
            said = unicodedata.normalize(form, f"{answer}, they said")
            scores = retrieval_scores(said, [unicodedata.normalize(other, answer)])
            assert (scores["substring"], scores["exact"]) == (1, 1)
            assert scores["rouge_l"] > 0.3 and scores["f1"] > 0.3


def test_a_vowel_sign_makes_another_word() -> None:
    assert retrieval_scores("की", ["कि"])["exact"] == 0
    assert retrieval_scores("cafe", ["café"])["exact"] == 0
