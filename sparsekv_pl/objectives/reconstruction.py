"""The reconstruction objective: predict evicted text from the pairs that were kept."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparsekv_pl.eviction.interface import EvictedContext
from sparsekv_pl.eviction.request import Request
from sparsekv_pl.models.batch import IGNORE
from sparsekv_pl.models.head import Head, as_head
from sparsekv_pl.models.seeding import generator_for
from sparsekv_pl.objectives.losses import CHUNK_TOKENS, distillation_loss
from sparsekv_pl.objectives.objective import Objective, StudentView
from sparsekv_pl.objectives.rank_means import rank_share


@dataclass
class Reconstruction(Objective):
    """Cross-entropy of the text of evicted blocks, in nats, a mean over the supervised evicted tokens.

    One block is predicted per row: the instruction, the tokens before the block (the cue) and the block itself follow
    the evicted cache. Evicted tokens can only be predicted from kept pairs, so this trains the kept pairs to carry
    information about their neighbours. In-context autoencoders pretrain in this way (https://arxiv.org/abs/2307.06945),
    and KVzip selects the pairs that such a repetition attends to (https://arxiv.org/abs/2505.23416); here pairs are
    evicted first and predicted afterwards.

    If nothing was evicted, the loss is 0. Logged are ``reconstruction`` (the cross-entropy), ``reconstruction_lost``
    (the share of layers and KV heads in which the block's tokens were evicted) and ``reconstruction_accuracy`` (the
    share of supervised tokens that are the most likely next token).

    Parameters
    ----------
    block_size
        Tokens per block.
    cue_tokens
        Tokens before the block that identify it. They may be evicted too.
    least_lost
        A token is supervised if its pairs were evicted in at least this share of layers and KV heads.
    slack
        The block is drawn among those whose lost share is at most this much below the highest; the row's tokens seed
        the draw.
    instruction
        Plain text before the cue; may be empty.
    chunk_tokens
        Tokens whose logits exist at once; changes memory and speed, not the result.

    Raises
    ------
    ValueError
        For a setting out of range, and for contexts shorter than cue and block.
    """

    block_size: int = 32
    cue_tokens: int = 8
    least_lost: float = 0.5
    slack: float = 0.1
    instruction: str = "\n\nRepeat the text that goes on after: "
    chunk_tokens: int = CHUNK_TOKENS
    instruction_ids: list[int] | None = field(default=None, init=False, repr=False, compare=False)
    """The instruction's token ids, set by ``prepare``."""
    request = Request(contexts=True)

    def __post_init__(self) -> None:
        for name in ("block_size", "cue_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"Reconstruction.{name}={getattr(self, name)} must be at least 1 token")
        if not 0 < self.least_lost <= 1:
            raise ValueError(f"Reconstruction.least_lost={self.least_lost} must be above 0 and at most 1")
        if not 0 <= self.slack <= 1:
            raise ValueError(f"Reconstruction.slack={self.slack} must be between 0 and 1")

    def prepare(self, tokenizer: Any) -> None:
        """Encode the instruction with the model's tokenizer."""
        self.instruction_ids = tokenizer.encode(self.instruction, add_special_tokens=False)

    def check_context(self, tokens: int) -> None:
        """Raise ``ValueError`` if a context of ``tokens`` tokens is shorter than cue and block."""
        if tokens < self.cue_tokens + self.block_size:
            raise ValueError(
                f"Reconstruction asks for {self.block_size} tokens after a cue of {self.cue_tokens}, and a context of "
                f"{tokens} is shorter: use a smaller block_size or longer contexts (data.shortest_context)"
            )

    def __call__(self, view: StudentView) -> dict[str, Tensor]:
        asked = [self._ask(context) for context in view.contexts]
        hidden, labels, lost = (torch.cat(parts) for parts in zip(*asked, strict=True))
        head = as_head(view.head)
        terms = distillation_loss(hidden, None, head, labels, kl_weight=0.0, chunk_tokens=self.chunk_tokens)
        count, share = terms.tokens.clamp(min=1), rank_share(terms.tokens)
        return {
            "loss": share * terms.loss,
            "reconstruction": share * terms.cross_entropy,
            "reconstruction_lost": share * torch.where(labels != IGNORE, lost, 0).sum() / count,
            "reconstruction_accuracy": share * _hits(hidden, head, labels, self.chunk_tokens) / count,
        }

    def _ask(self, context: EvictedContext) -> tuple[Tensor, Tensor, Tensor]:
        """Return the hidden states (N, E) that predict the blocks, labels (N,) and lost shares (N,).

        N = B * block_size.
        """
        if self.instruction_ids is None:
            raise ValueError("Reconstruction has not encoded its instruction: call prepare(tokenizer) first")
        first = self._first(context)
        tokens = torch.arange(self.cue_tokens + self.block_size, device=first.device)
        places = first.unsqueeze(1) + tokens
        piece, lost = context.ids.gather(1, places), context.lost.gather(1, places)[:, self.cue_tokens :]
        instruction = torch.tensor(self.instruction_ids, dtype=piece.dtype, device=piece.device)
        hidden = context.continued(torch.cat([instruction.expand(len(piece), -1), piece], dim=1))
        before = hidden[:, -self.block_size - 1 : -1]
        labels = piece[:, self.cue_tokens :].masked_fill(lost < self.least_lost, IGNORE)
        return before.flatten(0, 1), labels.flatten(), lost.flatten()

    def _first(self, context: EvictedContext) -> Tensor:
        """Choose the position (B,) where each row's cue begins, a function of the row alone."""
        self.check_context(context.ids.shape[1])
        shares = context.lost[:, self.cue_tokens :].unfold(1, self.block_size, 1).mean(-1)
        draws = _draws(context.ids.tolist(), shares.shape[1]).to(shares.device)
        return (shares + self.slack * draws).argmax(1)


def _draws(rows: Sequence[Sequence[int]], count: int) -> Tensor:
    """Draw (B, count) numbers in [0, 1), seeded by each row's token ids."""
    return torch.stack([torch.rand(count, generator=generator_for("asked block", *row)) for row in rows])


@torch.no_grad()
def _hits(hidden_NE: Tensor, head: Head, labels_N: Tensor, chunk_tokens: int) -> Tensor:
    """Count the labels that are the most likely token; ``IGNORE`` never is."""
    pairs = zip(hidden_NE.split(chunk_tokens), labels_N.split(chunk_tokens), strict=True)
    return torch.stack([(head.logits(hidden).argmax(-1) == labels).sum() for hidden, labels in pairs]).sum()
