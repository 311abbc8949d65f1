"""Facts that must be carried over read and written tokens: training's rows and evaluation's cases."""

import random
import re
from typing import Any

import pytest

from data import copying, listed_items
from data.assignments import Assignments
from data.carry_task import MADE, Carry
from data.cases import Frame, TrainingCase, read_after
from data.counting import Counting
from data.facts import SPLITS, Split
from data.mixture import EvictionData
from data.packing import Tokens
from data.passage import Passage
from sparsekv_pl.models.batch import IGNORE
from tests.data.dialogue import PLAY

CONTEXT = 200


def haystack(tokenizer: Any) -> Tokens:
    ids = tokenizer.encode(PLAY, add_special_tokens=False)
    return Tokens(ids, [("play", len(ids))])


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("tokens", [600, 1200])
def test_a_case_reads_and_writes_as_many_tokens_as_it_says(
    kind: str, tokens: int, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copying, "WORDS_PER_TOKEN", 0.05)  # of this tokenizer
    monkeypatch.setattr(listed_items, "TOKENS_PER_ITEM", 40)
    frame, task = Frame(tokenizer), Carry(kind, tokens)
    case = task.case(frame, haystack(tokenizer), CONTEXT, 0.5, random.Random(0))
    [*answers] = case.info.answers
    written = len(frame.encode(f" {', '.join(answers)}"))
    assert task.name == case.info.task == f"{kind}-{tokens}"
    assert len(case.context_ids) == CONTEXT and case.info.max_new_tokens >= written
    assert tokens * 0.6 < len(case.continuation_ids) + written < tokens * 1.5
    read = tokenizer.decode([*case.context_ids, *case.continuation_ids])
    assert case.info.question in read
    if kind in ("copying", "variables", "facts"):
        assert " ".join(answers[0].split()) in " ".join(read.split())
    again = task.case(frame, haystack(tokenizer), CONTEXT, 0.5, random.Random(0))
    assert again == case


def test_equal_lengths_are_measured_as_a_batch(tokenizer: Any) -> None:
    frame, task = Frame(tokenizer), Carry("variables", 600)
    cases = [task.case(frame, haystack(tokenizer), CONTEXT, None, random.Random(seed)) for seed in range(4)]
    assert {len(case.continuation_ids) for case in cases} == {600}


@pytest.mark.parametrize("split", SPLITS)
def test_the_value_follows_its_chain(split: Split) -> None:
    asked, told = Assignments((3, 3)).ask(Passage(), random.Random(3), split), dict[str, str]()
    for sentence in asked.hidden:
        name, *before = sorted((name for name in asked.names if name in sentence), key=sentence.index)
        told[name] = told[before[0]] if before else re.findall(r"\d+", sentence)[0]
    [last] = [name for name in asked.names if name in asked.turn.question]
    assert told[last] == asked.turn.answer and len(set(told.values())) == 2


def test_counting_goes_on_from_the_start_by_the_step() -> None:
    asked = Counting((9, 9)).ask(Passage(), random.Random(1), "train")
    start, step = map(int, re.findall(r"\d+", asked.hidden[0]))
    assert asked.turn.answer == ", ".join(str(start + place * step) for place in range(9))


def test_a_question_s_text_is_read_after_the_eviction(tokenizer: Any) -> None:
    case = TrainingCase([1, 2, 3, 4], [5, 6], [IGNORE, 6], ["a"], "facts")
    moved = read_after(case, 3)
    assert (moved.context_ids, moved.continuation_ids) == ([1], [2, 3, 4, 5, 6])
    assert moved.labels == [IGNORE] * 4 + [6] and read_after(case, 0) is case
    settings = {"context_tokens": 800, "continuation_tokens": 64, "batch_size": 2, "retrieval_share": 1.0}
    data = EvictionData(**settings, read_tokens=(300, 500), questions={"list": 1.0, "counting": 1.0})
    data.tokenizer = tokenizer
    data.setup()
    stream = iter(data.train_dataloader())
    lengths = []
    for _ in range(4):
        batch = next(stream)
        lengths.append(batch["context_ids"].shape[1])
        assert batch["continuation_ids"].shape[1] > 800 - lengths[-1]
        assert (batch["labels"][:, : 800 - lengths[-1]] == IGNORE).all() and "context_lengths" not in batch
    assert len(set(lengths)) > 1 and set(lengths) <= set(range(300, 501))
    assert data.evicted_lengths == range(300, 801)


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"kind": "jumping", "tokens": 100}, "kind is 'jumping'"), ({"kind": "list", "tokens": 9}, "tokens is 9")],
)
def test_unknown_settings_are_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Carry(**settings)
    with pytest.raises(ValueError, match=r"read_tokens is \(5, 400\)"):
        EvictionData(read_tokens=(5, 400))
