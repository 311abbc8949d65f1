"""A kept cache in few bits: small in memory and on disk, and what attention reads is what was stored."""

from pathlib import Path

import pytest
import torch
from kvpress import BasePress, KeyDiffPress, KeyRerotationPress, KnormPress

from sparsekv_pl.eviction.quantised_pairs import PairQuantisation
from sparsekv_pl.eviction.quantised_prefill import QuantisedPrefill
from sparsekv_pl.presses.nesting import press_name
from sparsekv_pl.usage.cache_file import read_cache
from sparsekv_pl.usage.context_cache import ContextCache
from sparsekv_pl.usage.kept_context import PACKED, KeptContext
from sparsekv_pl.usage.loaded_model import LoadedModel
from tests.eviction.slow_rounding import slowly_rounded
from tests.random_models import Build
from tests.usage.cache_cases import DOCUMENT, MORE, NEW, QUESTIONS, bits, document_ids

FOUR = PairQuantisation(4, group=16, residual=3)


@pytest.mark.parametrize("press", [None, KeyDiffPress(0.5)], ids=press_name)
def test_pairs_are_rounded_once_and_held_in_few_bits(model: LoadedModel, press: BasePress | None) -> None:
    whole, packed = (ContextCache.prefill(model, DOCUMENT, press, quantisation=how) for how in (None, FOUR))
    for layer in range(whole.kept.layers):
        expected = slowly_rounded(*whole.kept.pairs(layer), FOUR.bits, FOUR.group, FOUR.residual)
        torch.testing.assert_close(packed.kept.pairs(layer), expected, rtol=1e-5, atol=1e-5)
    assert packed.kept_pairs == whole.kept_pairs and packed.tokens == whole.tokens
    held = sum(tensor.nbytes for name, tensor in packed.kept.tensors.items() if not name.startswith("positions"))
    assert packed.kv_bytes == held < whole.kv_bytes / 3  # float32 numbers
    assert set(PACKED) <= {name.partition(".")[0] for name in packed.kept.tensors}
    assert str(packed.origin).endswith(", 4 bits, groups of 16, newest 3 whole")


def test_answers_and_generate_read_the_rounded_pairs(model: LoadedModel) -> None:
    """The slow way: the rounded pairs as a whole cache."""
    cache = ContextCache.prefill(model, DOCUMENT, KnormPress(0.5), quantisation=PairQuantisation(2))
    slow = ContextCache(model, cache.press, cache.origin, cache.kept.whole())
    assert slow.kv_bytes > 5 * cache.kv_bytes
    assert cache.ask(QUESTIONS, max_new_tokens=NEW) == slow.ask(QUESTIONS, max_new_tokens=NEW)
    answers = [one.generate(QUESTIONS[0], max_new_tokens=NEW).tolist() for one in (cache, slow)]
    assert answers[0] == answers[1]
    before = bits(cache)
    cache.ask(QUESTIONS[0], max_new_tokens=NEW)
    assert bits(cache) == before


@pytest.mark.parametrize("press", [KeyDiffPress(0.5), KeyRerotationPress(KnormPress(0.5))], ids=press_name)
def test_it_is_saved_loaded_and_appended_to_bit_for_bit(model: LoadedModel, press: BasePress, tmp_path: Path) -> None:
    cache, path = ContextCache.prefill(model, DOCUMENT, press, quantisation=FOUR), tmp_path / "kept.safetensors"
    cache.save(path)
    whole = ContextCache.prefill(model, DOCUMENT, press)
    whole.save(tmp_path / "whole.safetensors")
    assert path.stat().st_size < (tmp_path / "whole.safetensors").stat().st_size / 2
    loaded = ContextCache.load(path, model)
    assert bits(loaded) == bits(cache) and loaded.origin == cache.origin
    assert loaded.kept.quantisation == FOUR == read_cache(path)[1].quantisation
    ids = torch.cat([document_ids(model), torch.tensor([model.encoder.encode(MORE)])], dim=1)
    filling = QuantisedPrefill(model.model, press, ids.shape[1], ids.shape[1] // 2 + 1, quantisation=FOUR)
    filling.bounds = [(0, cache.tokens), (cache.tokens, ids.shape[1])]
    with torch.no_grad():
        filling.run(ids)
    expected = bits(ContextCache(model, press, cache.origin, KeptContext.of(filling, ids)))
    assert bits(loaded.append(MORE)) == expected


def test_layers_with_a_window_stay_whole(random_model: Build) -> None:
    network = random_model(
        layer_types=["sliding_attention", "full_attention"], sliding_window=8, use_sliding_window=True
    )
    ids = torch.arange(40)[None]
    filling = QuantisedPrefill(network, KnormPress(0.5), 40, quantisation=PairQuantisation(4))
    with torch.no_grad():
        cache = filling.run(ids).cache
    kept = KeptContext.of(filling, ids)
    windowed = sum(part.nbytes for part in kept.pairs(0))
    assert kept.packed_layers == [1] and kept.kv_bytes == windowed + filling.packed[1].nbytes
    for layer, own in enumerate(cache.layers):
        assert own.keys is not None and torch.equal(kept.pairs(layer)[0], own.keys)
    assert kept.whole().stored_like(kept).kv_bytes == kept.kv_bytes


def test_two_are_merged_if_they_are_stored_alike(model: LoadedModel) -> None:
    press, eight = KnormPress(0.5), PairQuantisation(8)
    first, second = (ContextCache.prefill(model, text, press, quantisation=eight) for text in (DOCUMENT, MORE))
    both = first.merge(second)
    assert both.kept_pairs == first.kept_pairs + second.kept_pairs and both.kept.quantisation == eight
    slow = [ContextCache.prefill(model, text, KnormPress(0.5)) for text in (DOCUMENT, MORE)]
    exact = slow[0].merge(slow[1])
    for layer in range(both.kept.layers):
        torch.testing.assert_close(both.kept.pairs(layer), exact.kept.pairs(layer), rtol=0.05, atol=0.05)
    assert len(both.append(MORE).ask(QUESTIONS, max_new_tokens=NEW)) == 3
    with pytest.raises(ValueError, match=r"^merge: the first cache has its pairs 8 bits, the second whole[^\n]+$"):
        first.merge(slow[1])
