"""Cross-entropy on the tokens that follow an eviction, alone or with a press's own loss terms."""

from dataclasses import dataclass

from torch import Tensor

from sparsekv_pl.eviction.request import Request
from sparsekv_pl.objectives.losses import CHUNK_TOKENS, distillation_loss
from sparsekv_pl.objectives.objective import Objective, StudentView
from sparsekv_pl.objectives.rank_means import rank_share


@dataclass
class LM(Objective):
    """Next-token cross-entropy under eviction.

    Parameters
    ----------
    chunk_tokens
        Tokens whose logits exist at once; changes memory and speed, not the result.
    """

    chunk_tokens: int = CHUNK_TOKENS

    def __call__(self, view: StudentView) -> dict[str, Tensor]:
        terms = distillation_loss(
            view.hidden_NE,
            None,
            view.head,
            view.labels_N,
            kl_weight=0.0,
            chunk_tokens=self.chunk_tokens,
        )
        share = rank_share(terms.tokens)
        return {"loss": share * terms.loss, "cross_entropy": share * terms.cross_entropy}


@dataclass
class SparseLM(LM):
    """Next-token cross-entropy under eviction plus the loss terms of SparseRegPress, which penalises spread attention.

    Parameters are those of ``LM``.
    """

    request = Request(press_losses=True)

    def __call__(self, view: StudentView) -> dict[str, Tensor]:
        terms = super().__call__(view)
        regularisation = sum(view.press_losses.values(), terms["loss"].new_zeros(()))
        logs = {f"press/{name}": value.detach() for name, value in view.press_losses.items()}
        return {**terms, "loss": terms["loss"] + regularisation, **logs}
