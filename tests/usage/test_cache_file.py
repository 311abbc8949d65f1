"""A saved cache answers as before, bit for bit; the file says what made it and is refused where it does not belong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kvpress import BasePress, KeyDiffPress, KeyRerotationPress, KnormPress
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sparsekv_pl.models.backbone import Backbone
from sparsekv_pl.models.lora import Lora
from sparsekv_pl.presses.nesting import press_name
from sparsekv_pl.usage.context_cache import ContextCache
from sparsekv_pl.usage.loaded_model import LoadedModel
from tests.usage.cache_cases import DOCUMENT, MORE, NEW, PRESSES, QUESTIONS, UNEVEN, bits

Make = Callable[..., Backbone]


class OwnPress(KnormPress):
    """A press that no table knows."""


@pytest.mark.parametrize("press", [*PRESSES, UNEVEN], ids=press_name)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_asking_and_appending_are_equal_with_and_without_saving(
    tiny_backbone: Make, model: LoadedModel, press: BasePress | None, dtype: str, tmp_path: Path
) -> None:
    used = model if dtype == "float32" else LoadedModel(tiny_backbone("qwen3", lora=None, dtype=dtype))
    cache = ContextCache.prefill(used, DOCUMENT, press)
    cache.save(tmp_path / "kept.safetensors")
    loaded = ContextCache.load(tmp_path / "kept.safetensors", used)
    assert bits(loaded) == bits(cache) and loaded.origin == cache.origin
    assert loaded.ask(QUESTIONS, max_new_tokens=NEW) == cache.ask(QUESTIONS, max_new_tokens=NEW)
    if press is not UNEVEN:
        assert bits(loaded.append(MORE)) == bits(cache.append(MORE))


def test_logits_are_equal_bit_for_bit(model: LoadedModel, tmp_path: Path) -> None:
    cache = ContextCache.prefill(model, DOCUMENT, KeyDiffPress(0.75))
    cache.save(tmp_path / "kept.safetensors")
    loaded = ContextCache.load(tmp_path / "kept.safetensors", model)
    seen = [
        torch.stack(
            one.generate(QUESTIONS, max_new_tokens=NEW, output_logits=True, return_dict_in_generate=True).logits
        )
        for one in (cache, loaded)
    ]
    assert torch.equal(*seen)


def test_the_file_says_what_made_it(model: LoadedModel, tmp_path: Path) -> None:
    cache = ContextCache.prefill(model, DOCUMENT, KeyDiffPress(0.75), chunk_tokens=32, budget=16)
    cache.save(tmp_path / "kept.safetensors")
    with safe_open(tmp_path / "kept.safetensors", framework="pt") as file:
        about = json.loads(file.metadata()["sparsekv_pl"])
        shapes = {name: tuple(file.get_tensor(name).shape) for name in file.keys()}  # noqa: SIM118  no mapping
    assert about["model"] | {"weights": 0} == {
        "model": "qwen30",
        "weights": 0,
        "dtype": "float32",
        "load_in_4bit": False,
        "adapter": None,
        "adapter_weights": None,
    }
    assert about["eviction"]["press"] == "KeyDiffPress(compression_ratio=0.75)"
    assert about["eviction"]["compression_ratio"] == 0.75
    assert (about["tokens"], about["kv_bytes"], about["kept_pairs"]) == (cache.tokens, cache.kv_bytes, 16)
    assert len(about["tokens_sha256"]) == 64
    assert shapes["keys.0"] == (1, 2, 16, 16) and shapes["positions.1"] == (1, 2, 16)
    assert str(tmp_path) not in json.dumps(about)


@pytest.fixture
def adapters(tiny_backbone: Make, tmp_path: Path) -> list[str]:
    """Two exported adapters that differ from the base and from each other."""
    folders = []
    for number in (1, 2):
        network, tokenizer = tiny_backbone("qwen3", lora=Lora(r=2)).load()
        for name, parameter in network.named_parameters():
            if "lora_B" in name:
                nn.init.constant_(parameter, number / 100)
        folder = tmp_path / f"run{number}" / "final"
        network.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        folders.append(str(folder))
    return folders


def test_a_wrong_model_adapter_or_dtype_is_refused_by_name(
    tiny_backbone: Make,
    model: LoadedModel,
    adapters: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "kept.safetensors"
    trained, other = (LoadedModel(tiny_backbone("qwen3", adapter=adapter)) for adapter in adapters)
    ContextCache.prefill(trained, DOCUMENT, KnormPress(0.5)).save(path)
    ContextCache.load(path, LoadedModel(tiny_backbone("qwen3", adapter=adapters[0])))
    halved = LoadedModel(tiny_backbone("qwen3", adapter=adapters[0], dtype="bfloat16"))
    for wrong, message in [
        (LoadedModel(tiny_backbone("llama", lora=None)), "by the model 'qwen30' .* this is 'llama0'"),
        (model, "with the adapter 'run1/final' .* this model runs without an adapter"),
        (other, "with the adapter 'run1/final' .* this model runs with the adapter 'run2/final'"),
        (halved, "with dtype=float32, .* dtype=bfloat16"),
    ]:
        with pytest.raises(ValueError, match=f"^{path} was made {message}[^\n]+$"):
            ContextCache.load(path, wrong)
    monkeypatch.setattr(Backbone, "load", lambda *_, **__: pytest.fail("it was loaded first"))
    for settings, message in [({}, "this model runs without an adapter"), ({"adapter": adapters[1]}, "'run2/final'")]:
        with pytest.raises(ValueError, match=message):
            ContextCache.load(path, tiny_backbone("qwen3", dtype="auto", **settings))


def test_a_press_of_your_own_is_given_to_append(model: LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "kept.safetensors"
    cache = ContextCache.prefill(model, DOCUMENT, OwnPress(0.5))
    cache.save(path)
    loaded = ContextCache.load(path, model)
    assert loaded.ask(QUESTIONS, max_new_tokens=NEW) == cache.ask(QUESTIONS, max_new_tokens=NEW)
    with pytest.raises(ValueError, match=r"OwnPress\(compression_ratio=0.5\) cannot be made .* load with press="):
        loaded.append(MORE)
    loaded.save(path)
    assert bits(ContextCache.load(path, model, OwnPress(0.5)).append(MORE)) == bits(cache.append(MORE))
    with pytest.raises(ValueError, match=r"evicted by OwnPress\(.*0\.5\), not by OwnPress\(.*0\.6\)"):
        ContextCache.load(path, model, OwnPress(0.6))


def _rewritten(path: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> None:
    with safe_open(path, framework="pt") as file:
        about, tensors = json.loads(file.metadata()["sparsekv_pl"]), {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
    change(tensors, about)
    save_file(tensors, path, metadata={"sparsekv_pl": json.dumps(about)})


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-50]), "is damaged"),
        (lambda path: path.write_bytes(b"text"), "is damaged"),
        (lambda path: _rewritten(path, lambda tensors, _: tensors["keys.0"].add_(1)), "its checksum is another"),
        (lambda path: _rewritten(path, lambda _, about: about.update(tokens_sha256="0")), "its tokens are not those"),
        (lambda path: _rewritten(path, lambda _, about: about.pop("bounds")), "is damaged"),
        (lambda path: _rewritten(path, lambda _, about: about.update(bounds=[])), "is damaged"),
        (lambda path: _rewritten(path, lambda _, about: about.update(eviction=5)), "is damaged"),
        (lambda path: _rewritten(path, lambda _, about: about.update(next_position="x")), "is damaged"),
        (lambda path: _rewritten(path, lambda _, about: about.update(format=2)), "has the format 2"),
        (lambda path: save_file({"a": torch.zeros(1)}, path), "holds no cache"),
        (lambda path: path.unlink(), "there is no such file"),
    ],
    ids=["cut", "text", "bits", "tokens", "metadata", "bounds", "eviction", "position", "format", "foreign", "missing"],
)
def test_a_damaged_or_foreign_file_is_one_line(
    model: LoadedModel,
    damage: Callable[[Path], Any],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "kept.safetensors"
    ContextCache.prefill(model, DOCUMENT, KnormPress(0.5)).save(path)
    damage(path)
    monkeypatch.setattr(Backbone, "load", lambda *_, **__: pytest.fail("the model was loaded first"))
    for given in (model, model.backbone):
        with pytest.raises(ValueError, match=f"^{path}[^\n]*{message}[^\n]*$"):
            ContextCache.load(path, given)


def test_a_name_that_says_nothing_is_refused(model: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a cache is a .safetensors file: give kept.txt.safetensors"):
        ContextCache.prefill(model, MORE, KeyRerotationPress(KnormPress(0.5))).save(tmp_path / "kept.txt")
    assert not list(tmp_path.iterdir())
