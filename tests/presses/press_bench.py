"""One press on one tiny model: what the press matrix runs."""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from sparsekv_pl.eviction.kept_positions import kept_positions, masked_keys
from sparsekv_pl.eviction.prefill import prefill
from sparsekv_pl.eviction.prefilled_cache import Prefilled
from sparsekv_pl.eviction.request import Request
from sparsekv_pl.models.decoder import decoder_of
from sparsekv_pl.presses.nesting import presses_in
from sparsekv_pl.presses.step_draws import draw
from tests.presses.press_cases import CASES, PressCase, Setting
from tests.random_models import random_model

VOCABULARY = 1024
MakeBench = Callable[..., "Bench"]
each_case = pytest.mark.parametrize("case", CASES, ids=str)


@cache
def model_of(kind: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    settings = {"vocab_size": VOCABULARY, "max_position_embeddings": 1024, "pad_token_id": 0}
    return random_model(kind, **settings).to(dtype)


class Bench(NamedTuple):
    """One press on one model, in one setting."""

    case: PressCase
    model: PreTrainedModel
    setting: Setting
    text: Tensor
    tokenizer: Any

    @property
    def ids(self) -> Tensor:
        return self.text[: self.setting.rows, : self.setting.tokens or self.case.shortest]

    @property
    def budget(self) -> int:
        return kept_of(self.ids.shape[1], self.setting.compression_ratio)

    def press(self, **options: Any) -> Any:
        press = self.case.press(self.setting.name, **({"compression_ratio": self.setting.compression_ratio} | options))
        for inner in presses_in(press):
            if hasattr(inner, "tokenizer"):
                inner.tokenizer = self.tokenizer
        return press

    def run(self, ids: Tensor, press: Any = None, step: int = 0) -> "Run":
        """Evict from contexts (B, L), with a new press unless one is given."""
        press = press or self.press()
        self.model.train(self.case.evicts_in[-1])
        full = full_of(self.model, ids)  # first: a forward clears what AdaKVPress hides
        draw(press, step)
        prefilled = prefill(self.model, ids, press, request=Request(scores=torch.is_grad_enabled()))
        return Run(prefilled, kept_in(self.model, full, prefilled.cache))


class Run(NamedTuple):
    prefilled: Prefilled
    selection: Tensor
    """(layers, B, K, L) bool, True where a pair stayed."""


def kept_of(tokens: int, ratio: float) -> int:
    """The budget, in tokens."""
    return max(1, int(tokens * (1 - ratio)))


FULL: dict[tuple[int, str], DynamicCache] = {}


@torch.no_grad()
def full_of(model: PreTrainedModel, ids: Tensor) -> DynamicCache:
    """The cache of contexts (B, L) without an eviction: most are asked for by every press."""
    key = (id(model), str(ids.tolist()))
    if key not in FULL:
        FULL[key] = prefill(model, ids, None).cache
    return FULL[key]


def kept_in(model: PreTrainedModel, full: DynamicCache, evicted: DynamicCache) -> Tensor:
    return torch.stack(kept_positions(full, evicted, masked_keys(model), decoder_of(model).rotary_emb))


def assert_equal(cache: DynamicCache, expected: DynamicCache) -> None:
    for here, there in zip(cache.layers, expected.layers, strict=True):
        assert torch.equal(here.keys, there.keys) and torch.equal(here.values, there.values)


def check_protected(at: Bench, press: Any, selection: Tensor, contexts: Tensor | None = None) -> None:
    """What ``press`` protects of contexts (B, L), the bench's own by default, is in ``selection`` (layers, B, K, L)."""
    for row, ids in enumerate(at.ids if contexts is None else contexts):
        protected = list(dict.fromkeys(at.case.protects(press, ids)))
        if at.case.in_order or len(protected) <= at.budget:
            assert selection[:, row][..., protected[: at.budget]].all()
