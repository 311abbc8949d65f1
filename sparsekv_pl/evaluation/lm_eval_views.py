"""The viewer in a run of lm_eval's tasks: which documents are viewed, and what a press kept of their contexts."""

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from sparsekv_pl.evaluation.case_view import add_kept, case_record, kept_in, teacher_mass
from sparsekv_pl.evaluation.measurement import Measurement
from sparsekv_pl.evaluation.points import Point
from sparsekv_pl.eviction.prefill import prefill
from sparsekv_pl.models.batch import CaseBatch, CaseInfo
from sparsekv_pl.models.layer_kinds import evicted_layers
from sparsekv_pl.storage.records import Record
from sparsekv_pl.viewer.compact_arrays import packed_masses

if TYPE_CHECKING:
    from sparsekv_pl.evaluation.lm_eval_model import PressedLM

log = logging.getLogger(__name__)

ANSWER_TOKENS = 16
"""Most tokens of the answer whose attention is the teacher's."""
QUESTION_LETTERS = 300
"""Letters of a context's end that stand for the question, which lm_eval does not tell apart."""

Sample = Mapping[str, Any]
"""A document as ``simple_evaluate`` returns it."""


def viewed_documents(
    lm: "PressedLM", samples: Mapping[str, Sequence[Sample]], count: int, most_tokens: int
) -> dict[tuple[str, int], list[int]]:
    """Choose the first ``count`` documents that can be viewed: (task, document) -> the tokens of its context.

    A document that is read piece by piece (``loglikelihood_rolling``) has no context of its own, a context that the
    model cannot read whole is another one, and one of more than ``most_tokens`` would make a large page.
    """
    chosen: dict[tuple[str, int], list[int]] = {}
    most = min(most_tokens, lm.max_length - ANSWER_TOKENS)
    for task, sample in ((task, sample) for task, documents in samples.items() for sample in documents):
        if len(chosen) >= count:
            break
        ids = _context(lm, sample["arguments"][0])
        if lm.held_back < len(ids) <= most:
            chosen.setdefault((task, sample["doc_id"]), ids)
    return chosen


def _context(lm: "PressedLM", arguments: Sequence[Any]) -> list[int]:
    """Return a request's context as tokens, as lm_eval encodes it; empty if it has none."""
    if len(arguments) < 2:
        return []
    text, asked = arguments[:2]
    return lm.tok_encode(text) if isinstance(asked, Mapping) else list(lm._encode_pair(text, asked)[0])


@torch.no_grad()
def document_view(lm: "PressedLM", case: str, sample: Sample, ids: list[int], point: Point, teacher: bool) -> Record:
    """Return a record as ``case_views`` does of a document under one point; ``ids`` are its context.

    With the full cache it has the teacher's attention mass, if the model is the ``teacher``.
    """
    split = len(ids) - lm.held_back
    seen, held = torch.tensor([ids[:split]], device=lm.device), torch.tensor([ids[split:]], device=lm.device)
    info = CaseInfo(case, "", expected_of(sample), max_new_tokens=ANSWER_TOKENS)
    info.question = " ".join(lm.tok_decode(ids).split())[-QUESTION_LETTERS:]
    record = case_record(lm.tokenizer, info, ids[:split])
    if point.press is None:
        if teacher:
            lengths = torch.tensor([lm.held_back], device=lm.device)
            batch = CaseBatch(context_ids=seen, continuation_ids=held, continuation_lengths=lengths, cases=[info])
            mass = teacher_mass(Measurement(lm.model, lm.tokenizer, batch), 0)
            record["mass"] = packed_masses(mass.cpu().numpy())
        return record
    try:
        evicted, _, eviction = lm.prefilled(ids)
        if not eviction.evicted:
            raise ValueError(f"its window of {lm.window} tokens is longer than the context")
        (kept,) = kept_in(lm.model, lambda: prefill(lm.model, seen, None).cache, evicted, [0], split)
        add_kept(record, point.name, kept, evicted_layers(lm.model.config))
    except Exception as error:  # a press of any kind may fail; its measurement has a line of its own in the report
        log.warning("the viewer leaves out %s: %s", point.condition, error)
        record["unknown"][str(point.condition)] = f"{type(error).__name__}: {error}"
    return record


def expected_of(sample: Sample) -> tuple[str, ...]:
    """Return the expected answers: the right choice's text, or the target."""
    target, arguments = sample["target"], sample["arguments"]
    if isinstance(target, int) and len(arguments) > target and isinstance(arguments[target][1], str):
        return (arguments[target][1].strip(),)
    return tuple(str(one).strip() for one in (target if isinstance(target, list) else [target]))


def answer_of(sample: Sample) -> str:
    """Return the model's answer: its text, or the most likely choice; empty for the likelihood of a single text."""
    arguments, found = sample["arguments"], sample["filtered_resps"]
    if isinstance(found[0], str):
        return str(found[0])
    if len(arguments) < 2:
        return ""
    likelihoods = [one[0] for one in found]
    return str(arguments[likelihoods.index(max(likelihoods))][1]).strip()
