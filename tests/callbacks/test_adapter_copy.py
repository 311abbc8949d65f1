"""Adapters for publication: small, loadable, with a card; and those in the repository."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from callbacks.adapter_copy import MOST_BYTES, copy_adapter
from sparsekv_pl.models.backbone import Backbone
from sparsekv_pl.models.base_model import base_record, base_reference
from sparsekv_pl.reporting.model_card import BEGIN, END

ROOT = Path(__file__).parents[2]
FILES = {"adapter_config.json", "adapter_model.safetensors", "training.json", "README.md"}


@pytest.fixture
def final(tiny_backbone: Callable[..., Backbone], tmp_path: Path) -> Path:
    """An export with weights that change the model."""
    backbone, folder = tiny_backbone(), tmp_path / "final"
    model, tokenizer = backbone.load()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "training.json").write_text(json.dumps({**base_record(backbone), "steps": 3}))
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = base_reference(backbone)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def check(folder: Path) -> None:
    """A folder that can be published."""
    assert {path.name for path in folder.iterdir()} == FILES
    assert sum(path.stat().st_size for path in folder.iterdir()) <= MOST_BYTES
    dtypes = {tensor.dtype for tensor in load_file(folder / "adapter_model.safetensors").values()}
    assert dtypes <= {torch.bfloat16, torch.float16} and len(dtypes) == 1
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base and not base.startswith(("/", "~"))
    card = (folder / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["library_name"] == "peft" and header["license"]
    assert card.count(BEGIN) == card.count(END) == 1 and "More Information Needed" not in card
    for name in ("README.md", "training.json"):
        assert not re.search(r"(?<![\w.:/])/(home|root|tmp|Users)/", (folder / name).read_text())


def test_a_copy_is_small_and_computes_the_same_but_for_rounding(
    final: Path, tiny_backbone: Callable[..., Backbone], tmp_path: Path
) -> None:
    copied = copy_adapter(final, tmp_path / "adapters" / "tiny")
    check(copied)
    assert "| the adapter's weights on disk | bfloat16 |" in (copied / "README.md").read_text()
    given, rounded = (tiny_backbone(adapter=str(folder)).load(trainable=False)[0] for folder in (final, copied))
    adapted = {name: value for name, value in rounded.state_dict().items() if "lora_" in name}
    assert adapted
    for name, value in adapted.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, given.state_dict()[name], rtol=2**-8, atol=0)


def test_what_cannot_be_published_leaves_nothing(final: Path, tmp_path: Path) -> None:
    target = tmp_path / "out" / "copy"
    with pytest.raises(ValueError, match=r"takes [\d,]+ bytes, more than most_bytes=2,000"):
        copy_adapter(final, target, most_bytes=2_000)
    with pytest.raises(ValueError, match=r"has no adapter_config.json: give a folder that a training run exported"):
        copy_adapter(tmp_path, target)
    weights = load_file(final / "adapter_model.safetensors")
    name = next(iter(weights))
    save_file(weights | {name: weights[name] + 1e6}, final / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=rf"{name} has numbers too large for dtype=float16: use bfloat16"):
        copy_adapter(final, target, "float16")
    config = json.loads((final / "adapter_config.json").read_text()) | {"base_model_name_or_path": "/home/me/base"}
    (final / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="names its base by a folder of the machine that trained"):
        copy_adapter(final, target)
    assert not target.exists() and not list(tmp_path.glob("out/.*"))


def test_adapters_of_the_repository_can_be_published() -> None:
    for folder in sorted((ROOT / "adapters").glob("*")):
        check(folder)
