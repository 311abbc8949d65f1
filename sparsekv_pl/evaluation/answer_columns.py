"""Columns of the record of an answer: its scores, and where it stands in a conversation."""

from sparsekv_pl.metrics.retrieval import answer_stretches, retrieval_scores
from sparsekv_pl.models.batch import CaseInfo, CaseTurns
from sparsekv_pl.storage.records import Record


def answer_columns(case: CaseInfo, answer: str) -> Record:
    """Return the columns that ``answer`` and ``case`` decide; scores only if the case has expected answers."""
    stretches = answer_stretches(answer, case.answers)
    return {
        **(retrieval_scores(answer, case.answers) if case.answers else {}),
        **({"answer_stretches": stretches} if stretches else {}),
        **({} if case.turns is None else _turn_columns(case.turns, answer)),
        "answer": answer,
        "answers": list(case.answers),
        "question": case.question,
        "answer_prefix": case.answer_prefix,
        "max_new_tokens": case.max_new_tokens,
    }


def _turn_columns(turns: CaseTurns, answer: str) -> Record:
    """Return ``turn``, which asks, ``turns_since`` its fact was told last and, of a corrected fact, ``stale``.

    ``stale`` is 1 if the answer is the outdated value, judged as ``exact`` is, else 0.
    """
    stale = {"stale": retrieval_scores(answer, [turns.outdated])["exact"]} if turns.outdated else {}
    return {"turn": turns.asked_in, "turns_since": turns.since} | stale
