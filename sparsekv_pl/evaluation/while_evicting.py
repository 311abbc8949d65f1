"""Measuring one batch while a press evicts: text that is read, and answers that are written."""

from typing import TYPE_CHECKING

from sparsekv_pl.evaluation.points import Point
from sparsekv_pl.evaluation.time_and_memory import Phases, timed
from sparsekv_pl.eviction.continuation import Continuation
from sparsekv_pl.eviction.prefill import ChunkedPrefill
from sparsekv_pl.eviction.request import Request
from sparsekv_pl.models.batch import TEXT, CaseBatch, CaseInfo
from sparsekv_pl.presses.ratio import set_compression_ratio
from sparsekv_pl.presses.traits import traits_of
from sparsekv_pl.storage.records import Record

if TYPE_CHECKING:
    from sparsekv_pl.evaluation.measurement import Measurement


def rows_apart(batch: CaseBatch, point: Point) -> bool:
    """Return whether ``point.decoding`` needs rows of their own.

    Questions of different lengths or turns are not evicted from at the same tokens, and some presses keep in every row
    what the first one selects.
    """
    if point.decoding is None or point.press is None:
        return False
    cases = zip(batch["continuation_lengths"].tolist(), map(_turn_ends, batch["cases"]), strict=True)
    apart = len(set(cases)) > 1 and batch["cases"][0].task != TEXT
    return apart or traits_of(point.press).first_row_decides


def _turn_ends(case: CaseInfo) -> tuple[int, ...]:
    return () if case.turns is None else case.turns.ends


def measured_while_evicting(measurement: "Measurement", point: Point) -> list[Record]:
    """Measure at a ``point`` with ``decoding``; return a record per case.

    The prefill is the point's own. ``kept_pairs``, ``kv_bytes`` and ``freed`` are those after the last eviction;
    ``kv_bytes_over_tokens`` has [tokens read and written, bytes per case] at the start and after each eviction;
    ``kv_bytes_over_turns`` has the bytes after each turn.
    Continuations must be equally long, or text: see ``Measurement.by_row``.
    """
    press, decoding, ratio = point.press, point.decoding, point.compression_ratio
    assert press is not None and decoding is not None
    set_compression_ratio(press, ratio if decoding.context else 0.0)
    phases, context = Phases(), measurement.batch["context_ids"]
    with phases("point"), measurement.draws(point):
        filling = ChunkedPrefill(measurement.model, press, context.shape[1], request=Request(contexts=True))
        _, seconds = timed(lambda: filling.run(context))
        rows, going = (
            _read(measurement, filling, point) if measurement.is_text else _written(measurement, filling, point)
        )
    count = len(measurement.batch["cases"])
    costs: Record = {"prefill_seconds": seconds, "eviction_seconds": 0.0, "peak_bytes": phases.peak_bytes()}
    costs |= measurement.left(point, going.reading.cache)
    if decoding.by_turn:
        costs["kv_bytes_over_turns"] = [held // count for _, held in going.kv_bytes]
    else:
        costs["kv_bytes_over_tokens"] = [[tokens, held // count] for tokens, held in going.kv_bytes]
    return [costs | row for row in rows]


def _read(measurement: "Measurement", filling: ChunkedPrefill, point: Point) -> tuple[list[Record], Continuation]:
    assert point.decoding is not None
    ids = measurement.batch["continuation_ids"]
    going = Continuation(filling, point.decoding, point.compression_ratio, ids.shape[1])
    return measurement.full.scores(going.read(ids)), going


def _written(measurement: "Measurement", filling: ChunkedPrefill, point: Point) -> tuple[list[Record], Continuation]:
    assert point.decoding is not None
    batch, most = measurement.batch, [case.max_new_tokens for case in measurement.batch["cases"]]
    ids = batch["continuation_ids"][:, : int(batch["continuation_lengths"][0])]
    tokens, ends = ids.shape[1] + max(most), _turn_ends(batch["cases"][0])
    going = Continuation(filling, point.decoding, point.compression_ratio, tokens, ends)
    answers, seconds = timed(lambda: going.write(ids, most, measurement.stop_ids))
    return measurement.scored(answers, seconds), going
