"""The teacher: the base model with the full cache."""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsekv_pl.attention.evicted_attention import CACHED, Observer, attention_implementation
from sparsekv_pl.eviction.skipped_mlp import last_mlp_for
from sparsekv_pl.models.backbone import adapter_off, causal_lm
from sparsekv_pl.models.decoder import decoder_of
from sparsekv_pl.models.evaluation_mode import evaluating
from sparsekv_pl.models.head import Head, head_of


class Teacher:
    """Full-cache passes through the base model.

    With an adapter, the base model is the student with its adapter switched off: no second copy of the weights. If
    every weight trains, a frozen copy is made, so that the teacher does not change with the student. Either computes in
    evaluation mode, without the base's own dropout.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._copy: list[
            PreTrainedModel
        ] = []  # in a list, so that a LightningModule does not register it as a submodule
        if not hasattr(model, "disable_adapter"):
            self._copy = [copy.deepcopy(model).eval().requires_grad_(False)]

    @torch.no_grad()
    def __call__(
        self, context_ids: Tensor, continuation_ids: Tensor, observer: Observer | None = None, before: int = 0
    ) -> Tensor:
        """Return the hidden states (B, before + T, E) of a continuation (B, T) after its context (B, L), no gradient.

        The context's last ``before`` tokens are included. ``observer`` gets every layer's queries, keys and values.
        """
        model = self.network
        if model.device != context_ids.device:
            torch.nn.Module.to(model, context_ids.device)
        ids = torch.cat([context_ids, continuation_ids], dim=1)
        extra = {} if observer is None else {"observer": observer}
        newest = before + continuation_ids.shape[1]
        computed = last_mlp_for(model, newest)
        with evaluating(model), adapter_off(self._model), attention_implementation(model, CACHED), computed:
            hidden = decoder_of(model)(input_ids=ids, use_cache=False, **extra).last_hidden_state
        return hidden[:, -newest:]

    @property
    def own_network(self) -> PreTrainedModel | None:
        """The frozen copy; None if the teacher shares the student's layers."""
        return self._copy[0] if self._copy else None

    @property
    def network(self) -> PreTrainedModel:
        """The teacher's network: the student's, or the frozen copy."""
        return self._copy[0] if self._copy else causal_lm(self._model)

    @property
    def head(self) -> Head | None:
        """The teacher's own LM head; None if it is the student's."""
        return head_of(self._copy[0]) if self._copy else None
