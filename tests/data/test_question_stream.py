"""Training with several kinds of questions: default as it was, resumed to the token, counted, at many lengths."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pytest
import torch

from data import EvictionData
from data.asked_rows import PASSED_OVER
from data.question_kinds import QUESTION_KINDS
from data.text import Document, Splits, TextSource
from sparsekv_pl.models.batch import IGNORE, Batch
from tests.data.dialogue import PLAY

SPLITS = Splits(0.6, 0.2, 0.2)
ALL = dict.fromkeys(QUESTION_KINDS, 1.0)


@dataclass
class Scenes(TextSource):
    """Sixty pieces of the play; every third is turned into plain text, in which nobody speaks."""

    def documents(self) -> Iterator[Document]:
        """Five speeches each."""
        speeches = PLAY.strip().split("\n\n")
        for i in range(60):
            spoken = speeches[i * 5 : i * 5 + 5]
            plain = [speech.split("\n", 1)[1] for speech in spoken]
            yield Document(f"scene/{i}", "\n".join(plain) if i % 3 == 0 else "\n\n".join(["", *spoken, ""]))


def make(tokenizer: Any, source: Any, **options: Any) -> EvictionData:
    settings = {"context_tokens": 900, "continuation_tokens": 60, "batch_size": 2, "splits": SPLITS}
    settings |= {"retrieval_share": 1.0, "validation_windows": 0, "validation_needles": 0, "questions": ALL}
    data = EvictionData(source, **(settings | options))  # type: ignore[arg-type]
    data.tokenizer = tokenizer
    data.setup()
    return data


def take(data: EvictionData, count: int) -> list[Batch]:
    return list(islice(iter(data.train_dataloader()), count))


def same(one: Batch, other: Batch) -> bool:
    return all(torch.equal(one[k], other[k]) for k in ("context_ids", "continuation_ids", "labels")) and all(  # type: ignore[literal-required]
        one.get(k) == other.get(k) for k in ("tasks", "document_ids", "context_lengths", "left_out_questions")
    )


def kinds_of(batches: list[Batch]) -> Counter[str]:
    return Counter(kind for batch in batches for task in batch["tasks"] for kind in task.split("+"))


@pytest.mark.parametrize(("shortest", "digest"), [(None, "3b981d8a7f251f20"), (240, "dcd7389e1d1ffa0e")])
@pytest.mark.parametrize("questions", [None, {"facts": 3.0}])
def test_facts_alone_are_what_they_were(tokenizer, numbered, shortest, digest, questions) -> None:
    data = EvictionData(
        numbered, 300, 20, 2, splits=SPLITS, validation_windows=2, validation_needles=3, shortest_context=shortest,
        questions=questions,
    )  # fmt: skip
    data.tokenizer = tokenizer
    data.setup()
    loader = data.train_dataloader()
    assert not [name for name in loader.settings() if name.startswith("questions")], "older checkpoints have none"
    found = hashlib.blake2b(digest_size=8)
    for batch in [*islice(iter(loader), 12), *data.val_dataloader()]:
        ids = [batch[name].tolist() for name in ("context_ids", "continuation_ids", "labels")]  # type: ignore[literal-required]
        found.update(repr([*ids, batch["document_ids"], batch["tasks"]]).encode())
    assert found.hexdigest() == digest


@pytest.mark.parametrize("chat", [True, False])
def test_every_kind_is_asked_at_every_length(tokenizer, plain_tokenizer, chat) -> None:
    chosen = tokenizer if chat else plain_tokenizer
    data = make(chosen, Scenes(), shortest_context=750, needles=(1, 4), continuation_tokens=150)
    batches = take(data, 35)
    assert set(kinds_of(batches)) == set(QUESTION_KINDS)
    asked = 0
    for batch in batches:
        for row, length in enumerate(batch.get("context_lengths", [batch["context_ids"].shape[1]] * 2)):
            assert 750 <= length <= 900
            context = chosen.decode(batch["context_ids"][row, :length])
            labels, ids = batch["labels"][row], batch["continuation_ids"][row]
            assert labels[0] == IGNORE
            supervised = labels != IGNORE
            assert torch.equal(labels[supervised], ids[supervised])
            answers = [chosen.decode(part) for part in supervised_runs(labels)]
            asked += len(answers)
            if batch["tasks"][row] in ("quotes", "neighbours", "cloze"):
                shown = " ".join(context.split())
                assert all(answer.strip().rstrip(".") in shown for answer in answers)
    assert asked > 1.5 * len(batches) * 2, "several questions of one context"


def supervised_runs(labels: torch.Tensor) -> list[list[int]]:
    runs: list[list[int]] = [[]]
    for label in labels.tolist():
        if label != IGNORE:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def test_the_continuation_limits_the_number_of_questions(tokenizer) -> None:
    few = take(make(tokenizer, Scenes(), needles=(4, 4), continuation_tokens=50), 8)
    many = take(make(tokenizer, Scenes(), needles=(4, 4), continuation_tokens=300), 8)

    def count(batches: list[Batch]) -> int:
        return sum(len(supervised_runs(labels)) for batch in batches for labels in batch["labels"])

    assert 16 <= count(few) < count(many) <= 64
    rows = [(batch, row) for batch in few for row in range(2)]
    for batch, row in rows:
        length = batch.get("continuation_lengths", [batch["continuation_ids"].shape[1]] * 2)[row]
        assert length <= 200 or len(supervised_runs(batch["labels"][row])) == 1


def test_a_kind_without_anything_to_ask_is_drawn_again_and_counted(tokenizer, numbered) -> None:
    data = make(tokenizer, numbered, questions={"speakers": 1, "quotes": 1})
    batches = take(data, 12)
    last = batches[-1]
    assert last["left_out_questions"]["quotes"] == 0
    assert last["left_out_questions"]["speakers"] > 8
    assert set(kinds_of(batches)) == {"quotes"}
    with pytest.raises(
        ValueError, match=rf"the last {PASSED_OVER} pieces of text, 900 tokens .* questions speakers: add"
    ):
        take(make(tokenizer, numbered, questions={"speakers": 1}), 1)


def test_text_without_anything_to_ask_is_passed_over(tokenizer) -> None:
    data = make(tokenizer, Scenes(), context_tokens=700, continuation_tokens=20, questions={"speakers": 1})
    batches = take(data, 10)
    assert set(kinds_of(batches)) == {"speakers"}
    assert batches[-1]["left_out_questions"]["speakers"] > 0


def test_resumes_to_the_token_with_its_counts(tokenizer) -> None:
    first = make(tokenizer, Scenes(), shortest_context=750).train_dataloader()
    iterator = iter(first)
    for _ in range(5):
        next(iterator)
    state = first.state_dict()
    rest = [next(iterator) for _ in range(6)]
    second = make(tokenizer, Scenes(), shortest_context=750).train_dataloader()
    second.load_state_dict(state)
    assert all(map(same, rest, islice(iter(second), 6)))
    assert sum(rest[0]["left_out_questions"].values()) > 0


def test_resuming_with_other_kinds_is_refused_by_name(tokenizer) -> None:
    saved = {
        name: make(tokenizer, Scenes(), questions=own).train_dataloader().state_dict() for name, own in KINDS.items()
    }
    for name, message in {
        "facts": "questions.facts was not there, is 1.0; questions.quotes was not there, is 2.0",
        "cloze": "questions.quotes was not there, is 2.0; questions.cloze was 2.0, is not there",
        "more": "questions.quotes was 3.0, is 2.0",
    }.items():
        with pytest.raises(ValueError, match=message):
            make(tokenizer, Scenes(), questions=KINDS["mixed"]).train_dataloader().load_state_dict(saved[name])
    with pytest.raises(ValueError, match=r"questions\.facts was 1.0, is not there"):
        make(tokenizer, Scenes(), questions=None).train_dataloader().load_state_dict(saved["mixed"])
    turned = dict(reversed(KINDS["mixed"].items()))
    make(tokenizer, Scenes(), questions=turned).train_dataloader().load_state_dict(saved["mixed"])


KINDS: dict[str, dict[str, float] | None] = {
    "facts": None,
    "mixed": {"facts": 1, "quotes": 2},
    "cloze": {"facts": 1, "cloze": 2},
    "more": {"facts": 1, "quotes": 3},
}


def test_one_kind_left_out_leaves_the_others(tokenizer) -> None:
    whole, without = (
        kinds_of(take(make(tokenizer, Scenes(), questions=questions), 20)) for questions in (ALL, ALL | {"told": 0})
    )
    assert whole["told"] > 0
    assert without["told"] == 0
    assert set(without) == set(whole) - {"told"}


def test_validation_asks_the_kinds_in_turn_in_its_own_words(tokenizer) -> None:
    needles = 2 * len(QUESTION_KINDS)
    data = make(tokenizer, Scenes(), validation_needles=needles)
    batches = list(data.val_dataloader())
    tasks = [task for batch in batches for task in batch["tasks"]]
    in_turn = [task == kind for task, kind in zip(tasks, list(QUESTION_KINDS) * 2, strict=True)]
    assert sum(in_turn) >= needles - 2, "others had nothing to ask"
    assert set(tasks) == set(QUESTION_KINDS)
    texts = {document.id: document.text for document in Scenes().documents()}
    for split, own in (("validation", batches), ("train", take(data, 20))):
        seen = {name for batch in own for row in batch["document_ids"] for name in row.split(" + ")}
        assert seen and {SPLITS.of(texts[name]) for name in seen} == {split}
    assert all(map(same, batches, make(tokenizer, Scenes(), validation_needles=needles).val_dataloader()))


@pytest.mark.parametrize("setting", ["context_tokens", "shortest_context"])
def test_a_context_without_room_for_a_kind_is_refused_before_training(tokenizer, setting) -> None:
    with pytest.raises(ValueError, match=rf"{setting} is 250: .* of the kind \w+ needs \d+ tokens"):
        make(tokenizer, Scenes(), **{setting: 250})
    make(tokenizer, Scenes(), **{setting: 250, "questions": {"quotes": 1}})
    make(tokenizer, Scenes(), **{setting: 250, "retrieval_share": 0})
