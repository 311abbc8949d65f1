"""Measure what the viewer shows of a case: the positions that each press keeps, and the teacher's attention."""

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from sparsekv_pl.evaluation.measurement import Measurement
from sparsekv_pl.evaluation.points import Point
from sparsekv_pl.eviction.cache_layers import mapped
from sparsekv_pl.eviction.decoding import greedy
from sparsekv_pl.eviction.kept_positions import Masked, kept_positions, masked_keys
from sparsekv_pl.eviction.prefill import continue_from
from sparsekv_pl.eviction.prefilled_cache import Prefilled
from sparsekv_pl.models.batch import IGNORE, CaseInfo, Supervised
from sparsekv_pl.models.layer_kinds import evicted_layers
from sparsekv_pl.models.rotary import rotary_of
from sparsekv_pl.objectives.attention_mass import AttentionMass
from sparsekv_pl.presses.ratio import set_compression_ratio
from sparsekv_pl.storage.records import Record
from sparsekv_pl.viewer.compact_arrays import packed_bits, packed_masses
from sparsekv_pl.viewer.token_texts import spans_of, token_texts

log = logging.getLogger(__name__)


@torch.no_grad()
def case_views(measurement: Measurement, points: Sequence[Point], rows: Sequence[int], teacher: bool) -> list[Record]:
    """Measure some rows of a batch under every point that evicts from their contexts; return a record per row.

    A record has the case's id ("viewed"), its tokens as texts, the tokens of its answer ("marked"), counts of layers
    and KV heads, the model's numbers of these layers, by point's name the packed bits of the kept positions ("kept")
    and the mean of pairs per layer and head, by condition why they are unknown ("unknown"), and, if the model is the
    ``teacher``, its packed attention mass ("mass").
    """
    batch = measurement.batch
    records = [
        case_record(measurement.tokenizer, batch["cases"][row], batch["context_ids"][row].tolist())
        | ({"mass": packed_masses(teacher_mass(measurement, row).cpu().numpy())} if teacher else {})
        for row in rows
    ]
    for point in points:
        if point.press is None or point.decoding is not None:
            continue
        try:
            for record, kept in zip(records, kept_by(measurement, point, rows), strict=True):
                add_kept(record, point.name, kept, evicted_layers(measurement.model.config))
        except Exception as error:  # a press of any kind may fail; its measurement has a line of its own in the report
            log.warning("the viewer leaves out %s: %s", point.condition, error)
            for record in records:
                record["unknown"][str(point.condition)] = f"{type(error).__name__}: {error}"
    return records


def case_record(tokenizer: PreTrainedTokenizerBase, case: CaseInfo, context_ids: list[int]) -> Record:
    """Return the record of ``case_views`` without kept positions and without a mass."""
    texts = token_texts(tokenizer, context_ids)
    marked = spans_of(texts, case.answers) if case.answer_span is None else [case.answer_span]
    return {
        "viewed": case.id,
        "question": f"{case.question}{case.answer_prefix and ' ... '}{case.answer_prefix}".strip(),
        "expected": list(case.answers),
        "tokens": texts,
        "marked": [list(span) for span in marked],
        "kept": {},
        "pairs": {},
        "unknown": {},
        "mass": None,
    }


def add_kept(record: Record, name: str, kept: Tensor, numbers: Sequence[int]) -> None:
    """Add the kept positions (layers, K, L) bool of the point ``name``, in the model's layers ``numbers``."""
    record |= {"layers": kept.shape[0], "heads": kept.shape[1], "numbers": list(numbers)}
    record["pairs"][name] = float(kept.sum(-1).float().mean())
    record["kept"][name] = packed_bits(kept.cpu().numpy())


def kept_by(measurement: Measurement, point: Point, rows: Sequence[int]) -> list[Tensor]:
    """Return, for each of ``rows``, (layers, K, L) bool: True where the cache after ``point`` holds the pair."""
    if measurement.by_row(point):
        return [kept_by(measurement.row(row), point, [0])[0] for row in rows]
    assert point.press is not None
    set_compression_ratio(point.press, point.compression_ratio)
    prefilled, _ = measurement.prefilled(point)
    tokens = measurement.batch["context_ids"].shape[1]
    return kept_in(measurement.model, lambda: measurement.recorded.cache, prefilled, rows, tokens)


def kept_in(
    model: PreTrainedModel, full: Callable[[], DynamicCache], prefilled: Prefilled, rows: Sequence[int], tokens: int
) -> list[Tensor]:
    """Return, for each of ``rows``, (layers, K, L) bool: True where ``prefilled``, just evicted, holds the pair.

    ``full`` makes the cache of the same ``tokens`` before the eviction; it is called if positions were not tracked.
    """
    if prefilled.positions:
        return [held(prefilled.positions, row, tokens) for row in rows]
    hidden = masked_keys(model)  # before ``full``, whose prefill forgets what a head-wise press hid
    return [_compared(model, full(), prefilled.cache, hidden, row) for row in rows]


def _compared(
    model: PreTrainedModel, full: DynamicCache, left: DynamicCache, hidden: Sequence[Masked | None], row: int
) -> Tensor:
    masked = [_masked_of(one, row) for one in hidden]
    layers = evicted_layers(model.config)
    kept = kept_positions(_row_of(full, row), _row_of(left, row), masked, rotary_of(model), layers)
    return torch.stack([layer[0].cpu() for layer in kept])


def held(positions: dict[int, Tensor], row: int, tokens: int) -> Tensor:
    """Turn layer -> positions (B, K, S) of a prefill in chunks into (layers, K, L) bool of one row."""
    kept = [positions[layer][row].cpu() for layer in sorted(positions)]
    return torch.stack([torch.zeros(len(own), tokens, dtype=torch.bool).scatter(1, own, True) for own in kept])


def share_kept(positions: dict[int, Tensor], case: CaseInfo) -> float | None:
    """Return the share of the pairs of ``needle_span``'s tokens that stay, over all evicted layers and KV heads.

    ``positions`` are layer -> (1, K, S) of a prefill in chunks; None if they or ``needle_span`` are unknown.
    """
    if not positions or case.needle_span is None:
        return None
    start, end = case.needle_span
    stay = [((kept >= start) & (kept < end)).sum(-1).float().mean() for kept in positions.values()]
    return float(torch.stack([share.cpu() for share in stay]).mean()) / (end - start)


def teacher_mass(measurement: Measurement, row: int) -> Tensor:
    """Return the attention (layers, K, L) that the answer's predictions pay to the context, with the full cache.

    As in training (objectives/attention_mass.py), but the answer is the model's own; in plain text, the continuation.
    """
    model, batch = measurement.model, measurement.batch
    context, tokens = batch["context_ids"].shape[1], int(batch["continuation_lengths"][row])
    read = batch["continuation_ids"][row : row + 1, :tokens]
    full = Prefilled(_row_of(measurement.recorded.evicted(None).cache, row), context, [])
    labels = read.clone()
    if not measurement.is_text:
        most, length = batch["cases"][row].max_new_tokens, torch.tensor([tokens], device=read.device)
        (answer,) = greedy(model, full.copy(), read, length, [most], measurement.stop_ids)
        answered = read.new_tensor([answer or [0]])  # an empty answer: what its first token would have seen
        read = torch.cat([read, answered], dim=1)
        labels = torch.cat([torch.full_like(labels, IGNORE), answered], dim=1)
    observer = AttentionMass(Supervised.of(labels), context)
    continue_from(model, read, full.cache, context, observer=observer)
    return torch.stack([observer.mass[layer][0].cpu() for layer in sorted(observer.mass)])


def _row_of(cache: DynamicCache, row: int) -> DynamicCache:
    """Copy one row of a cache."""
    return mapped(cache, lambda tensor: tensor[row : row + 1].clone())


def _masked_of(masked: Masked | None, row: int) -> Masked | None:
    """The hidden pairs of one row."""
    if masked is None:
        return None
    rows, *where = masked
    own = rows == row
    return [rows[own] * 0, *(index[own] for index in where)]
