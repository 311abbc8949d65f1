"""Presses where others call them: inside kvpress's wrappers, while decoding, in a padded batch."""

import inspect
from collections.abc import Callable
from typing import Any

import kvpress
import pytest
import torch
from kvpress import (
    AdaKVPress,
    BasePress,
    ChunkPress,
    ComposedPress,
    DecodingPress,
    KeyRerotationPress,
    KnormPress,
    PrefillDecodingPress,
    ScorerPress,
    SnapKVPress,
)
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from sparsekv_pl.cli.config_values import explained
from sparsekv_pl.eviction.continuation import Continuation
from sparsekv_pl.eviction.prefill import ChunkedPrefill
from sparsekv_pl.eviction.request import Request
from sparsekv_pl.eviction.while_decoding import Decoding
from sparsekv_pl.presses import EvictionAugPress
from sparsekv_pl.presses.ratio import set_compression_ratio
from sparsekv_pl.presses.sparse_reg import SparseRegPress
from sparsekv_pl.presses.step_draws import draw
from tests.presses.press_bench import MakeBench, check_protected, kept_in, kept_of, model_of
from tests.presses.press_cases import CASES, OURS, PressCase

WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "AdaKV": AdaKVPress,
    "Chunk": lambda press: ChunkPress(press, chunk_length=32),
    "Composed": lambda press: ComposedPress([press, KnormPress(0.5)]),
    "KeyRerotation": KeyRerotationPress,
}
SCORERS = pytest.mark.parametrize("case", [case for case in CASES if isinstance(case.press(), ScorerPress)], ids=str)
"""What these wrappers take."""


@SCORERS
@pytest.mark.parametrize("wrapper", WRAPPERS)
@torch.no_grad()
def test_inside_wrappers(bench: MakeBench, case: PressCase, wrapper: str) -> None:
    at = bench("llama", case)
    press, ids = at.press(), at.text[:3, :96]
    wrapped = WRAPPERS[wrapper](press)
    with case.holds(wrapper):
        run = at.run(ids, wrapped)
        expected = {"Chunk": 3 * 16, "Composed": kept_of(48, 0.5)}.get(wrapper, 48)
        heads = run.selection.shape[2]
        assert (run.selection.sum((-1, -2)) == heads * expected).all()
        if wrapper != "AdaKV":  # it hides pairs, and may leave the heads of a row different numbers
            assert [layer.keys.shape[2] for layer in run.prefilled.cache.layers] == [expected, expected]
        if wrapper in ("AdaKV", "KeyRerotation"):
            check_protected(at, press, run.selection, ids)
        others = torch.cat([at.text[4:6, :96], ids[-1:]])
        assert torch.equal(at.run(others, WRAPPERS[wrapper](at.press())).selection[:, -1], run.selection[:, -1])


@SCORERS
@torch.no_grad()
def test_while_tokens_are_decoded(bench: MakeBench, case: PressCase) -> None:
    at = bench("llama", case)
    press, model = at.press(), at.model.eval()
    set_compression_ratio(press, 0.0)
    start = ChunkedPrefill(model, press, 64, request=Request(contexts=True))
    with case.holds("Decoding"):
        start.run(at.text[:2, :64])
        reading = Continuation(start, Decoding(12, budget=40, context=False), 0.5, 24)
        assert reading.read(at.text[:2, 64:88]).isfinite().all()
        left = 40 if False in case.evicts_in else 88
        assert [layer.keys.shape[2] for layer in reading.reading.cache.layers] == [left, left]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", OURS, ids=str)  # kvpress's own take padding for text
@torch.no_grad()
def test_padding_goes_first_and_changes_nothing_else(bench: MakeBench, case: PressCase, side: str) -> None:
    """In a forward of transformers' own; where a row has as many tokens as the budget or fewer, all of them stay."""
    at = bench("llama", case)
    model = at.model.train(case.evicts_in[0])
    lengths, budget = [60, 96, 33], 48
    press = at.press()
    mask = torch.arange(96) < torch.tensor(lengths)[:, None]
    mask = mask.flip(1) if side == "left" else mask
    ids = torch.zeros(3, 96, dtype=torch.int64)
    for row, length in enumerate(lengths):
        ids[row, mask[row]] = at.text[row, :length]
    with case.holds("padding"):
        kept = stock(model, ids, mask, press)
        assert (kept.sum(-1) == budget).all()
        for row, length in enumerate(lengths):
            of_real = kept[:, row][..., mask[row]]
            assert (of_real.sum(-1) == min(budget, length)).all()
            check_protected(at, press, of_real[:, None], at.text[row : row + 1, :length])
            # Rows have draws of their own: only the first can be compared.
            if length > budget and not case.padding_blurs and (row == 0 or not case.drawn_by):
                alone = at.press()
                set_compression_ratio(alone, 1 - (budget + 0.5) / length)
                real = torch.ones(1, length, dtype=torch.bool)
                assert torch.equal(stock(model, at.text[row : row + 1, :length], real, alone)[:, 0], of_real)


def stock(model: PreTrainedModel, ids: Tensor, mask: Tensor, press: Any) -> Tensor:
    """(layers, B, K, L) bool: what ``press`` keeps of contexts (B, L) whose padding ``mask`` (B, L) hides."""
    inputs = {"input_ids": ids, "attention_mask": mask.long(), "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    full, evicted = DynamicCache(), DynamicCache()
    model.model(**inputs, past_key_values=full)
    draw(press, 0)
    with press(model):
        model.model(**inputs, past_key_values=evicted)
    return kept_in(model, full, evicted)


INNER = {
    "EvictionAugPress": lambda: EvictionAugPress([KnormPress(0.5), SnapKVPress(0.5, window_size=8)], score_all=True),
    "SparseRegPress": lambda: SparseRegPress(KnormPress(0.5)),
}
HOLDS = ("press", "presses", "base_press", "prefilling_press")
HOLDERS = {
    name: (made, next(field for field in HOLDS if field in inspect.signature(made).parameters))
    for name, made in vars(kvpress).items()
    if inspect.isclass(made) and issubclass(made, BasePress) and set(HOLDS) & set(inspect.signature(made).parameters)
}
EVICT = {"ComposedPress", "PrefillDecodingPress"}
"""Wrappers that let the inner press evict; the others need its scores."""


def inside(wrapper: str, inner: BasePress) -> BasePress:
    made, field = HOLDERS[wrapper]
    more: dict[str, Any] = {"compression_ratios": [0.5, 0.5]} if wrapper == "PerLayerCompressionPress" else {}
    wrapped: BasePress = explained(made, **({field: [inner] if field == "presses" else inner} | more))
    return wrapped


def kept(press: BasePress) -> list[int]:
    """Pairs per layer and KV head that a forward of 64 tokens leaves."""
    model, cache = model_of("llama").eval(), DynamicCache()
    ids = torch.randint(2, 1024, (1, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), press(model):
        model(ids, past_key_values=cache)
    return [layer.keys.shape[2] for layer in cache.layers]


def test_all_wrappers_are_looked_at() -> None:
    assert set(HOLDERS) > EVICT
    assert len(HOLDERS) >= 10


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("wrapper", HOLDERS)
def test_it_evicts_or_is_refused_by_name(wrapper: str, inner: str) -> None:
    if wrapper in EVICT:
        assert kept(inside(wrapper, INNER[inner]())) == [32, 32]
        return
    refusal = rf"{wrapper}\(.*{inner}.* is refused: .+|{inner} has no scores of its own"
    with pytest.raises(ValueError, match=refusal):
        kept(inside(wrapper, INNER[inner]()))


@pytest.mark.parametrize("inner", INNER)
def test_one_after_another_and_before_decoding(inner: str) -> None:
    press = INNER[inner]()
    assert kept(ComposedPress([KnormPress(0.5), press])) == [16, 16]
    assert kept(ComposedPress([press, KnormPress(0.5)])) == [16, 16]
    both = PrefillDecodingPress(press, DecodingPress(KnormPress(), compression_interval=8, target_size=16))
    assert kept(both) == [32, 32]


def test_the_press_of_the_step_evicts_inside_a_wrapper() -> None:
    """The two presses differ in their ratios; the two steps draw different presses."""
    augmented = EvictionAugPress([KnormPress(0.5), KnormPress(0.75)])
    found = set()
    for step in range(8):
        draw(augmented, step)
        found.add(kept(ComposedPress([augmented]))[0])
    assert found == {32, 16}
