"""QLoRA on the CPU: NF4 with double quantisation, against a model that holds the same weights unpacked."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from kvpress import SnapKVPress
from torch import Tensor

from callbacks.adapter_export import AdapterExport
from callbacks.curriculum import Curriculum
from sparsekv_pl.eviction.real import RealEviction
from sparsekv_pl.models.backbone import causal_lm
from sparsekv_pl.models.native_precision import decide
from sparsekv_pl.schedules import Fixed
from sparsekv_pl.training.eit_module import EITModule
from tests.tiny_training import MakeBackbone, MakeData, MakeTrainer, adamw, mixed, trained
from train import TrainCommandLine

CONFIGS = Path(__file__).parents[2] / "configs"


def training(backbone: Any) -> EITModule:
    torch.manual_seed(0)
    return EITModule(backbone, RealEviction(SnapKVPress(window_size=8)), mixed(), optimizer=adamw)


def unpacked(quantised: Any) -> dict[str, Tensor]:
    """Return the unpacked 4-bit weights by layer name."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    found = {}
    for name, module in quantised.named_modules():
        if isinstance(module, Linear4bit):
            layer: Any = module
            state = layer.weight.quant_state
            assert (state.quant_type, state.nested) == ("nf4", True)
            found[name] = dequantize_4bit(layer.weight.data, state)
    return found


def gradients(made: EITModule, batch: Any) -> dict[str, Tensor]:
    made.train()
    made.zero_grad()
    made.loss_terms(batch, compression_ratio=0.5, step=0)[0]["loss"].backward()
    return {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}


def test_four_bits_give_the_gradients_of_their_numbers(tiny_backbone: MakeBackbone) -> None:
    """Also after an evaluation, in which bitsandbytes would repack its weights."""
    quantised, full = training(tiny_backbone(load_in_4bit=True)), training(tiny_backbone())
    numbers = unpacked(quantised.model)
    assert len(numbers) == 2 * 7
    for name, weight in numbers.items():
        full.model.get_parameter(f"{name}.weight").data.copy_(weight)
    full.load_state_dict(trained(quantised), strict=False)
    generator = torch.Generator().manual_seed(1)
    for name, p in quantised.named_parameters():
        if "lora_B" in name:  # 0 at the start, which hides the gradient of A
            p.data.normal_(std=0.1, generator=generator)
            full.get_parameter(name).data.copy_(p.data)
    ids = torch.randint(2, 1024, (2, 64), generator=generator)
    batch = {"context_ids": ids[:, :48], "continuation_ids": ids[:, 48:], "labels": ids[:, 48:]}
    quantised.eval()
    with torch.no_grad():
        causal_lm(quantised.model)(ids)
    found, expected = gradients(quantised, batch), gradients(full, batch)
    assert set(found) == set(expected)
    assert all("lora" in name for name in found)
    for name, gradient in expected.items():
        assert gradient.norm() > 0
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))


@pytest.mark.parametrize(("precision", "dtype"), [("32-true", "float32"), ("bf16-mixed", "bfloat16")])
def test_it_trains_after_the_sanity_check_and_its_adapter_fits_a_full_model(
    precision: str,
    dtype: str,
    tiny_backbone: MakeBackbone,
    tiny_data: MakeData,
    tiny_trainer: MakeTrainer,
    tmp_path: Path,
) -> None:
    made = training(tiny_backbone(load_in_4bit=True, dtype=dtype))
    before, packed = trained(made), {k: v.clone() for k, v in unpacked(made.model).items()}
    callbacks = Curriculum(Fixed(0.5)), AdapterExport(str(tmp_path))
    trainer = tiny_trainer(*callbacks, max_steps=3, limit_val_batches=1, num_sanity_val_steps=1, precision=precision)
    trainer.fit(made, tiny_data())
    assert trainer.callback_metrics["train/loss"].isfinite()
    assert all(not torch.equal(value, before[name]) for name, value in trained(made).items())
    assert all(torch.equal(value, packed[name]) for name, value in unpacked(made.model).items())
    loaded, _ = tiny_backbone(adapter=str(tmp_path / "final")).load()
    assert not getattr(loaded, "is_loaded_in_4bit", False)
    adapter = {name.removeprefix("model."): value for name, value in trained(made).items()}
    assert all(torch.equal(loaded.get_parameter(name), value) for name, value in adapter.items())


def test_four_bits_are_not_sharded(tiny_backbone: MakeBackbone) -> None:
    with pytest.raises(ValueError, match=r"sharded=true does not go with load_in_4bit=true: .*DDP"):
        tiny_backbone(load_in_4bit=True, sharded=True).load()


def test_the_overlay_makes_a_training_config_qlora(
    tiny_models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py"])
    overlay = CONFIGS / "train" / "qlora.yaml"
    assert set(yaml.safe_load(overlay.read_text())) == {"model"}
    configs = (CONFIGS / "train" / "eit_qwen3_8b.yaml", CONFIGS / "train" / "small.yaml", overlay)
    args = [word for path in configs for word in ("--config", str(path))]
    args += [f"--model.backbone.pretrained={tiny_models['llama']}", "--trainer.accelerator=cpu"]
    made = TrainCommandLine(args=args, run=False, save_config_callback=None)
    assert len(unpacked(made.model.model)) == 2 * 7
    assert made.trainer.precision == decide(accelerator="cpu").precision
    assert all("lora" in name and value.dtype == torch.float32 for name, value in trained(made.model).items())
