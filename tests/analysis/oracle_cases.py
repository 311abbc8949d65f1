"""Samples for the tests of the oracle's reports."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sparsekv_pl.analysis.oracle_findings import Choice, Sample
from sparsekv_pl.storage.records import Record

BLOCKS, LAYERS, HEADS = 12, 2, 3
Scores = Callable[[int, int], Sequence[float]]


def record(number: int, scores: Sequence[float], answer: int | None, bm25: Sequence[float] | None = None) -> Record:
    """A record whose heads all attend as ``scores``; BM25 finds the answer unless ``bm25`` is given."""
    mass = np.broadcast_to(np.asarray(scores), (LAYERS, HEADS, len(scores)))
    hit = [float(block == answer) for block in range(len(scores))]
    return {
        "variant": "base",
        "id": f"question/{number}",
        "question": f"What is {number}?",
        "answers": [str(number)],
        "documents": [f"document/{number}"],
        "depth": None,
        "context_tokens": 512 * len(scores) - 7,
        "prompt_tokens": 512 * len(scores) + 20,
        "num_blocks": len(scores),
        "answer_blocks": None if answer is None else [answer],
        "mass": mass.tolist(),
        "bm25": list(hit if bm25 is None else bm25),
    }


def invented(
    scores: Callable[[int], Sequence[float]], questions: int = 22, choice: Choice | None = None, **more: Any
) -> list[Sample]:
    """A sample per question, its answer in blocks 1, 2, ... 11, 1, ... in turn; ``scores`` from the answer's block."""
    answers = [number % (BLOCKS - 1) + 1 for number in range(questions)]
    return [Sample(record(i, scores(a), a, **more), choice or Choice()) for i, a in enumerate(answers)]


def at(peaks: dict[int, float], rest: float = 0.001) -> list[float]:
    return [peaks.get(block, rest) for block in range(BLOCKS)]


def hot(answer: int) -> list[float]:
    """Scores mostly on the answer, some on the sink."""
    return at({0: 0.2, answer: 0.6})


def even(_: int) -> list[float]:
    return [0.05] * BLOCKS


def by_place(answer: int) -> list[float]:
    """Scores on the last blocks for every question, and never on the answer."""
    return [0.0 if block == answer else 0.01 * block for block in range(BLOCKS)]
