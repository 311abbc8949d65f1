"""Answers after a kept context, greedy or sampled, with what a server must know of them: tokens, and why they ended."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from sparsekv_pl.eviction.decoding import greedy
from sparsekv_pl.eviction.limits import check_continuation
from sparsekv_pl.models.seeding import globally_seeded
from sparsekv_pl.usage.answer_text import AnswerText
from sparsekv_pl.usage.generation import generate
from sparsekv_pl.usage.kept_context import KeptContext
from sparsekv_pl.usage.loaded_model import LoadedModel

OnText = Callable[[str], object]
LEAST_TEMPERATURE = 1e-6
"""Divided by less, logits overflow float32; even here the most likely token has all probability."""


@dataclass(frozen=True)
class AnswerGiven:
    """An answer, and why it ended."""

    text: str
    ids: list[int]
    """Its tokens, without the one that ends a text."""
    finish: Literal["stop", "length"]
    """"length" if only ``max_new_tokens`` ended it."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; equal settings and seeds give equal answers on one machine."""

    temperature: float = 1.0
    top_p: float = 1.0
    """Draw from the most likely tokens that have this share of the probability together."""
    seed: int = 0


def sampling_of(temperature: float | None, top_p: float | None, seed: int) -> Sampling | None:
    """Return how to draw; None for the most likely tokens, which are also taken if nothing is asked for."""
    if temperature == 0 or (temperature is None and top_p is None):
        return None
    return Sampling(1.0 if temperature is None else temperature, 1.0 if top_p is None else top_p, seed)


def greedy_answers(
    model: LoadedModel,
    kept: KeptContext,
    rows: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    stop: str | Sequence[str] = (),
    on_text: OnText | None = None,
    on_token: Callable[[], object] | None = None,
) -> list[AnswerGiven]:
    """Answer each of ``rows`` by the most likely tokens, in one batch.

    Parameters
    ----------
    model, kept
        The context, and the model that read it.
    rows
        Token ids that follow the context, question by question.
    max_new_tokens
        Most tokens of an answer.
    stop
        Strings that end an answer and are no part of it.
    on_text
        Called with each piece of the answer; for one row.
    on_token
        Called after each token of each row; what it raises ends the answering.

    Raises
    ------
    ValueError
        For an empty stop string, and if an answer would end beyond the model's positions.
    """
    longest = max(map(len, rows))
    check_continuation(model.model, kept.next_position, longest + max_new_tokens - 1)
    ids = torch.tensor([list(row) + list(row[-1:]) * (longest - len(row)) for row in rows], device=model.device)
    lengths = torch.tensor(list(map(len, rows)), device=model.device)
    text = AnswerText(model.text_of, stop, on_text)

    def enough(answer: list[int]) -> bool:
        if on_token is not None:
            on_token()
        return text.reached(answer) if stop or on_text is not None else False

    with model.computing():
        most = [max_new_tokens] * len(rows)
        found = greedy(model.model, kept.prefilled(len(rows)), ids, lengths, most, model.stop_ids, enough)
    ended = [len(answer) < max_new_tokens or (bool(stop) and text.reached(answer)) for answer in found]
    texts = [text.finish(answer) for answer in found]
    return [
        AnswerGiven(said, answer, "stop" if end else "length")
        for said, answer, end in zip(texts, found, ended, strict=True)
    ]


def sampled_answer(
    model: LoadedModel,
    kept: KeptContext,
    row: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling,
    *,
    stop: str | Sequence[str] = (),
    on_text: OnText | None = None,
    on_token: Callable[[], object] | None = None,
) -> AnswerGiven:
    """Answer one row by drawn tokens, with transformers' own ``generate``; see ``greedy_answers``."""
    text = AnswerText(model.text_of, stop, on_text)
    settings: dict[str, Any] = {
        "do_sample": True,
        "top_k": 0,
        "temperature": max(sampling.temperature, LEAST_TEMPERATURE),
        "top_p": sampling.top_p,
        "max_new_tokens": max_new_tokens,
        "stopping_criteria": StoppingCriteriaList([_Enough(model, text, len(row), on_token)]),
    }
    with globally_seeded("answer", sampling.seed):
        ids = generate(model, kept, [row], settings)[0, len(row) :].tolist()
    ended = ids[-1] in model.stop_ids
    ids = ids[: len(ids) - ended]
    stopped = ended or len(ids) < max_new_tokens or (bool(stop) and text.reached(ids))
    return AnswerGiven(text.finish(ids), ids, "stop" if stopped else "length")


class _Enough(StoppingCriteria):
    """Ends ``generate`` at a stop string, and passes each new piece of text on."""

    def __init__(self, model: LoadedModel, text: AnswerText, asked: int, on_token: Callable[[], object] | None) -> None:
        self.model, self.text, self.asked, self.on_token = model, text, asked, on_token

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # noqa: ARG002
        """Return a tensor (B,) of whether the only row has ended."""
        if self.on_token is not None:
            self.on_token()
        ids = [token for token in input_ids[0, self.asked :].tolist() if token not in self.model.stop_ids]
        return torch.tensor([self.text.reached(ids)], device=input_ids.device)
