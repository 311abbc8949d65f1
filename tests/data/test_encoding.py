"""Text is encoded as one whole: joined parts decode to the joined text, and no cut falls into a character."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from data.evaluation import EvaluationData
from data.fact_task import Facts
from data.long_haystack import HaystackData
from data.mixture import EvictionData
from data.needles import NeedleTask
from data.packing import take_tokens
from data.question_sources import PlantedQuestions
from data.question_task import QuestionTask
from data.questions import QuestionData
from data.ruler_needles import Niah
from data.text import Document, Splits, TextSource
from sparsekv_pl.evaluation.hosted_module import prompt_of
from sparsekv_pl.models.batch import IGNORE
from sparsekv_pl.models.encoding import Encoder
from tests.data.tiny_tokenizers import CHINESE, ENGLISH, byte_level, sentencepiece

TOKENIZERS = {
    "legacy": sentencepiece([ENGLISH * 20, CHINESE]),
    "metaspace": sentencepiece([ENGLISH * 20], legacy=False),
    "bytes": byte_level([ENGLISH * 20]),
    "opened": sentencepiece([ENGLISH * 20, CHINESE], bos=True),
    "opened_bytes": byte_level([ENGLISH * 20], bos=True),
}
SPLITS = Splits(0.4, 0.3, 0.3)


@dataclass
class Mixed(TextSource):
    """Chinese and English; every document is another."""

    def documents(self) -> Iterator[Document]:
        """40 of them."""
        for i in range(40):
            yield Document(f"doc/{i}", f"{i} {CHINESE * 12}{ENGLISH} {CHINESE[i % 9 :] * 12}")


@pytest.fixture(params=TOKENIZERS)
def bare(request: pytest.FixtureRequest) -> Any:
    """A tokenizer without a chat template."""
    return TOKENIZERS[request.param]


def text_of(tokenizer: Any, ids: Any) -> str:
    return Encoder(tokenizer).decode([int(token) for token in ids if int(token) not in tokenizer.all_special_ids])


def test_parts_are_the_whole_cut_up(bare: Any) -> None:
    encoder = Encoder(bare)
    texts = ["The code is", " 48213", ".", "\n\nAnd the key of the", " 紅色盒子", "。", " box", "\n"]
    parts = encoder.parts(texts)
    whole = "".join(texts)
    joined = [token for part in parts for token in part]
    assert joined == encoder.encode(whole)
    line = bare.encode("the end\n" + whole, add_special_tokens=False)
    assert line[-len(joined) :] == joined, "it is what stands there in a longer text"
    for text, ids in zip(texts, parts, strict=True):
        assert encoder.decode([*encoder.start("a"), *ids]) == f"a{text}"
    for text in texts:
        assert encoder.decode(encoder.start("end\n") + encoder.encode(text)) == f"end\n{text}"


def test_every_supervised_value_is_the_value_and_nothing_else(bare: Any) -> None:
    text = take_tokens(Mixed().documents(), bare, 4000)
    for supervise in ("value", "value_and_stop"):
        task = NeedleTask(bare, 500, needles=(1, 2), ask="all", supervise=supervise)  # type: ignore[arg-type]
        for index in range(12):
            case = task.case(index, text)
            labelled = [token for token in case.labels if token != IGNORE]
            whole = text_of(bare, [*Encoder(bare).start("x"), *case.continuation_ids])[1:]
            stop = "." if supervise == "value_and_stop" else ""
            said = text_of(bare, [*Encoder(bare).start("x"), *labelled])[1:]
            assert said.startswith(f" {case.fact.value}{stop}")
            assert f"{case.fact.answer_prefix} {case.fact.value}." in whole
            assert Encoder(bare).encode(whole) == case.continuation_ids


def test_no_context_or_continuation_splits_a_character(bare: Any) -> None:
    def check(context: Any, continuation: Any) -> None:
        assert "\ufffd" not in text_of(bare, context)
        assert "\ufffd" not in text_of(bare, continuation).rstrip("\ufffd"), "its last character may go on"

    training = EvictionData(Mixed(), 350, 40, 3, 0.5, validation_windows=2, validation_needles=2, splits=SPLITS)
    ragged = EvictionData(Mixed(), 300, 40, 3, 0, validation_windows=0, splits=SPLITS, shortest_context=200)
    kinds = {"facts": 1, "told": 1, "quotes": 1, "cloze": 1, "neighbours": 1, "order": 1}
    mixed = EvictionData(Mixed(), 420, 40, 3, 1, (1, 3), splits=SPLITS, validation_needles=6, questions=kinds)
    mixed.validation_windows = 0
    for data in (training, ragged, mixed):
        data.tokenizer = bare
        data.setup()
        stream = iter(data.train_dataloader())
        for batch in [next(stream) for _ in range(8)] + list(data.val_dataloader()):
            lengths = batch.get("context_lengths", [batch["context_ids"].shape[1]] * len(batch["tasks"]))
            for row, length in enumerate(lengths):
                check(batch["context_ids"][row, :length], batch["continuation_ids"][row])
    tasks = [Facts(), Niah("niah_single_2"), QuestionTask("unseen"), QuestionTask("told")]
    evaluation = EvaluationData(
        Mixed(), SPLITS, tasks, [700], [0.0, 0.3, 1.0], cases_per_cell=3, windows=7, continuation_tokens=30
    )
    asked = QuestionData(PlantedQuestions(Mixed(), SPLITS, facts=1), samples=4, max_tokens=350)
    for measured in (evaluation, asked, HaystackData(Mixed(), 900, depths=[0.0, 0.4, 1.0])):
        measured.tokenizer = bare
        measured.setup()
        batches = measured.test_dataloader() if measured is not asked else asked.predict_dataloader()
        for batch in batches:
            for row, case in enumerate(batch["cases"]):
                continuation = batch["continuation_ids"][row, : batch["continuation_lengths"][row]]
                check(batch["context_ids"][row % len(batch["context_ids"])], continuation)
                assert "\ufffd" not in case.context + prompt_of(case), "hosted models are sent this"


@pytest.mark.parametrize("name", ["opened", "opened_bytes", "legacy", "bytes"])
def test_text_windows_begin_with_a_bos_where_the_tokenizer_wants_one(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    wanted = name.startswith("opened")
    training = EvictionData(Mixed(), 60, 20, 2, 0, validation_needles=0, validation_windows=3, splits=SPLITS)
    evaluation = EvaluationData(Mixed(), SPLITS, [], [60], windows=3, continuation_tokens=20)
    for data in (training, evaluation):
        data.tokenizer = tokenizer
        data.setup()
    stream = iter(training.train_dataloader())
    for batch in [next(stream), *training.val_dataloader(), *evaluation.test_dataloader()]:
        assert batch["context_ids"].shape[1] == 60
        for row in batch["context_ids"]:
            assert (row == tokenizer.bos_token_id).nonzero().flatten().tolist() == [0] * wanted
