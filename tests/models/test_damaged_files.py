"""Adapters and models whose files are missing, cut, of another model or full of NaN: one line that names the folder."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsekv_pl.models.backbone import Backbone
from sparsekv_pl.models.lora import Lora
from sparsekv_pl.models.training_summary import training_summary

WEIGHTS = "adapter_model.safetensors"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def fill(path: Path, value: float) -> None:
    tensors = load_file(path)
    name = sorted(tensors)[-1]
    save_file(tensors | {name: torch.full_like(tensors[name], value)}, path)


def reshape(path: Path) -> None:
    save_file({name: tensor[:, :3].contiguous() for name, tensor in load_file(path).items()}, path)


def configure(path: Path, **settings: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


ADAPTERS: dict[str, Callable[[Path], Any]] = {
    "no weights": lambda folder: (folder / WEIGHTS).unlink(),
    "weights are a folder": lambda folder: ((folder / WEIGHTS).unlink(), (folder / WEIGHTS).mkdir()),
    "cut": lambda folder: cut(folder / WEIGHTS),
    "empty": lambda folder: (folder / WEIGHTS).write_bytes(b""),
    "NaN": lambda folder: fill(folder / WEIGHTS, float("nan")),
    "infinite": lambda folder: fill(folder / WEIGHTS, float("inf")),
    "other shapes": lambda folder: reshape(folder / WEIGHTS),
    "no JSON": lambda folder: (folder / "adapter_config.json").write_text("{"),
    "deep JSON": lambda folder: (folder / "adapter_config.json").write_text("[" * 100_000),
    "no mapping": lambda folder: (folder / "adapter_config.json").write_text("[1]"),
    "no kind": lambda folder: configure(folder / "adapter_config.json", peft_type="WITCHCRAFT"),
    "bad rank": lambda folder: configure(folder / "adapter_config.json", r="many"),
    "no rank": lambda folder: configure(folder / "adapter_config.json", r=0),
    "other layers": lambda folder: configure(folder / "adapter_config.json", target_modules=["nowhere"]),
}


NEED_THE_MODEL = ("other shapes", "bad rank", "no rank", "other layers")


@pytest.mark.parametrize("damage", ADAPTERS)
def test_a_damaged_adapter_is_named(
    damage: str,
    tiny_adapter: Callable[..., str],
    tiny_backbone: Callable[..., Backbone],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "it"
    tiny_adapter(0, folder)
    ADAPTERS[damage](folder)
    if damage not in NEED_THE_MODEL:
        monkeypatch.setattr(Backbone, "_model", lambda *_: pytest.fail("the weights were read"))
    with pytest.raises(ValueError, match=rf"^(adapter='{folder}'|{folder}/adapter_config.json) ") as refused:
        tiny_backbone(adapter=str(folder)).load()
    assert len(str(refused.value)) < 600 and "\n" not in str(refused.value)


@pytest.mark.parametrize("content", ["{", "[1]", "[" * 100_000, ""])
def test_a_damaged_summary_of_a_training_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "training.json").write_text(content)
    with pytest.raises(ValueError, match=rf"^{tmp_path}/training.json "):
        training_summary(str(tmp_path))


@pytest.mark.parametrize("targets", [[], [""], ["layers"], ["nowhere"], ["model"], ["q_proj", "act_fn"]])
def test_targets_that_cannot_be_adapted_are_named(targets: Any, tiny_backbone: Callable[..., Backbone]) -> None:
    with pytest.raises(ValueError, match=r"^lora\.targets[ =]\[") as refused:
        tiny_backbone(lora=Lora(targets=targets)).load()
    assert "\n" not in str(refused.value)


MODELS: dict[str, Callable[[Path], Any]] = {
    "cut": lambda folder: cut(folder / "model.safetensors"),
    "empty": lambda folder: (folder / "model.safetensors").write_bytes(b""),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "other sizes": lambda folder: configure(folder / "config.json", intermediate_size=40),
    "a word for a number": lambda folder: configure(folder / "config.json", hidden_size="large"),
    "no heads": lambda folder: configure(folder / "config.json", num_attention_heads=0),
    "unknown activation": lambda folder: configure(folder / "config.json", hidden_act="magic"),
    "no JSON": lambda folder: (folder / "config.json").write_text("{"),
    "no mapping": lambda folder: (folder / "config.json").write_text("[]"),
    "tokenizer": lambda folder: (folder / "tokenizer.json").write_text("{}"),
    "tokenizer config": lambda folder: (folder / "tokenizer_config.json").write_text("[1]"),
}


@pytest.mark.parametrize("damage", MODELS)
def test_a_damaged_model_is_named(damage: str, tiny_models: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "it"
    shutil.copytree(tiny_models["llama"], folder)
    MODELS[damage](folder)
    with pytest.raises(ValueError, match=rf"pretrained='{folder}'"):
        Backbone(pretrained=str(folder), dtype="float32", lora=None).load()
