"""The presses of the matrix where others call them: inside kvpress's wrappers, while decoding, in a padded batch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kvpress import AdaKVPress, ChunkPress, ComposedPress, KeyRerotationPress, KnormPress, ScorerPress
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from sparsekv_pl.eviction.decoding import read_while_evicting
from sparsekv_pl.eviction.prefill import prefill
from sparsekv_pl.presses.ratio import set_compression_ratio
from sparsekv_pl.presses.step_draws import draw
from tests.presses.press_bench import MakeBench, check_protected, kept_in, kept_of
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
    start = prefill(model, at.text[:2, :64], None)
    with case.holds("Decoding"):
        hidden = read_while_evicting(model, start, at.text[:2, 64:88], press, budget=40, interval=12)
        assert hidden.isfinite().all()
        left = 40 if False in case.evicts_in else 88
        assert [layer.keys.shape[2] for layer in start.cache.layers] == [left, left]


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
