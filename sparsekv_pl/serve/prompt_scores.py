"""Log-probabilities of a prompt's tokens after its evicted document, as lm-evaluation-harness asks for them (echo)."""

from dataclasses import dataclass

import torch

from sparsekv_pl.eviction.limits import check_continuation
from sparsekv_pl.eviction.prefill import continue_from
from sparsekv_pl.models.head import head_of
from sparsekv_pl.serve.prompts import SplitPrompt
from sparsekv_pl.usage.kept_context import KeptContext
from sparsekv_pl.usage.loaded_model import LoadedModel

ROWS = 256
"""Tokens whose logits are computed at a time."""


@dataclass(frozen=True)
class PromptScores:
    """Tokens of a prompt, and of the answer of at most one token, with their log-probabilities in nats."""

    ids: list[int]
    log_probs: list[float | None]
    """None for the document and the first token after it, which no evicted cache predicts."""
    top: list[dict[int, float] | None]
    """The most likely tokens at each place."""


@torch.no_grad()
def prompt_scores(
    model: LoadedModel, kept: KeptContext, prompt: SplitPrompt, top: int, new_tokens: int
) -> PromptScores:
    """Score the question's tokens after the document's kept cache, and take ``new_tokens`` (0 or 1) greedily.

    ``top`` most likely tokens are given at each place, at least one.

    Raises
    ------
    ValueError
        If the question ends beyond the model's positions.
    """
    check_continuation(model.model, kept.next_position, len(prompt.question))
    ids = torch.tensor([prompt.question], device=model.device)
    head = head_of(model.model).to(torch.float32)
    log_probs: list[float | None] = [None] * (len(prompt.document) + 1)
    tops: list[dict[int, float] | None] = [None] * len(log_probs)
    with model.computing():
        hidden = continue_from(model.model, ids, kept.prefilled(1).cache, kept.next_position)[0]
    following = prompt.question[1:]
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, len(hidden), ROWS):
            found = head.logits(hidden[start : start + ROWS].float()).log_softmax(-1)
            best = found.topk(max(1, top), dim=-1)
            if start + ROWS >= len(hidden) and new_tokens:
                following = [*following, int(best.indices[-1, 0])]
            wanted = following[start : start + ROWS]
            labels = torch.tensor(wanted, dtype=torch.long, device=found.device)
            own = found[: len(wanted)].gather(1, labels[:, None])[:, 0].tolist()
            log_probs += own
            likely = zip(best.indices.tolist(), best.values.tolist(), strict=True)  # the last row may have no token
            for token, log_prob, (tokens, values) in zip(wanted, own, likely, strict=False):
                tops.append(dict(zip(tokens, values, strict=True)) | {token: log_prob})
    return PromptScores([*prompt.document, prompt.question[0], *following], log_probs, tops)
