"""Scores of what a model answered against what was hidden: substring, exact match, token F1 and ROUGE-L."""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.text import rouge_score, squad

RETRIEVAL_SCORES = ("substring", "exact", "f1", "rouge_l")

# One to three digits with a full stop or bracket; a value of more digits at a sentence's end is none.
_NUMBERING = re.compile(r"(?:^|(?<=\s))\(?\d{1,3}[.)]\s+")
_END = re.compile(r"[.!?](?=\s|$)|\n\s*\n")
_SEPARATORS = re.compile(r"[,;]|\band\b", re.IGNORECASE)
_OUTER_MARKS = re.compile(r"^[\W_]+|[\W_]+$")


def retrieval_scores(prediction: str, answers: Sequence[str]) -> dict[str, float]:
    """Scores in [0, 1] of one prediction.

    - substring: share of the answers that it contains, case aside (RULER's string_match_all).
    - exact: 1 where the extracted value is the answer. For one answer: its first words, as many as the answer has. For
      several: the set of items it lists (at most one sentence, and no more lines than it takes to name as many items as
      there are answers; split at commas, "and", line breaks and, where no answer has a space, spaces; numbering aside).
      Both sides without case and outer punctuation.
    - f1: SQuAD's token F1 of the whole prediction; several answers are joined.
    - rouge_l: ROUGE-L F-measure, likewise.

    >>> retrieval_scores(" 4823915.", ["4823915"])
    {'substring': 1.0, 'exact': 1.0, 'f1': 1.0, 'rouge_l': 1.0}
    >>> retrieval_scores("red, and blue. Also", ["blue", "red", "grey"])["exact"]
    0.0
    """
    if not answers or not all(_words(answer) for answer in answers):
        raise ValueError(f"answers are {list(answers)!r}: give at least one, each with a letter or digit")
    lowered, joined = prediction.lower(), " ".join(answers)
    exact = _first_words(prediction, answers[0]) if len(answers) == 1 else _same_items(prediction, answers)
    f1 = squad(
        {"prediction_text": prediction, "id": ""}, {"answers": {"answer_start": [0], "text": [joined]}, "id": ""}
    )["f1"]
    rouge = rouge_score(prediction, joined, rouge_keys="rougeL")["rougeL_fmeasure"]
    return {
        "substring": sum(answer.lower() in lowered for answer in answers) / len(answers),
        "exact": float(exact),
        "f1": float(f1) / 100,
        "rouge_l": float(rouge),
    }


def _words(text: str) -> list[str]:
    """Words without case and outer punctuation; marks alone are none."""
    return [word for part in text.split() if (word := _OUTER_MARKS.sub("", part).casefold())]


def _first_words(prediction: str, answer: str) -> bool:
    expected = _words(answer)
    return _words(prediction)[: len(expected)] == expected


def _same_items(prediction: str, answers: Sequence[str]) -> bool:
    expected = {" ".join(_words(answer)) for answer in answers}
    single_words = not any(" " in answer for answer in expected)
    listed = _END.split(_NUMBERING.sub(", ", prediction.strip()), maxsplit=1)[0]
    items: set[str] = set()
    for line in listed.splitlines():
        for part in _SEPARATORS.split(line):
            words = _words(part)
            items |= set(words) if single_words else {" ".join(words)} - {""}
        if len(items) >= len(expected):
            break
    return items == expected


class RetrievalScores(Metric):
    """Means of ``retrieval_scores`` over all cases and ranks; NaN where there is none.

    >>> metric = RetrievalScores()
    >>> metric.update(retrieval_scores("7", ["7"]))
    >>> metric.update({"substring": [0.0], "exact": [0.0], "f1": [0.5], "rouge_l": [0.5]})
    >>> metric.compute()["f1"]
    tensor(0.7500)
    """

    higher_is_better = True
    is_differentiable = False
    total: Tensor
    cases: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(len(RETRIEVAL_SCORES), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("cases", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, scores: Mapping[str, float | Sequence[float]]) -> None:
        """Add one case, or as many as the lists are long."""
        values = [torch.as_tensor(scores[name], dtype=torch.float64).reshape(-1) for name in RETRIEVAL_SCORES]
        stacked = torch.stack(values).to(self.total.device)
        self.total += stacked.sum(1)
        self.cases += stacked.shape[1]

    def compute(self) -> dict[str, Tensor]:
        """Scalar float32 tensors."""
        return dict(zip(RETRIEVAL_SCORES, (self.total / self.cases).float(), strict=True))
