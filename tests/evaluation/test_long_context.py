"""Long contexts end to end: reading in chunks, stopping, resuming after a kill, planning, and answers."""

import base64
import json
import logging
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kvpress import BasePress, KeyDiffPress, KeyRerotationPress, KnormPress, RandomPress, SnapKVPress
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import TensorBoardLogger

from data.long_haystack import HaystackData
from data.text import EmbeddedText
from sparsekv_pl.evaluation import measuring_module as measuring
from sparsekv_pl.evaluation.case_view import held
from sparsekv_pl.evaluation.long_context import STATE, LongContextModule
from sparsekv_pl.eviction.decoding import greedy
from sparsekv_pl.eviction.prefill import ChunkedPrefill, prefill
from sparsekv_pl.storage.records import Record
from tests.tiny_training import MakeBackbone

TOKENS, CHUNK, BUDGET = 1500, 128, 200  # the tiny model's positions end at 1,024
CHUNKS = 12
TIMES = {"prefill_seconds", "decode_seconds", "eviction_seconds", "peak_bytes"}


@pytest.fixture
def run(
    tiny_backbone: MakeBackbone, tiny_trainer: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[Record]]:
    """run(**settings of the module): the records without their times; output in tmp_path/out, mostly no report."""

    def start(
        press: BasePress | None = None, data: Any = None, trainer: Any = None, report: bool = False, **settings: Any
    ) -> list[Record]:
        if not report:
            monkeypatch.setattr(measuring, "write_run", lambda *_: [])
        defaults: dict[str, Any] = {"budget": BUDGET, "chunk_tokens": CHUNK, "output": str(tmp_path / "out")}
        press = press or KeyRerotationPress(KeyDiffPress())
        module = LongContextModule(settings.pop("backbone", tiny_backbone()), press, **(defaults | settings))
        tiny_trainer(**(trainer or {})).test(module, haystacks(**(data or {})), verbose=False)
        return without_times(module)

    return start


def haystacks(**settings: Any) -> HaystackData:
    return HaystackData(**({"text": EmbeddedText(), "tokens": TOKENS, "depths": (0.1, 0.5, 0.9)} | settings))


def without_times(module: LongContextModule) -> list[Record]:
    cases = [record for record in module.records if "case" in record]
    return [{name: value for name, value in record.items() if name not in TIMES} for record in cases]


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator["Chunks"]:
    """Counts the chunks that are really run; calls ``then`` at the end of chunk ``at``."""
    watched = Chunks()
    advance = ChunkedPrefill.advance

    def recording(made: ChunkedPrefill, ids: torch.Tensor) -> None:
        watched.run += 1
        advance(made, ids)
        if watched.run == watched.at:
            watched.then()

    monkeypatch.setattr(ChunkedPrefill, "advance", recording)
    yield watched


class Chunks:
    run = 0
    at: int | None = None

    @staticmethod
    def then() -> None:
        raise AssertionError


class KilledError(Exception):
    """Stands for the end of the process."""


def kill() -> None:
    raise KilledError


def test_every_needle_has_a_record_with_what_it_cost(run: Callable[..., list[Record]], tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="")
    records = run(trainer={"logger": logger}, report=True)
    assert [record["depth"] for record in records] == [0.1, 0.5, 0.9]
    for record in records:
        assert {"substring", "exact", "f1", "rouge_l", "answer", "answers", "question", "decode_tokens"} <= set(record)
        assert record["length"] == TOKENS
        assert record["kept_pairs"] == BUDGET
        assert record["kv_bytes"] == 2 * 2 * 2 * BUDGET * 16 * 4  # key and value, layers, heads, numbers, bytes
        assert record["compression_ratio"] == pytest.approx(1 - BUDGET / TOKENS, abs=1e-6)
        assert (record["variant"], record["press"], record["prefill"]) == (
            "base",
            "KeyRerotation(KeyDiff)",
            f"chunks of {CHUNK}",
        )
        assert record["freed"]
    phases = json.loads((tmp_path / "out" / "phases.json").read_text())
    assert [phase["phase"] for phase in phases] == ["load", "tokenise", f"prefill {TOKENS}", f"answer {TOKENS}"]
    assert all(phase["peak_rss_bytes"] > 0 for phase in phases)
    assert (tmp_path / "out" / "report.json").exists()
    assert not (tmp_path / "out" / STATE).exists()
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_answers_are_those_of_a_plain_prefill(run: Callable[..., list[Record]], tiny_backbone: MakeBackbone) -> None:
    records = run()
    model, tokenizer = tiny_backbone(lora=None).load(trainable=False)
    data = haystacks()
    data.tokenizer = tokenizer
    data.setup("test")
    batch = data.haystack(TOKENS, data.depths)
    with torch.no_grad():
        prefilled = prefill(model, batch["context_ids"], KeyRerotationPress(KeyDiffPress()), CHUNK, BUDGET)
    stop = {tokenizer.eos_token_id}
    for row, (case, record) in enumerate(zip(batch["cases"], records, strict=True)):
        length = batch["continuation_lengths"][row : row + 1]
        question = batch["continuation_ids"][row : row + 1, : int(length)]
        answer = greedy(model, prefilled.copy(), question, length, [case.max_new_tokens], stop)[0]
        assert record["answer"] == tokenizer.decode(answer, skip_special_tokens=True).strip()
        assert record["answers"] == list(case.answers)
        kept = held(prefilled.positions, 0, TOKENS)[..., slice(*case.needle_span or ())].float()
        assert record["needle_kept"] == pytest.approx(float(kept.mean()))
    assert len({record["answer"] for record in records}) > 1
    assert any(record["needle_kept"] > 0 for record in records)


def test_killed_and_rerun_equals_uninterrupted(
    run: Callable[..., list[Record]], chunks: Chunks, tmp_path: Path
) -> None:
    press = KeyRerotationPress(RandomPress())  # without a seed
    whole = run(press, output=str(tmp_path / "whole"))
    assert chunks.run == CHUNKS
    chunks.run, chunks.at, chunks.then = 0, 8, kill  # type: ignore[method-assign]
    with pytest.raises(KilledError):
        run(press, save_every=5)
    chunks.run, chunks.at = 0, None
    assert run(press, save_every=5) == whole
    assert chunks.run == CHUNKS - 5
    chunks.run = 0
    assert run(press) == whole
    assert chunks.run == 0  # a finished haystack is not read again
    assert not (tmp_path / "out" / STATE).exists()


def test_ctrl_c_ends_after_the_chunk_and_saves(
    run: Callable[..., list[Record]], chunks: Chunks, tmp_path: Path
) -> None:
    whole, handler = run(output=str(tmp_path / "whole")), signal.getsignal(signal.SIGINT)
    chunks.run, chunks.at = 0, 7
    chunks.then = lambda: os.kill(os.getpid(), signal.SIGINT)  # type: ignore[method-assign]
    with pytest.raises((KeyboardInterrupt, SystemExit)):  # Lightning makes an exit of it
        run()
    signal.signal(signal.SIGINT, handler)  # Lightning ignores it from then on
    assert chunks.run == 7
    chunks.run, chunks.at = 0, None
    assert run() == whole
    assert chunks.run == CHUNKS - 7


def test_a_state_of_another_text_is_reported_and_not_trusted(
    run: Callable[..., list[Record]], chunks: Chunks, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = run(output=str(tmp_path / "whole"))
    chunks.run, chunks.at, chunks.then = 0, 6, kill  # type: ignore[method-assign]
    with pytest.raises(KilledError):
        run(save_every=2, data={"seed": 1})
    chunks.run, chunks.at = 0, None
    with caplog.at_level(logging.WARNING):
        assert run() == whole
    assert chunks.run == CHUNKS
    assert "starts over" in caplog.text


def test_dry_stops_before_inference(
    run: Callable[..., list[Record]], chunks: Chunks, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(dry=True, tokens_per_second=12.5) == []
    said = capsys.readouterr().out
    assert chunks.run == 0
    assert "1,500 tokens" in said
    assert "prefill 2 min" in said
    assert f"{CHUNKS} chunks" in said
    assert "stopped before inference" in said
    assert not list((tmp_path / "out").glob("report*"))
    assert not (tmp_path / "out" / "results").exists()


def test_an_adapter_makes_it_trained(
    run: Callable[..., list[Record]], tiny_backbone: MakeBackbone, tiny_adapter: Callable[..., str], tmp_path: Path
) -> None:
    press = KeyRerotationPress(KeyDiffPress())
    adapter = tiny_adapter(0, training={"presses": ["KeyRerotation(KeyDiff)"]})
    base = run(press, output=str(tmp_path / "base"))
    trained = run(press, backbone=tiny_backbone(adapter=adapter))
    assert [record.pop("variant") for record in trained] == ["trained"] * 3
    assert all(record.pop("seen_in_training") for record in trained)
    for record in base:
        del record["variant"], record["seen_in_training"]
    assert trained == base  # the adapter is untrained


def test_several_lengths(run: Callable[..., list[Record]], tmp_path: Path) -> None:
    records = run(data={"lengths": [600, 300]})
    assert [record["length"] for record in records] == [600] * 3 + [300] * 3
    phases = [phase["phase"] for phase in json.loads((tmp_path / "out" / "phases.json").read_text())]
    assert phases == ["load", "tokenise", "prefill 600", "answer 600", "tokenise", "prefill 300", "answer 300"]


def test_without_a_press_the_whole_context_is_kept(
    tiny_backbone: MakeBackbone, tiny_trainer: Any, tmp_path: Path
) -> None:
    module = LongContextModule(tiny_backbone(), None, None, CHUNK, str(tmp_path))
    tiny_trainer().test(module, haystacks(tokens=900), verbose=False)
    assert {(r["press"], r["compression_ratio"], r["kept_pairs"]) for r in module.records} == {("full cache", 0.0, 900)}


def ratio_one() -> BasePress:
    press = KeyRerotationPress(KnormPress())
    press.compression_ratio = 1.0
    return press


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"press": ratio_one()}, r"press.compression_ratio.*1\.0"),
        ({"press": SnapKVPress(window_size=8)}, "takes 1500 positions, but this model was trained on 1024"),
        ({"budget": 1000}, "takes 11.. positions, but this model was trained on 1024"),
        ({"press": KeyRerotationPress(SnapKVPress(window_size=200))}, "looks at a window of 200 tokens"),
        ({"budget": 0}, "budget=0 must be at least 1"),
        ({"save_every": 0}, "save_every=0 must be at least 1"),
        ({"data": {"tokens": 40}}, "leave no room for text in a context of 40 tokens"),
        ({"data": {"tokens": 10_000_000}}, r"the text has [\d,]+ tokens and [\d,]+ are needed"),
    ],
)
def test_what_cannot_be_run_is_refused_before_the_first_chunk(
    run: Callable[..., list[Record]], chunks: Chunks, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(**settings)
    assert chunks.run == 0


def test_a_budget_needs_a_press(tiny_backbone: MakeBackbone) -> None:
    with pytest.raises(ValueError, match="budget=2048 needs a press"):
        LongContextModule(tiny_backbone(), None)


def test_the_question_must_fit_the_positions_too(
    tiny_backbone: MakeBackbone, tiny_trainer: Any, tmp_path: Path
) -> None:
    module: LightningModule = LongContextModule(tiny_backbone(), None, None, CHUNK, str(tmp_path))
    with pytest.raises(ValueError, match=r"a context of 1020 tokens takes 1... positions"):
        tiny_trainer().test(module, haystacks(tokens=1020), verbose=False)


def test_the_report_links_what_was_kept_of_a_context_that_a_page_can_show(
    run: Callable[..., list[Record]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    viewed, pages = [], {}
    whole = LongContextModule._views

    def recording(module: LongContextModule, *given: Any) -> list[Record]:
        viewed.append((whole(module, *given), given[-1].positions))
        return viewed[-1][0]

    monkeypatch.setattr(LongContextModule, "_views", recording)
    monkeypatch.setattr(measuring, "write_run", lambda *given: pages.update(given[-1]) or [])
    run(report=True)
    ((views, positions),) = viewed
    assert [view["viewed"] for view in views] == [label for label, _ in pages.values()] and len(views) == 2
    for view in views:
        (packed,) = view["kept"].values()
        bits = np.unpackbits(np.frombuffer(base64.b64decode(packed), np.uint8))[: 2 * 2 * TOKENS].reshape(2, 2, TOKENS)
        for layer, kept in positions.items():
            assert [[*np.flatnonzero(row)] for row in bits[layer]] == kept[0].sort(-1).values.tolist()
        found = ["".join(view["tokens"][start:end]).strip() for start, end in view["marked"]]
        assert found and {*found} <= {*view["expected"]} and view["mass"] is None
    pages.clear()
    monkeypatch.setattr("sparsekv_pl.evaluation.long_context.VIEWED_TOKENS", TOKENS - 1)
    run(report=True, output=str(tmp_path / "another"))
    assert pages == {}
