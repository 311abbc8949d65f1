"""Scores of a model's answer against the expected answers: substring, exact match, words, token F1 and ROUGE-L."""

import re
from collections.abc import Sequence
from typing import NamedTuple
from unicodedata import category, normalize

from torchmetrics.functional.text import rouge_score, squad

STRETCH = 32
"""Words of a long answer that are scored together."""
RETRIEVAL_SCORES = ("substring", "exact", "words", "f1", "rouge_l")

# One to three digits with a full stop or bracket; a value of more digits at a sentence's end is no numbering.
_NUMBERING = re.compile(r"(?:^|(?<=\s))\(?\d{1,3}[.)]\s+")
_END = re.compile(r"[.!?](?=\s|$)|[\u3002\uff01\uff1f]|\n\s*\n")
_SEPARATORS = re.compile(r"[,;\u3001\uff0c\uff1b]|\band\b", re.IGNORECASE)
_SPACELESS = "".join(
    f"{chr(first)}-{chr(last)}"
    for first, last in (
        (0x0E00, 0x0EFF),  # Thai, Lao
        (0x1000, 0x109F),  # Myanmar
        (0x1780, 0x17FF),  # Khmer
        (0x3005, 0x3007),  # Japanese iteration marks
        (0x3040, 0x30FF),  # Hiragana, Katakana
        (0x3400, 0x4DBF),  # Han
        (0x4E00, 0x9FFF),
        (0xF900, 0xFAFF),
        (0x20000, 0x323AF),
    )
)
_UNITS = re.compile(f"[{_SPACELESS}]|[^{_SPACELESS}]+")
"""A character of a script without spaces, which counts as a word, or a run of other characters."""


def retrieval_scores(prediction: str, answers: Sequence[str]) -> dict[str, float]:
    """Score one prediction against the expected answers; each score is in [0, 1].

    - substring: share of the answers that it contains, ignoring case (RULER's string_match_all).
    - exact: 1 if the extracted value is the answer. For one answer: the prediction's first words, as many as the answer
      has. For several: the set of listed items (at most one sentence, and no more lines than are needed for as many
      items as answers; split at commas, "and", line breaks and, if no answer has a space, spaces; without numbering).
      Case and outer punctuation are ignored.
    - words: share of what exact compares that is right. For one answer: of its words, those that the prediction has at
      the same place. For several: of the answers, those that are listed.
    - f1: SQuAD's token F1 of the whole prediction; several answers are joined.
    - rouge_l: ROUGE-L F-measure of the same texts.

    Text is in Unicode's composed form (NFC), and in scripts without spaces between words (Chinese, Japanese, Thai, ...)
    every character is a word.

    Raises
    ------
    ValueError
        If there is no answer, or an answer without a letter or digit.

    >>> retrieval_scores(" 4823915.", ["4823915"])
    {'substring': 1.0, 'exact': 1.0, 'words': 1.0, 'f1': 1.0, 'rouge_l': 1.0}
    >>> retrieval_scores("red, and blue. Also", ["blue", "red", "grey"])["exact"]
    0.0
    """
    if not answers or not all(_words(answer) for answer in answers):
        raise ValueError(f"answers are {list(answers)!r}: give at least one, each with a letter or digit")
    prediction, answers = normalize("NFC", prediction), [normalize("NFC", answer) for answer in answers]
    lowered, joined = prediction.lower(), " ".join(answers)
    right = _right_words(prediction, answers[0]) if len(answers) == 1 else _right_items(prediction, answers)
    f1 = squad(
        {"prediction_text": _spaced(prediction), "id": ""},
        {"answers": {"answer_start": [0], "text": [_spaced(joined)]}, "id": ""},
    )["f1"]
    rouge = rouge_score(prediction, joined, normalizer=_plain, tokenizer=_units, rouge_keys="rougeL")["rougeL_fmeasure"]
    return {
        "substring": sum(answer.lower() in lowered for answer in answers) / len(answers),
        "exact": right.exact,
        "words": right.share,
        "f1": float(f1) / 100,
        "rouge_l": float(rouge),
    }


def words_in_place(prediction: str, answer: str) -> list[bool]:
    """Return for each word of ``answer`` whether ``prediction`` has it at the same place; see ``retrieval_scores``."""
    expected, said = _words(answer), _words(prediction)
    return [place < len(said) and said[place] == word for place, word in enumerate(expected)]


def answer_stretches(prediction: str, answers: Sequence[str]) -> list[list[int]]:
    """Return [words, right ones] of each ``STRETCH`` words of one long answer, by ``words_in_place``; else nothing."""
    right = words_in_place(prediction, answers[0]) if len(answers) == 1 else []
    parts = [right[start : start + STRETCH] for start in range(0, len(right), STRETCH)]
    return [[len(part), sum(part)] for part in parts] if len(parts) > 1 else []


def _words(text: str) -> list[str]:
    """Split into words without case and outer punctuation; marks alone are no words."""
    return [word for part in _units(text) if (word := _without_outer_marks(part).casefold())]


def _units(text: str) -> list[str]:
    """Split at spaces, and between characters of scripts without spaces."""
    return [unit for part in text.split() for unit in _joined_marks(_UNITS.findall(part))]


def _joined_marks(units: list[str]) -> list[str]:
    """Join vowel signs and tones (Unicode's category M) with the character before them."""
    joined: list[str] = []
    for unit in units:
        if joined and all(category(letter)[0] == "M" for letter in unit):
            joined[-1] += unit
        else:
            joined.append(unit)
    return joined


def _spaced(text: str) -> str:
    """Put spaces around words of one character and remove the punctuation of such scripts."""
    return " ".join(map(_without_foreign_marks, _units(text))) if re.search(f"[{_SPACELESS}]", text) else text


def _without_foreign_marks(unit: str) -> str:
    return "".join(letter for letter in unit if letter.isascii() or category(letter)[0] != "P")


def _plain(text: str) -> str:
    """Convert to lower case, with a space for everything but letters, digits and marks on letters."""
    return "".join(letter if _counts(letter) else " " for letter in text.lower())


def _counts(letter: str) -> bool:
    return letter.isalnum() or category(letter)[0] == "M"


def _without_outer_marks(part: str) -> str:
    inside = [i for i, letter in enumerate(part) if _counts(letter)]
    return part[inside[0] : inside[-1] + 1] if inside else ""


class _Right(NamedTuple):
    exact: float
    share: float


def _right_words(prediction: str, answer: str) -> _Right:
    right = words_in_place(prediction, answer)
    return _Right(float(all(right)), sum(right) / len(right))


def _right_items(prediction: str, answers: Sequence[str]) -> _Right:
    expected = {" ".join(_words(answer)) for answer in answers}
    single_words = not any(" " in answer.strip() for answer in answers)
    listed = _END.split(_NUMBERING.sub(", ", prediction.strip()), maxsplit=1)[0]
    items: set[str] = set()
    for line in listed.splitlines():
        for part in _SEPARATORS.split(line):
            named = part.split() if single_words else [part]
            items |= {" ".join(_words(one)) for one in named} - {""}
        if len(items) >= len(expected):
            break
    return _Right(float(items == expected), len(items & expected) / len(expected))
