"""Objectives on the tokens that follow an eviction."""

from dataclasses import dataclass

from torch import Tensor

from sparsekv_pl.eviction.request import Request
from sparsekv_pl.losses import CHUNK_TOKENS, distillation_loss
from sparsekv_pl.objectives.objective import Objective, StudentView
from sparsekv_pl.ranks import rank_share


@dataclass
class LM(Objective):
    """Next-token cross-entropy under eviction.

    Parameters
    ----------
    chunk_tokens
        Tokens whose logits exist at once; memory against launch overhead, not the result.
    """

    chunk_tokens: int = CHUNK_TOKENS

    def __call__(self, view: StudentView) -> dict[str, Tensor]:
        terms = distillation_loss(
            view.hidden_NE,
            None,
            view.head_weight_VE,
            view.labels_N,
            kl_weight=0.0,
            chunk_tokens=self.chunk_tokens,
        )
        share = rank_share(terms.tokens)
        return {"loss": share * terms.loss, "cross_entropy": share * terms.cross_entropy}


@dataclass
class SparseLM(LM):
    """Next-token cross-entropy under eviction, plus what SparseRegPress measures: attention that is spread out."""

    request = Request(press_losses=True)

    def __call__(self, view: StudentView) -> dict[str, Tensor]:
        terms = super().__call__(view)
        regularisation = sum(view.press_losses.values(), terms["loss"].new_zeros(()))
        logs = {f"press/{name}": value.detach() for name, value in view.press_losses.items()}
        return {**terms, "loss": terms["loss"] + regularisation, **logs}


@dataclass
class EIT(Objective):
    """Eviction-Invariant Training: cross-entropy + kl_weight * KL(teacher || student), both under eviction.

    Parameters
    ----------
    kl_weight
        lambda.
    temperature
        Of both distributions in the KL term.
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
            view.head_weight_VE,
            view.labels_N,
            kl_weight=self.kl_weight,
            temperature=self.temperature,
            teacher_head_weight_VE=view.teacher_head_weight_VE,
            chunk_tokens=self.chunk_tokens,
        )
        share = rank_share(terms.tokens)
        return {"loss": share * terms.loss, "cross_entropy": share * terms.cross_entropy, "kl": share * terms.kl}
