"""Eviction-invariant training: cross-entropy, and KL from the teacher's tokens to the student's."""

from dataclasses import dataclass

from torch import Tensor

from sparsekv_pl.eviction.request import Request
from sparsekv_pl.objectives.losses import CHUNK_TOKENS, distillation_loss
from sparsekv_pl.objectives.objective import Objective, StudentView
from sparsekv_pl.objectives.rank_means import rank_share


@dataclass
class EIT(Objective):
    """Eviction-Invariant Training: cross-entropy + kl_weight * KL(teacher || student), the student under eviction.

    Both terms are in nats, means over supervised tokens; see ``distillation_loss``.

    Parameters
    ----------
    kl_weight
        Weight of the KL term (lambda), at least 0.
    temperature
        Temperature of both distributions in the KL term, above 0.
    chunk_tokens
        Tokens whose logits exist at once; changes memory and speed, not the result.

    Raises
    ------
    ValueError
        For a setting out of range.
    """

    kl_weight: float = 1.0
    temperature: float = 1.0
    chunk_tokens: int = CHUNK_TOKENS
    request = Request(teacher=True)

    def __post_init__(self) -> None:
        if self.kl_weight < 0:
            raise ValueError(f"kl_weight={self.kl_weight} must not be negative")
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature} must be above 0")

    def __call__(self, view: StudentView) -> dict[str, Tensor]:
        terms = distillation_loss(
            view.hidden_NE,
            view.teacher_NE,
            view.head,
            view.labels_N,
            kl_weight=self.kl_weight,
            temperature=self.temperature,
            teacher_head=view.teacher_head,
            chunk_tokens=self.chunk_tokens,
        )
        share = rank_share(terms.tokens)
        return {"loss": share * terms.loss, "cross_entropy": share * terms.cross_entropy, "kl": share * terms.kl}
