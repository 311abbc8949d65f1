"""Questions and answers after a context, as tokens: each in its own turn of the chat, the answers supervised."""

from collections.abc import Sequence

from data.cases import Frame
from data.question_kind import Turn
from sparsekv_pl.models.batch import IGNORE
from sparsekv_pl.models.chat_frame import QUESTION_OPENING


def asked_and_answered(
    frame: Frame, next_turn: str, turns: Sequence[Turn], supervise_stop: bool
) -> tuple[list[int], list[int]]:
    """Encode all turns as one text, and cut it; return token ids, and labels on the answers.

    ``next_turn`` is the chat template's part between an answer and the next question. ``supervise_stop`` puts labels on
    the answers' full stops too.
    """
    texts: list[str] = []
    for number, turn in enumerate(turns):
        opening = next_turn if number else QUESTION_OPENING
        texts += [f"{opening}{turn.question}{frame.question_suffix}{turn.answer_prefix}", f" {turn.answer}", turn.stop]
    supervised = (False, True, supervise_stop) * len(turns)
    ids: list[int] = []
    labels: list[int] = []
    for part, counts in zip(frame.parts(texts), supervised, strict=True):
        ids += part
        labels += part if counts else [IGNORE] * len(part)
    return ids, labels
