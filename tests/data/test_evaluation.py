"""Held-out cases: exact, grouped, lazy, and independent of the other cases."""

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser

from data.cases import CaseTask, Frame
from data.evaluation import EvaluationData
from data.fact_task import Facts
from data.facts import Split
from data.mixture import EvictionData
from data.packing import split_tokens, spread_windows
from data.question_task import QuestionTask
from data.ruler import FrequentWords
from data.text import Splits
from sparsekv_pl.models.batch import CaseInfo
from sparsekv_pl.models.encoding import Encoder

SPLITS = Splits(0.6, 0.2, 0.2)
SIDES: tuple[Split, ...] = ("held_out", "validation")


@pytest.fixture
def source(numbered):
    """Two hundred documents."""
    return replace(numbered, count=200)


@pytest.fixture
def make(tokenizer, source) -> Callable[..., EvaluationData]:
    """EvaluationData(**options), set up."""

    def data(with_tokenizer=tokenizer, **options: Any) -> EvaluationData:
        small: dict[str, Any] = {
            "text": source,
            "splits": SPLITS,
            "lengths": [300, 500],
            "depths": [0.0, 0.5, 1.0],
            "cases_per_cell": 2,
            "windows": 5,
            "continuation_tokens": 20,
            "batch_size": 4,
        }
        made = EvaluationData(**(small | options))
        made.tokenizer = with_tokenizer
        made.setup()
        return made

    return data


def _cases(data):
    """{id: (context, continuation, info)} of everything that the loader gives."""
    cases = {}
    for batch in data.test_dataloader():
        for row, info in enumerate(batch["cases"]):
            continuation = batch["continuation_ids"][row, : batch["continuation_lengths"][row]]
            assert info.id not in cases
            cases[info.id] = (batch["context_ids"][row].tolist(), continuation.tolist(), info)
    return cases


class Counting(CaseTask):
    """Words of the haystack, nowhere in particular; counts how many cases it made."""

    def __init__(self, name="counting", extra=0) -> None:
        self.name, self.extra, self.uses_depth, self.made = name, extra, False, 0

    def case(self, frame: Frame, haystack, length, depth, rng, query_aware=False):
        """Ignores everything but the length; ``extra`` tokens too many."""
        assert depth is None
        self.made += 1
        start = rng.randrange(100)
        filler = haystack.ids[start : start + length - len(frame.prefix_ids) + self.extra]
        return frame.build(filler, "How many?", "", CaseInfo("", self.name, ("7",)), query_aware)


def test_batches_have_one_task_and_one_exact_length(make, tokenizer):
    data = make()
    seen = []
    for batch in data.test_dataloader():
        rows = len(batch["cases"])
        assert 1 <= rows <= 4
        [(task, length)] = {(info.task, batch["context_ids"].shape[1]) for info in batch["cases"]}
        assert all(f"{task}/L{length}" in info.id for info in batch["cases"])
        assert batch["context_ids"].dtype == batch["continuation_lengths"].dtype == torch.int64
        assert batch["continuation_ids"].shape == (rows, int(batch["continuation_lengths"].max()))
        for ids, used in zip(batch["continuation_ids"], batch["continuation_lengths"], strict=True):
            assert ids[used:].eq(tokenizer.eos_token_id).all()
        seen += [(task, length)] * rows
    expected = [("text", 300)] * 5 + [("text", 500)] * 5 + [("facts", 300)] * 6 + [("facts", 500)] * 6
    assert seen == expected
    assert list(_cases(data))[10:16] == [f"facts/L300/d{d}/s0/{i}" for i in (0, 1) for d in ("0.00", "0.50", "1.00")]


def test_no_document_was_trained_on(make, source, tokenizer):
    training = EvictionData(source, 300, 20, batch_size=2, splits=SPLITS)
    training.tokenizer = tokenizer
    stream = iter(training.train_dataloader())
    trained = {name for _ in range(60) for row in next(stream)["document_ids"] for name in row.split(" + ")}
    measured = {name for *_, info in _cases(make()).values() for name in info.document_ids}
    assert len(trained) > 50
    assert measured
    assert not trained & measured


def test_validation_shares_no_document_wording_or_case_with_held_out(make):
    tasks = [Facts(), QuestionTask("told")]
    held_out, validation = (_cases(make(split=split, tasks=tasks, lengths=[500])) for split in SIDES)
    assert [name.removeprefix("validation/") for name in validation if "text" not in name] == list(held_out)[5:]
    sides = [[info for *_, info in cases.values()] for cases in (held_out, validation)]
    for shared in (
        [{name for info in side for name in info.document_ids} for side in sides],
        [{info.question for info in side if info.question} for side in sides],
    ):
        assert all(shared)
        assert not shared[0] & shared[1]
    with pytest.raises(ValueError, match="task unseen has no wordings of the split validation: leave it out"):
        make(split="validation", tasks=[QuestionTask("unseen")], lengths=[500])


def test_cases_do_not_depend_on_what_else_is_asked_for(make):
    few = _cases(make())
    more = _cases(
        make(
            batch_size=3,
            tasks=[Counting(), Facts(2), Facts()],
            lengths=[700, 500, 300],
            depths=[1.0, 0.9, 0.5, 0.0],
            seeds=[3, 0],
            cases_per_cell=3,
        )
    )
    assert len(more) > len(few)
    assert all(more[case_id] == case for case_id, case in few.items())


def test_cases_are_the_same_in_every_process(make):
    digest = hashlib.sha256()
    for case_id, (context, continuation, info) in _cases(make()).items():
        digest.update(repr((case_id, context, continuation, info.question, info.answers, info.document_ids)).encode())
    assert digest.hexdigest()[:16] == "c0d53c3e610e6aa1", "cases changed: figures measured before do not compare"


def test_seeds_numbers_depths_and_lengths_differ(make):
    cases = _cases(make(seeds=[0, 1], windows=0))
    assert len({info.question for *_, info in cases.values()}) == len(cases) == 24
    assert {info.seed for *_, info in cases.values()} == {0, 1}
    assert {info.depth for *_, info in cases.values()} == {0.0, 0.5, 1.0}


def test_tasks_without_depth_are_made_once_by_seed_and_number(make):
    cases = _cases(make(tasks=[Counting()], seeds=[4, 5], windows=0, lengths=[300]))
    assert list(cases) == [f"counting/L300/s{seed}/{i}" for i in (0, 1) for seed in (4, 5)]
    assert {info.depth for *_, info in cases.values()} == {None}


def test_batches_are_made_when_asked_for(make):
    task = Counting()
    data = make(tasks=[task], windows=0, cases_per_cell=10_000, lengths=[300, 500])
    assert task.made == 1  # setup tries the shortest length
    batches: Any = data.test_dataloader().dataset
    assert (len(batches), task.made) == (5000, 1)
    late = batches[4000]
    assert task.made == 5
    assert late["cases"][0].id == "counting/L500/s0/6000"
    assert torch.equal(late["context_ids"], batches[4000]["context_ids"])


def test_windows_are_spread_over_the_held_out_text(make, source, tokenizer):
    cases = _cases(make(tasks=[]))
    text = split_tokens(source, SPLITS, "held_out", tokenizer, 320)
    for (context, continuation, info), window in zip(
        list(cases.values())[:5], spread_windows(text, 5, 320, 20, Encoder(tokenizer)), strict=True
    ):
        assert (context, continuation) == (window.ids[:300], window.ids[300:])
        assert info.document_ids == tuple(window.document_ids)
        assert (info.answers, info.depth, info.context) == ((), None, tokenizer.decode(context))
    assert next(iter(cases)) == "text/L300+20/t0"


def test_text_is_cut_off_by_length_alone(make):
    one = make(lengths=[10], tasks=[Counting()], windows=0)
    two = make(lengths=[10, 900], tasks=[Counting()], windows=0)
    taken = [data._texts["counting", 10] for data in (one, two)]
    assert taken[0] == taken[1]
    assert 640 <= len(taken[0].ids) < len(two._texts["counting", 900].ids)


def test_the_press_sees_the_question_only_when_asked_to(make, tokenizer):
    blind, aware = (_cases(make(windows=0, query_aware=aware)) for aware in (False, True))
    assert list(blind) == list(aware)
    for case_id, (context, continuation, info) in aware.items():
        assert blind[case_id][2].question == info.question
        asked = tokenizer.encode(info.question, add_special_tokens=False)
        assert len(context) == len(blind[case_id][0])
        assert context[-len(asked) :] == asked
        assert asked + continuation == blind[case_id][1]


def test_yaml_chooses_it():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(EvaluationData, "data")
    facts = {"class_path": "data.fact_task.Facts", "init_args": {"needles": 2}}
    given = {"lengths": [128, 256], "depths": [0, 1], "tasks": [facts]}
    config = parser.parse_object({"data": {"class_path": "data.evaluation.EvaluationData", "init_args": given}})
    made = parser.instantiate(config)["data"]
    assert (made.lengths, made.depths, made.tasks[0].name) == ([128, 256], [0.0, 1.0], "facts-2")
    with pytest.raises(Exception, match="lengths"):
        given["lengths"] = ["many"]
        parser.parse_object({"data": {"class_path": "data.evaluation.EvaluationData", "init_args": given}})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": []}, "lengths is empty"),
        ({"depths": []}, "depths is empty"),
        ({"seeds": []}, "seeds is empty"),
        ({"lengths": [0]}, "lengths has 0"),
        ({"depths": [0.5, 1.1]}, "depths has 1.1"),
        ({"depths": [0.331, 0.333]}, "depths has 0.33 more than once"),
        ({"lengths": [96, 96]}, "lengths has 96 more than once"),
        ({"seeds": [1, 1]}, "seeds has 1 more than once"),
        ({"tasks": [Facts(), Facts()]}, "tasks has facts more than once"),
        ({"tasks": [Counting("text")]}, "tasks has text more than once"),
        ({"cases_per_cell": -1}, "cases_per_cell is -1"),
        ({"windows": -1}, "windows is -1"),
        ({"continuation_tokens": 1}, "continuation_tokens is 1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"windows": 0, "tasks": []}, "nothing to evaluate"),
        ({"windows": 0, "cases_per_cell": 0}, "nothing to evaluate"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        EvaluationData(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": [300, 90_000]}, r"Numbered has \d+ tokens, task facts needs 90000 of them at length 90000"),
        ({"splits": Splits(1.0, 0.0, 0.0)}, "held_out split of the text has no document"),
        ({"lengths": [40, 300]}, "leave no room for text in a context of 40 tokens"),
        ({"tasks": [Counting(extra=1)]}, "task counting made a context of 301 tokens instead of 300"),
        ({"windows": 3000}, "3000 windows of 320 tokens"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_measured(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_needs_a_tokenizer():
    with pytest.raises(ValueError, match="EvaluationData has no tokenizer"):
        EvaluationData().setup()


def test_tasks_without_a_depth_can_have_as_many_cases_as_others(make):
    tasks = [Facts(), FrequentWords()]
    for given, expected in ((None, 2), (6, 6)):
        data = make(tasks=tasks, windows=0, lengths=[600], cases_without_depth=given)
        cases = [case for batch in data.test_dataloader() for case in batch["cases"]]
        counts = Counter(case.task for case in cases)
        assert counts == {"facts": 2 * 3, "fwe": expected}
        assert len({case.id for case in cases}) == len(cases)
    with pytest.raises(ValueError, match="cases_without_depth is -1: give at least 0"):
        make(cases_without_depth=-1)
