"""Measurements equal a plain reference: a new prefill under the press, then one token at a time."""

import math

import pytest
import torch
from kvpress import (
    AdaKVPress,
    BasePress,
    ExpectedAttentionPress,
    KnormPress,
    RandomPress,
    SnapKVPress,
    StreamingLLMPress,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from sparsekv_pl.evaluation.measurement import Measurement
from sparsekv_pl.evaluation.points import Point
from sparsekv_pl.eviction.prefill import continue_from, prefill
from sparsekv_pl.eviction.while_decoding import Decoding
from sparsekv_pl.models.batch import TEXT, CaseBatch, CaseInfo

CONTEXT, CONTINUATION, NEW = 48, 8, 5
LENGTHS = [8, 5, 7]
POINTS = [
    Point(),
    Point(ExpectedAttentionPress(), 0.5),
    Point(SnapKVPress(window_size=8), 0.75),
    Point(AdaKVPress(KnormPress()), 0.5),
]


@pytest.fixture(scope="module")
def tokenizer(tiny_models: dict[str, str]):
    return AutoTokenizer.from_pretrained(tiny_models["llama"])


@pytest.fixture(scope="module")
def model(tiny_models: dict[str, str]):
    return AutoModelForCausalLM.from_pretrained(tiny_models["llama"], dtype=torch.float32).eval()


def batch(task: str, answers: tuple[str, ...] = ("zebra",)) -> CaseBatch:
    rows = torch.randint(2, 1024, (3, CONTEXT + CONTINUATION), generator=torch.Generator().manual_seed(0))
    return CaseBatch(
        context_ids=rows[:, :CONTEXT],
        continuation_ids=rows[:, CONTEXT:],
        continuation_lengths=torch.tensor(LENGTHS),
        cases=[CaseInfo(f"{task}/{i}", task, answers, max_new_tokens=NEW - i) for i in range(3)],
    )


@torch.no_grad()
def logits(model, context: Tensor, point: Point, forced: list[int], more: int = 0) -> Tensor:
    """(len(forced) + more, V): feeds ``forced``, then ``more`` tokens of its own greedy choice, one by one."""
    cache = DynamicCache()
    if point.press is None:
        model(context[None], past_key_values=cache)
    else:
        point.press.compression_ratio = point.compression_ratio
        with point.press(model):
            model(context[None], past_key_values=cache)
    rows: list[Tensor] = []
    for step in range(len(forced) + more):
        token = forced[step] if step < len(forced) else int(rows[-1].argmax())
        position = torch.tensor([[len(context) + step]])
        rows.append(model(torch.tensor([[token]]), past_key_values=cache, position_ids=position).logits[0, -1])
    return torch.stack(rows)


@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.name)
def test_nll_and_kl_are_those_of_single_tokens_after_a_fresh_prefill(model, tokenizer, point: Point) -> None:
    texts = batch(TEXT)
    records = Measurement(model, tokenizer, texts).at(point)
    for row, (record, length) in enumerate(zip(records, LENGTHS, strict=True)):
        context, ids = texts["context_ids"][row], texts["continuation_ids"][row, :length]
        student = logits(model, context, point, ids[:-1].tolist()).log_softmax(-1)
        teacher = logits(model, context, Point(), ids[:-1].tolist()).log_softmax(-1)
        assert record["nll"] == pytest.approx(-float(student.gather(1, ids[1:, None]).sum()), rel=1e-4)
        kl = float((teacher.exp() * (teacher - student)).sum())
        assert record["kl"] == pytest.approx(kl, rel=1e-3, abs=1e-5)
        assert record["tokens"] == length - 1
        assert (kl > 1e-3) == (point.press is not None)


@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.name)
def test_answers_are_greedy_decoding_s(model, tokenizer, point: Point) -> None:
    asked = batch("needle", ("zebra",))
    records = Measurement(model, tokenizer, asked).at(point)
    for row, (record, length) in enumerate(zip(records, LENGTHS, strict=True)):
        question = asked["continuation_ids"][row, :length].tolist()
        said = logits(model, asked["context_ids"][row], point, question, NEW - row - 1)[length - 1 :].argmax(-1)
        assert record["answer"] == tokenizer.decode(said, skip_special_tokens=True).strip()
        assert record["decode_tokens"] == NEW - row


def test_a_model_that_copies_scores_1_and_one_that_cannot_scores_0(model, tokenizer) -> None:
    said = [record["answer"] for record in Measurement(model, tokenizer, batch("needle")).at(Point())]
    for answers, score in (((said[0],), 1.0), (("a word it never says",), 0.0)):
        record = Measurement(model, tokenizer, batch("needle", answers)).at(Point())[0]
        assert [record[name] for name in ("exact", "substring", "f1", "rouge_l")] == [score] * 4


def test_the_ledger_counts_what_is_really_kept(model, tokenizer) -> None:
    per_pair = 2 * 2 * 16 * 2 * 4  # key and value, KV heads, head dim, layers, float32

    def of(press: BasePress | None, ratio: float) -> tuple[float, int, bool]:
        record = Measurement(model, tokenizer, batch(TEXT)).at(Point(press, ratio))[0]
        return record["kept_pairs"], record["kv_bytes"], record["freed"]

    assert of(None, 0.0) == (CONTEXT, CONTEXT * per_pair, True)
    assert of(KnormPress(), 0.75) == (CONTEXT / 4, CONTEXT / 4 * per_pair, True)
    kept, size, freed = of(AdaKVPress(KnormPress()), 0.75)
    assert (kept, size, freed) == (pytest.approx(CONTEXT / 4, abs=0.5), CONTEXT * per_pair, False)


def test_true_chunks_are_a_prefill_in_chunks(model, tokenizer) -> None:
    texts, point = batch(TEXT), Point(KnormPress(), 0.5, chunk_tokens=12)
    record = Measurement(model, tokenizer, texts).at(point)[0]
    point.press.compression_ratio = 0.5
    with torch.no_grad():
        prefilled = prefill(model, texts["context_ids"][:1], point.press, 12)
        hidden = continue_from(model, texts["continuation_ids"][:1], prefilled.cache, prefilled.next_position)
        scores = model.lm_head(hidden[0, : LENGTHS[0] - 1]).log_softmax(-1)
    nll = -float(scores.gather(1, texts["continuation_ids"][0, 1 : LENGTHS[0], None]).sum())
    assert record["nll"] == pytest.approx(nll, rel=1e-4)
    dense = Measurement(model, tokenizer, texts).at(Point(KnormPress(), 0.5))[0]
    assert record["nll"] != pytest.approx(dense["nll"], rel=1e-4)


def test_decoding_evicts_while_the_text_is_read(model, tokenizer) -> None:
    texts = batch(TEXT)
    full, late = (
        Measurement(model, tokenizer, texts).at(Point(KnormPress(), 0.5, decoding=Decoding(interval, context=False)))[0]
        for interval in (CONTINUATION + 1, CONTINUATION)
    )
    assert full["kl"] == pytest.approx(0, abs=1e-4)
    assert full["kept_pairs"] == CONTEXT + CONTINUATION
    assert late["kl"] == pytest.approx(0, abs=1e-4), "evicted after the last token, so none of them saw it"
    assert late["kept_pairs"] == CONTEXT / 2
    early = Measurement(model, tokenizer, texts).at(Point(KnormPress(), 0.5, decoding=Decoding(2, context=False)))[0]
    assert early["kl"] > 1e-3
    assert early["kept_pairs"] == CONTEXT / 2


class RunsTheModel(StreamingLLMPress):
    """Stands for presses that a recorded prefill cannot serve; it minds batches."""

    def __call__(self, model):
        self.seen = []
        return super().__call__(model)

    def compress(self, module, hidden_states, *args, **kwargs):
        assert len(hidden_states) == 1
        return super().compress(module, hidden_states, *args, **kwargs)


def test_a_press_that_runs_the_model_itself_gets_one_row_at_a_time(model, tokenizer) -> None:
    alone = Measurement(model, tokenizer, batch(TEXT)).at(Point(RunsTheModel(), 0.5))
    together = Measurement(model, tokenizer, batch(TEXT)).at(Point(StreamingLLMPress(), 0.5))
    assert [record["nll"] for record in alone] == pytest.approx([record["nll"] for record in together], rel=1e-5)


def test_stability_is_added_where_it_can_be_measured(model, tokenizer) -> None:
    stable = {"min_retained", "mean_retained", "retained_variance", "overlap_prompts", "overlap_steps"}
    probe = Measurement(model, tokenizer, batch(TEXT), with_stability=True)
    record = probe.at(Point(KnormPress(), 0.5))[0]
    assert stable < set(record)
    assert 0 < record["min_retained"] < record["mean_retained"] < 1
    everything = probe.at(Point(KnormPress(), 0.0))[0]
    assert [everything[name] for name in sorted(stable)] == pytest.approx([1, 1, 1, 1, 0])
    assert not stable & set(probe.at(Point())[0])
    assert not stable & set(probe.at(Point(KnormPress(), 0.5, chunk_tokens=12))[0])


def test_every_record_can_be_written(model, tokenizer) -> None:
    costs = {"prefill_seconds", "eviction_seconds", "kept_pairs", "kv_bytes", "freed", "peak_bytes"}
    text, asked = (Measurement(model, tokenizer, batch(task)).at(POINTS[1])[0] for task in (TEXT, "needle"))
    assert set(text) == costs | {"nll", "kl", "tokens", "recalled_nll", "recalled_tokens"}
    assert set(asked) == costs | {
        *(
            "exact",
            "substring",
            "f1",
            "rouge_l",
            "words",
            "answer",
            "answers",
            "question",
            "answer_prefix",
            "max_new_tokens",
            "decode_seconds",
            "decode_tokens",
        )
    }
    assert all(math.isfinite(value) for value in text.values())


def test_a_press_without_a_seed_draws_the_same_in_every_run_and_order(model, tokenizer) -> None:
    chances = [
        Point(RandomPress(), 0.5),
        Point(RandomPress(), 0.75),
        Point(AdaKVPress(RandomPress()), 0.5),
        Point(RandomPress(), 0.5, chunk_tokens=16),
        Point(RandomPress(), 0.5, decoding=Decoding(2)),
    ]
    times = {"prefill_seconds", "eviction_seconds", "decode_seconds", "peak_bytes"}

    def measured(task: str, points: list[Point]) -> dict[str, list[dict[str, object]]]:
        found = Measurement(model, tokenizer, batch(task), with_stability=True)
        found.ahead = points
        records = {point.name: found.at(point) for point in points}
        return {
            name: [{column: record[column] for column in record.keys() - times} for record in rows]
            for name, rows in records.items()
        }

    for task, points in ((TEXT, chances), ("needle", chances)):
        torch.manual_seed(1)
        before, first = torch.get_rng_state(), measured(task, points)
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(2)
        assert measured(task, points[::-1]) == first
        assert len({str(records) for records in first.values()}) == len(points)
