"""Answers of points decoded together equal those decoded alone, and finished rows cost nothing."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kvpress import AdaKVPress, KeyRerotationPress, KnormPress, PyramidKVPress, SnapKVPress
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsekv_pl.evaluation import measurement
from sparsekv_pl.evaluation.measurement import Measurement
from sparsekv_pl.evaluation.points import Point
from sparsekv_pl.models.batch import CaseBatch, CaseInfo
from sparsekv_pl.models.decoder import decoder_of
from sparsekv_pl.storage.records import Record

CONTEXT, LENGTHS, MOST = 48, [8, 5, 7, 3], [2, 9, 1, 6]
POINTS = [
    Point(),
    Point(SnapKVPress(window_size=8), 0.75),
    Point(AdaKVPress(KnormPress()), 0.5),
    Point(PyramidKVPress(window_size=8), 0.5),
    Point(KeyRerotationPress(KnormPress()), 0.5),
    Point(KnormPress(), 0.5, chunk_tokens=16),
]


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def network(request: pytest.FixtureRequest, tiny_models: dict[str, str]) -> tuple[Any, Any]:
    folder = tiny_models[request.param]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def asked() -> CaseBatch:
    rows = torch.randint(2, 1024, (4, CONTEXT + max(LENGTHS)), generator=torch.Generator().manual_seed(0))
    return CaseBatch(
        context_ids=rows[:, :CONTEXT],
        continuation_ids=rows[:, CONTEXT:],
        continuation_lengths=torch.tensor(LENGTHS),
        cases=[CaseInfo(f"{i}", "needle", ("zebra",), max_new_tokens=most) for i, most in enumerate(MOST)],
    )


def measured(model: Any, tokenizer: Any, ahead: list[Point]) -> dict[str, list[Record]]:
    found = Measurement(model, tokenizer, asked())
    found.ahead = ahead
    vars(found)["stop_ids"] = set()  # a random model stops where rounding, which differs between processors, has it
    return {point.name: found.at(point) for point in POINTS}


def said(records: list[Record]) -> list[dict[str, Any]]:
    """A record without its time and memory."""
    costs = {"prefill_seconds", "eviction_seconds", "decode_seconds", "peak_bytes"}
    return [{name: value for name, value in record.items() if name not in costs} for record in records]


@contextmanager
def forwards(model: Any) -> Iterator[list[int]]:
    """Rows of each forward that decodes a token."""
    rows: list[int] = []

    def note(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
        if kwargs["input_ids"].shape[1] == 1:
            rows.append(len(kwargs["input_ids"]))

    hook = decoder_of(model).register_forward_pre_hook(note, with_kwargs=True)
    yield rows
    hook.remove()


def test_points_decoded_together_say_what_each_says_alone(network: tuple[Any, Any]) -> None:
    with forwards(network[0]) as alone_rows:
        alone = measured(*network, ahead=[])
    with forwards(network[0]) as rows:
        together = measured(*network, ahead=POINTS)
    for point in POINTS:
        assert said(together[point.name]) == said(alone[point.name]), point.name
        assert all(record["decode_seconds"] > 0 for record in together[point.name])
    assert len({record["answer"] for records in together.values() for record in records}) > len(MOST), (
        "every press said the same"
    )
    # Of every row a token fewer than it says: the question's forward says the first.
    wanted = [sum(most > step for most in MOST) for step in range(1, max(MOST))]
    assert alone_rows == wanted * len(POINTS)
    assert rows == [len(POINTS) * count for count in wanted]


@pytest.mark.parametrize("full", ["our share", "the machine"])
def test_no_more_points_wait_than_memory_holds(
    full: str, network: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if full == "our share":
        monkeypatch.setattr(measurement, "HELD_BYTES", 0)
    else:
        monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=0))
    with forwards(network[0]) as rows:
        measured(*network, ahead=POINTS)
    assert len(rows) == len(POINTS) * (max(MOST) - 1)


def test_a_point_that_fails_fails_alone(network: tuple[Any, Any]) -> None:
    class Faulty(KnormPress):
        def score(self, *_: Any, **__: Any) -> Tensor:
            raise RuntimeError("no scores")

    faulty, found = Point(Faulty(), 0.5), Measurement(*network, asked())
    found.ahead = [POINTS[0], faulty, POINTS[1]]
    alone = Measurement(*network, asked())
    assert said(found.at(POINTS[0])) == said(alone.at(POINTS[0]))
    with pytest.raises(RuntimeError, match="no scores"):
        found.at(faulty)
    assert said(found.at(POINTS[1])) == said(alone.at(POINTS[1]))


def test_answers_that_do_not_fit_together_are_decoded_one_after_the_other(
    network: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    decode, held = measurement.greedy_together, list[weakref.ref[Any]]()

    def small(model: Any, rows: list[Any], *rest: Any) -> None:
        if len(rows) > 1:
            held.extend(map(weakref.ref, rows))
            raise torch.OutOfMemoryError("too much")
        assert not any(one() for one in held), "they are in memory while the first is decoded alone"
        decode(model, rows, *rest)

    alone = measured(*network, ahead=[])
    monkeypatch.setattr(measurement, "greedy_together", small)
    together = measured(*network, ahead=POINTS)
    assert {name: said(records) for name, records in together.items()} == {
        name: said(records) for name, records in alone.items()
    }
    assert caplog.text.count("are decoded one point at a time") == 1
