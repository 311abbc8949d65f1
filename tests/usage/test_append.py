"""Appended text is read behind the kept pairs and evicted with them, as the next chunk of one prefill would be."""

import pytest
import torch
from kvpress import BasePress, ChunkKVPress, KeyDiffPress, KeyRerotationPress, KnormPress, ThinKPress

from sparsekv_pl.eviction.prefill import ChunkedPrefill
from sparsekv_pl.models.anchors import Anchors
from sparsekv_pl.presses import AnchorPress, PagePress
from sparsekv_pl.presses.nesting import press_name
from sparsekv_pl.usage.context_cache import ContextCache
from sparsekv_pl.usage.kept_context import KeptContext
from sparsekv_pl.usage.loaded_model import LoadedModel
from tests.usage.cache_cases import DOCUMENT, MORE, NEW, PRESSES, QUESTIONS, UNEVEN, bits, document_ids

ANCHORED = AnchorPress(0.5, KnormPress(), Anchors(sinks=1, recent=2, special=False))


class InTwo(ChunkedPrefill):
    """A prefill whose chunks are the document and what is appended to it."""

    def __init__(self, model: LoadedModel, press: BasePress | None, first: int, second: int) -> None:
        super().__init__(model.model, press, first + second, (first + second) // 2 + 1)
        self.bounds = [(0, first), (first, first + second)]


@pytest.mark.parametrize("press", [*PRESSES, ANCHORED, PagePress(0.5, page_tokens=4)], ids=press_name)
def test_it_equals_a_prefill_in_two_chunks_bit_for_bit(model: LoadedModel, press: BasePress | None) -> None:
    first = ContextCache.prefill(model, DOCUMENT, press)
    before = bits(first)
    both = first.append(MORE)
    assert bits(first) == before
    ids = torch.cat([document_ids(model), torch.tensor([model.encoder.encode(MORE)])], dim=1)
    filling = InTwo(model, press, first.tokens, ids.shape[1] - first.tokens)
    with torch.no_grad():
        filling.run(ids)
    expected = KeptContext.of(filling, ids)
    assert both.kept.next_position == expected.next_position and torch.equal(both.kept.ids, ids)
    assert bits(ContextCache(model, press, both.origin, expected)).items() <= bits(both).items()
    if press is not None:
        assert both.kept_pairs == ids.shape[1] // 2 < first.kept_pairs + ids.shape[1] - first.tokens


def test_again_and_again_within_the_budget(model: LoadedModel) -> None:
    press = KeyRerotationPress(KeyDiffPress(0.5))
    cache = ContextCache.prefill(model, DOCUMENT, press, chunk_tokens=64, budget=32)
    for _ in range(20):
        cache = cache.append(DOCUMENT)
        assert cache.kept_pairs == cache.kept.next_position == 32
    assert cache.tokens > 1024
    assert len(cache.ask(QUESTIONS, max_new_tokens=NEW)) == 3


@pytest.mark.parametrize(
    "press, reason",
    [
        (UNEVEN, "PyramidKV looks at a whole context at once"),
        (ThinKPress(0.5, window_size=4), "ThinK has no compression_ratio that could hold"),
    ],
    ids=lambda value: press_name(value) if isinstance(value, BasePress) else "",
)
def test_presses_that_cannot_evict_again_are_refused(model: LoadedModel, press: BasePress, reason: str) -> None:
    cache = ContextCache.prefill(model, DOCUMENT, press)
    with pytest.raises(ValueError, match=f"^{reason}[^\n]+$"):
        cache.append(MORE)


def test_a_press_whose_scores_do_not_say_what_it_kept_evicts_again_too(model: LoadedModel) -> None:
    cache = ContextCache.prefill(model, DOCUMENT, ChunkKVPress(KnormPress(0.5), chunk_length=4))
    assert not cache.kept.each("positions")
    assert cache.append(MORE).kept_pairs < cache.kept_pairs + len(model.encoder.encode(MORE))


def test_nothing_to_append_and_no_room_are_one_line(model: LoadedModel) -> None:
    cache = ContextCache.prefill(model, DOCUMENT, KnormPress(0.5))
    for text, message in {"": "the text to append is empty", "a " * 2000: "this model was trained on 1024"}.items():
        with pytest.raises(ValueError, match=message):
            cache.append(text)
