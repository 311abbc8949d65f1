"""Averages of adapters: their weighted sum, with the trainings of all in the card."""

import json
from collections.abc import Callable
from pathlib import Path

import kvpress
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from callbacks.adapter_average import average_adapters
from callbacks.adapter_copy import copy_adapter
from sparsekv_pl.evaluation.trained_adapter import seen_in_training
from sparsekv_pl.models.backbone import Backbone
from sparsekv_pl.models.base_model import base_record, base_reference
from sparsekv_pl.models.training_summary import training_summary
from sparsekv_pl.presses.nesting import press_name


@pytest.fixture
def exports(tiny_backbone: Callable[..., Backbone], tiny_adapter: Callable[..., str], tmp_path: Path) -> list[Path]:
    """Two exports with different weights; each trained with another press, the second after a third."""
    base = {**base_record(tiny_backbone()), "splits": {"train": 1}}
    trained = [{"presses": ["Knorm"], "steps": 3}, {"presses": ["TOVA"], "continued_from": {"presses": ["SnapKV"]}}]
    folders = [tmp_path / "first", tmp_path / "second"]
    for std, folder, training in zip((0.3, 0.5), folders, trained, strict=True):
        tiny_adapter(std, folder, base | training)
        config = json.loads((folder / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = base_reference(tiny_backbone())
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folders


def changes(folder: Path) -> dict[str, Tensor]:
    """What the adapter adds to each weight of the base."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    scale = config["lora_alpha"] / config["r"]
    down = {name: tensor for name, tensor in tensors.items() if "lora_A" in name}
    assert down
    return {
        name: scale * tensors[name.replace("lora_A", "lora_B")].double() @ tensor.double()
        for name, tensor in down.items()
    }


def test_an_average_is_the_weighted_sum_cut_to_the_rank(
    exports: list[Path], tiny_models: dict[str, str], tiny_backbone: Callable[..., Backbone], tmp_path: Path
) -> None:
    target = average_adapters(exports, [0.75, 0.25], tmp_path / "average", pretrained=tiny_models["llama"])
    first, second, made = (changes(folder) for folder in (*exports, target))
    rank = json.loads((exports[0] / "adapter_config.json").read_text())["r"]
    assert first.keys() == made.keys()
    for name, change in made.items():
        u, s, v = torch.linalg.svd(0.75 * first[name] + 0.25 * second[name], full_matrices=False)
        torch.testing.assert_close(change, (u[:, :rank] * s[:rank]) @ v[:rank], rtol=1e-4, atol=1e-5)
    assert tiny_backbone(adapter=str(target)).load(trainable=False)


def test_one_adapter_is_scaled_down(exports: list[Path], tiny_models: dict[str, str], tmp_path: Path) -> None:
    target = average_adapters(exports[:1], [0.5], tmp_path / "half", pretrained=tiny_models["llama"])
    for name, change in changes(target).items():
        torch.testing.assert_close(change, 0.5 * changes(exports[0])[name], rtol=1e-4, atol=1e-5)


def test_the_card_and_the_copy_know_the_trainings_of_all(
    exports: list[Path], tiny_models: dict[str, str], tmp_path: Path
) -> None:
    average_adapters(exports, [0.75, 0.25], tmp_path / "average", pretrained=tiny_models["llama"])
    copied = copy_adapter(tmp_path / "average", tmp_path / "copy")
    summary, card = training_summary(copied), (copied / "README.md").read_text()
    assert summary["presses"] == ["Knorm", "TOVA", "SnapKV"]
    assert "| an average of | 2 adapters, below |" in card
    assert card.index("## Averaged with weight 0.75") < card.index("## Averaged with weight 0.25")
    assert card.index("## Averaged with weight 0.25") < card.index("## The training that it continues")
    assert "\n## Training\n" in card and "python -m callbacks.adapter_average" in card
    for name in ("SnapKV", "TOVA", "Knorm", "KeyDiff"):
        press = getattr(kvpress, f"{name}Press")()
        assert seen_in_training(press, summary) is (press_name(press) != "KeyDiff")


def test_what_cannot_be_averaged_is_named(exports: list[Path], tmp_path: Path) -> None:
    target = tmp_path / "average"
    for weights in ([1.0], [0.5, 0.0], []):
        with pytest.raises(ValueError, match=r"for 2 sources: give one above 0 for each"):
            average_adapters(exports, weights, target)
    other = training_summary(exports[1]) | {"splits": {"train": 0.5}}
    (exports[1] / "training.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match=r"second has splits=.* and .*first .*: only adapters of one base"):
        average_adapters(exports, [0.5, 0.5], target)
    (exports[1] / "training.json").unlink()
    with pytest.raises(ValueError, match=r"second has no training.json: give folders that training runs exported"):
        average_adapters(exports, [0.5, 0.5], target)
    assert not target.exists()
