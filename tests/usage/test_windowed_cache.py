"""Kept caches of models with windows or without attention in some layers: saved, loaded, asked and appended to."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from kvpress import BasePress, KeyRerotationPress, KnormPress, PyramidKVPress, SnapKVPress
from torch import Tensor

from sparsekv_pl.eviction.prefill import prefill
from sparsekv_pl.models.backbone import Backbone
from sparsekv_pl.models.layer_kinds import evicted_layers
from sparsekv_pl.presses.nesting import press_name
from sparsekv_pl.usage.context_cache import ContextCache
from sparsekv_pl.usage.kept_context import KeptContext
from sparsekv_pl.usage.loaded_model import LoadedModel
from tests.architecture_abilities import own_attention
from tests.usage.cache_cases import NEW, bits
from tests.usage.test_append import InTwo
from tests.windowed_models import WINDOW, saved

Load = Callable[[str], LoadedModel]


@pytest.fixture(scope="module")
def load(tiny_models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Load:
    folders: dict[str, str] = {}

    def load(kind: str) -> LoadedModel:
        if kind not in folders:
            folders[kind] = saved(kind, tmp_path_factory.mktemp(kind), tiny_models["llama"])
        return LoadedModel(Backbone(pretrained=folders[kind], dtype="float32", lora=None))

    return load


def tokens(count: int, seed: int) -> list[int]:
    return torch.randint(3, 1000, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


DOCUMENT, MORE = tokens(45, 0), tokens(2 * WINDOW + 5, 1)
QUESTIONS = [tokens(5, 2), tokens(WINDOW + 3, 3)]


@torch.no_grad()
def without_a_cache(model: LoadedModel, ids: list[int]) -> str:
    """The model's own answer, by its own attention and all tokens at every step."""
    read = torch.tensor([ids])
    with own_attention(model.model):
        while read.shape[1] < len(ids) + NEW:
            found: Tensor = model.model(input_ids=read, use_cache=False).logits[:, -1:].argmax(-1)
            if int(found) in model.stop_ids:
                break
            read = torch.cat([read, found], dim=1)
    return model.text_of(read[0, len(ids) :].tolist()).strip()


PRESSES = [None, KnormPress(0.5), SnapKVPress(0.5, window_size=4), KeyRerotationPress(KnormPress(0.5))]


@pytest.mark.parametrize(
    ("kind", "press"),
    [("gemma3", press) for press in PRESSES]
    + [
        (kind, press) for kind in ("llama4", "lfm2", "qwen3-next", "falcon-h1") for press in PRESSES[:2]
    ],  # others do not fit them
    ids=lambda value: value if isinstance(value, str) else press_name(value),
)
def test_saved_and_loaded_it_answers_and_grows_the_same(
    load: Load, kind: str, press: BasePress | None, tmp_path: Path
) -> None:
    """Bit for bit, for a document and an appended text that are both longer than the windows.

    Half the layers have full attention, and the others windows, chunks, convolutions or gated delta nets; or all have
    full attention and a state space beside it.
    """
    model, path = load(kind), tmp_path / "kept.safetensors"
    cache = ContextCache.prefill(model, DOCUMENT, press)
    cache.save(path)
    before, loaded = bits(cache), ContextCache.load(path, load(kind))
    assert bits(loaded) == before and loaded.kept.evicted == cache.kept.evicted
    assert (loaded.kept_pairs, loaded.kv_bytes) == (cache.kept_pairs, cache.kv_bytes)
    assert loaded.ask(QUESTIONS, max_new_tokens=NEW) == cache.ask(QUESTIONS, max_new_tokens=NEW)
    assert [loaded.ask(one, max_new_tokens=NEW) for one in QUESTIONS] == cache.ask(QUESTIONS, max_new_tokens=NEW)
    grown, again = cache.append(MORE), loaded.append(MORE)
    assert bits(grown) == bits(again) and bits(cache) == before
    assert grown.ask(QUESTIONS, max_new_tokens=NEW) == again.ask(QUESTIONS, max_new_tokens=NEW)
    ids = torch.tensor([DOCUMENT + MORE])
    with torch.no_grad():
        filling = InTwo(model, press, len(DOCUMENT), len(MORE))
        filling.run(ids)
        expected = prefill(model.model, ids[:, : len(DOCUMENT)], press)
    assert bits(ContextCache(model, press, grown.origin, KeptContext.of(filling, ids))).items() <= bits(grown).items()
    if press is None:
        assert cache.ask(QUESTIONS, max_new_tokens=NEW) == [without_a_cache(model, DOCUMENT + one) for one in QUESTIONS]
        assert grown.ask(QUESTIONS[0], max_new_tokens=NEW) == without_a_cache(model, DOCUMENT + MORE + QUESTIONS[0])
        return
    assert cache.kept_pairs == len(DOCUMENT) // 2 and grown.kept_pairs == len(DOCUMENT + MORE) // 2
    for layer in {0, 1, 2, 3} - set(evicted_layers(model.model.config)):
        if (keys := cache.kept.tensors.get(f"keys.{layer}")) is not None:
            reference = expected.cache.layers[layer].keys
            assert reference is not None and torch.equal(keys, reference) and keys.shape[2] < WINDOW


@pytest.mark.parametrize("kind", ["mistral", "phi3"])
def test_windows_alone_are_kept_whole_at_any_length_and_evicted_within_the_window(
    load: Load, kind: str, tmp_path: Path
) -> None:
    model, path = load(kind), tmp_path / "kept.safetensors"
    whole = ContextCache.prefill(model, DOCUMENT)
    whole.save(path)
    loaded = ContextCache.load(path, model)
    assert bits(loaded) == bits(whole)
    assert loaded.ask(QUESTIONS, max_new_tokens=NEW) == [without_a_cache(model, DOCUMENT + one) for one in QUESTIONS]
    grown = loaded.append(MORE)
    assert bits(grown) == bits(whole.append(MORE))
    assert grown.ask(QUESTIONS[0], max_new_tokens=NEW) == without_a_cache(model, DOCUMENT + MORE + QUESTIONS[0])
    press, outside = KnormPress(0.5), rf"are more than the window of {WINDOW} through which every layer"
    with pytest.raises(ValueError, match=outside):
        ContextCache.prefill(model, DOCUMENT, press)
    evicted = ContextCache.prefill(model, DOCUMENT[:6], press)
    evicted.save(path)
    loaded = ContextCache.load(path, model)
    assert bits(loaded) == bits(evicted) and loaded.kept_pairs == 3
    short = QUESTIONS[0][:3]
    assert loaded.ask(short, max_new_tokens=3) == evicted.ask(short, max_new_tokens=3)
    assert bits(loaded.append(MORE[:4])) == bits(evicted.append(MORE[:4]))
    with pytest.raises(ValueError, match=outside):
        loaded.append(MORE)
    for ask in (loaded.ask, loaded.generate):
        with pytest.raises(ValueError, match=rf"leave the window of {WINDOW} .* its pairs were evicted"):
            ask(QUESTIONS[1], max_new_tokens=3)
    with pytest.raises(ValueError, match=r"merge: .*through which every layer"):
        loaded.merge(whole)


def test_what_such_models_cannot_do_is_refused_by_name(load: Load, tmp_path: Path) -> None:
    gemma, lfm, path = load("gemma3"), load("lfm2"), tmp_path / "kept.safetensors"
    with pytest.raises(ValueError, match=r"PyramidKV needs every layer.* in layers 0, 2"):
        ContextCache.prefill(gemma, DOCUMENT, PyramidKVPress(0.5, window_size=4))
    cache = ContextCache.prefill(lfm, DOCUMENT, KnormPress(0.5))
    with pytest.raises(ValueError, match=r"generate: Lfm2ForCausalLM has layers without attention.* use ask"):
        cache.generate(QUESTIONS)
    with pytest.raises(ValueError, match=r"merge: Lfm2ForCausalLM has layers \[0, 2\] without attention"):
        cache.merge(cache)
    cache.save(path)
    with pytest.raises(ValueError, match=r"was made by the model 'lfm2.*' .* this is 'gemma3"):
        ContextCache.load(path, gemma)


@torch.no_grad()
def test_generate_continues_windows_as_ask_does(load: Load, tmp_path: Path) -> None:
    model, path = load("gemma3"), tmp_path / "kept.safetensors"
    cache = ContextCache.prefill(model, DOCUMENT, KnormPress(0.5))
    cache.save(path)
    for one in (cache, ContextCache.load(path, model)):
        asked = one.inputs(QUESTIONS)["input_ids"].shape[1]
        rows = one.generate(QUESTIONS, max_new_tokens=NEW, do_sample=False)[:, asked:].tolist()
        said = [[token for token in row if token not in model.stop_ids] for row in rows]
        assert [model.text_of(row).strip() for row in said] == cache.ask(QUESTIONS, max_new_tokens=NEW)
