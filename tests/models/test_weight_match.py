"""Weights that do not belong to the model, and adapters that would change nothing, are refused by name."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsekv_pl.models.backbone import Backbone, causal_lm
from sparsekv_pl.models.base_model import base_reference
from sparsekv_pl.models.lora import Lora
from tests.models.backbone_cases import edit_config

MakeBackbone = Callable[..., Backbone]
PROJECTIONS = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture
def export(tiny_backbone: MakeBackbone, tmp_path: Path) -> Callable[..., str]:
    """Writes a peft adapter of the tiny Llama, with values that change its outputs."""

    def write(config: Any) -> str:
        model = peft.get_peft_model(tiny_backbone().load(trainable=False)[0], config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.fill_(0.1)
        model.save_pretrained(tmp_path / "adapter")
        return str(tmp_path / "adapter")

    return write


def edit_tensors(file: Path, edit: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    save_file(edit(load_file(file)), file, metadata={"format": "pt"})


def without_layer_1(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor for name, tensor in tensors.items() if ".layers.1." not in name}


def elsewhere(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("model.layers", "decoder.blocks"): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (without_layer_1, r"model\.layers\.1\.\S+, .* and \d+ more missing, none unused"),
        (elsewhere, r"model\.layers\.0\.\S+, .* missing, decoder\.blocks\.0\.\S+, .* and \d+ more unused"),
        (lambda tensors: tensors | {"model.layers.2.x": torch.ones(1)}, r"none missing, model\.layers\.2\.x unused"),
    ],
)
def test_a_base_with_missing_or_unused_tensors_is_refused(
    edit: Any, message: str, tiny_models: dict[str, str], tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_models["llama"], tmp_path / "model")
    edit_tensors(folder / "model.safetensors", edit)
    with pytest.raises(ValueError, match=message):
        Backbone(pretrained=str(folder), dtype="float32").load(trainable=False)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (without_layer_1, r"layers\.1\.self_attn\S+lora_A\S+, .* missing in it, none without a place"),
        (elsewhere, r"missing in it, base_model\.model\.decoder\.blocks\S+lora_A\S+, .* without a place"),
    ],
)
def test_an_adapter_whose_names_do_not_match_is_refused(
    edit: Any, message: str, export: Callable[..., str], tiny_backbone: MakeBackbone
) -> None:
    adapter = export(peft.LoraConfig(**PROJECTIONS))
    edit_tensors(Path(adapter) / "adapter_model.safetensors", edit)
    with pytest.raises(ValueError, match=message):
        tiny_backbone(adapter=adapter).load(trainable=False)


@pytest.mark.parametrize(
    "config",
    [
        peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_prompt_tuning_does_nothing_here_and_is_refused(
    config: Any, export: Callable[..., str], tiny_backbone: MakeBackbone
) -> None:
    with pytest.raises(ValueError, match=f"{config.peft_type.value}, which puts tokens before the prompt"):
        tiny_backbone(adapter=export(config)).load(trainable=False)


@pytest.mark.parametrize("targets", [["lm_head"], ["q_proj", "lm_head"]])
def test_a_low_rank_head_is_never_computed_through(
    targets: list[str], export: Callable[..., str], tiny_backbone: MakeBackbone
) -> None:
    adapter = export(peft.LoraConfig(target_modules=targets, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match=r"adapts the head \(lm_head\), which is never computed through"):
        tiny_backbone(adapter=adapter).load(trainable=False)
    with pytest.raises(ValueError, match=r"lora\.targets=.*lm_head.*never computed through"):
        tiny_backbone(lora=Lora(r=4, targets=tuple(targets))).load()


def test_an_adapter_of_another_base_is_refused(
    export: Callable[..., str], tiny_models: dict[str, str], tmp_path: Path
) -> None:
    adapter = Path(export(peft.LoraConfig(**PROJECTIONS)))
    other = shutil.copytree(tiny_models["llama"], tmp_path / "other")
    edit_tensors(other / "model.safetensors", lambda tensors: {name: value + 1 for name, value in tensors.items()})
    same = shutil.copytree(tiny_models["llama"], tmp_path / "same")
    edit_config(same, note="a copy of the weights under another path, with another config")
    Backbone(pretrained=str(same), dtype="float32", adapter=str(adapter)).load(trainable=False)
    said = re.escape(f"was trained on '{tiny_models['llama']}', and pretrained='{other}' has other weights")
    with pytest.raises(ValueError, match=said):
        Backbone(pretrained=str(other), dtype="float32", adapter=str(adapter)).load(trainable=False)
    # The training run's record is enough; the base's files are not needed.
    from sparsekv_pl.storage.fingerprint import weights_digest

    summary = {"base": "a/name", "base_weights": weights_digest(Path(tiny_models["llama"]))}
    (adapter / "training.json").write_text(json.dumps(summary))
    settings = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": "gone/away"}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    Backbone(pretrained=str(same), dtype="float32", adapter=str(adapter)).load(trainable=False)
    with pytest.raises(ValueError, match="was trained on 'a/name'"):
        Backbone(pretrained=str(other), dtype="float32", adapter=str(adapter)).load(trainable=False)


def test_the_fingerprint_in_the_base_s_name_is_enough(
    export: Callable[..., str], tiny_models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = Path(export(peft.LoraConfig(**PROJECTIONS)))
    reference = base_reference(Backbone(pretrained=tiny_models["llama"]))
    settings = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": reference}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    moved = shutil.copytree(tiny_models["llama"], tmp_path / "moved")
    Backbone(pretrained=str(moved), dtype="float32", adapter=str(adapter)).load(trainable=False)
    monkeypatch.setattr(Backbone, "_model", lambda *_: pytest.fail("the weights were read"))
    edit_tensors(moved / "model.safetensors", lambda tensors: {name: value + 1 for name, value in tensors.items()})
    with pytest.raises(ValueError, match=f"was trained on '{reference}', and pretrained='{moved}' has other weights"):
        Backbone(pretrained=str(moved), dtype="float32", adapter=str(adapter)).load(trainable=False)


def test_an_adapter_of_another_hub_model_is_refused_by_name(tmp_path: Path) -> None:
    from sparsekv_pl.models.weight_match import check_base

    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "Qwen/Qwen3-8B"}')
    check_base(str(tmp_path), "Qwen/Qwen3-8B", Path("Qwen/Qwen3-8B"), Path)
    with pytest.raises(ValueError, match="trained on 'Qwen/Qwen3-8B', and pretrained='Qwen/Qwen3-4B'"):
        check_base(str(tmp_path), "Qwen/Qwen3-4B", Path("Qwen/Qwen3-4B"), Path)


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(**PROJECTIONS),
        peft.LoraConfig(**PROJECTIONS, modules_to_save=["norm"]),
        peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
        peft.LoHaConfig(target_modules=["q_proj"]),
    ],
    ids=["lora", "saved", "ia3", "loha"],
)
def test_what_does_change_layers_loads_with_its_values(
    config: Any, export: Callable[..., str], tiny_backbone: MakeBackbone
) -> None:
    adapter = export(config)
    model = tiny_backbone(adapter=adapter).load(trainable=False)[0]
    reference = peft.PeftModel.from_pretrained(tiny_backbone().load(trainable=False)[0], adapter)
    for name, value in reference.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    assert model.peft_config["default"].base_model_name_or_path == tiny_backbone().pretrained  # type: ignore[operator, union-attr, index]
    assert not model.training and not causal_lm(model).training


def test_gates_of_another_base_are_refused(tiny_models: dict[str, str], tmp_path: Path) -> None:
    from sparsekv_pl.models.weight_match import check_gates
    from sparsekv_pl.storage.fingerprint import weights_digest

    check_gates(tmp_path, "a/model", Path)  # nothing is known of them
    summary = {"base": "a/name", "base_weights": weights_digest(Path(tiny_models["llama"]))}
    (tmp_path / "training.json").write_text(json.dumps(summary))
    check_gates(tmp_path, "a/model", lambda: Path(tiny_models["llama"]))
    with pytest.raises(ValueError, match="were trained on 'a/name', and pretrained='a/model' has other weights"):
        check_gates(tmp_path, "a/model", lambda: Path(tiny_models["qwen3"]))
