"""The planner's estimate of weights, its plans for Llama 4 Scout, and its warnings."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Llama4ForCausalLM,
    LlamaConfig,
)

from sparsekv_pl.models import memory_planner as planner
from sparsekv_pl.models import native_precision
from sparsekv_pl.models.backbone import EMBEDDED
from sparsekv_pl.models.duration import duration
from sparsekv_pl.models.memory_planner import GIB, gib, plan
from sparsekv_pl.models.native_precision import Machine
from sparsekv_pl.models.quantisation import keep_unpacked, weight_bytes
from tests.models.planner_cases import loaded_bytes, random_ids, scout, tiny_llama4
from tests.tiny_training import MakeBackbone


@pytest.fixture(autouse=True)
def bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make all plans for a machine with native bfloat16."""
    machine = Machine("cuda", "NVIDIA A100", (8, 0))
    monkeypatch.setattr(native_precision, "probe", lambda *_, **__: machine)


# --- the weights ---


@pytest.mark.parametrize(("kind", "dtype"), [("llama", "float32"), ("qwen3", "bfloat16")])
def test_weight_bytes_are_what_a_load_takes(kind: str, dtype: Any, tiny_backbone: MakeBackbone) -> None:
    """The tiny Llama ties its embeddings, the tiny Qwen3 does not."""
    backbone = tiny_backbone(kind, dtype=dtype, lora=None)
    model, planned = backbone.load()[0], plan(backbone.pretrained, 10, dtype=dtype)
    assert planned.weight_bytes == loaded_bytes(model)
    assert planned.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_four_bit_weight_bytes_are_what_a_load_takes(kind: str, tiny_backbone: MakeBackbone) -> None:
    backbone = tiny_backbone(kind, dtype="bfloat16", lora=None, load_in_4bit=True)
    model = backbone.load(trainable=False)[0]
    planned = plan(backbone.pretrained, 10, load_in_4bit=True)
    plain = plan(backbone.pretrained, 10)
    assert planned.weight_bytes == loaded_bytes(model) < plain.weight_bytes
    assert planned.parameters == plain.parameters


@pytest.mark.parametrize("shape", [(512, 640), (100, 7)])
def test_scales_of_scales_are_counted(shape: tuple[int, int]) -> None:
    """Large layers have more than one block of 256 scales; small ones a part of a block."""
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(*shape, bias=True, quant_type="nf4", compress_statistics=True)
    expected = weight_bytes(layer)
    assert loaded_bytes(layer.to("cpu")) == expected


def test_fused_experts_stay_as_they_are_and_routers_still_route(tmp_path: Path) -> None:
    """bitsandbytes would replace Llama 4's router, which returns two values, by a plain linear layer."""
    torch.manual_seed(0)
    full = Llama4ForCausalLM(tiny_llama4()).bfloat16()
    full.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    settings = planner.four_bit(config, torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, quantization_config=settings)
    keep_unpacked(model)
    planned = plan(str(tmp_path), 10, load_in_4bit=True)
    assert planned.weight_bytes == loaded_bytes(model)
    assert planned.parameters == sum(p.numel() for p in full.parameters())
    assert model.lm_head.weight.dtype == torch.bfloat16
    experts = sum(p.numel() * 2 for p in full.parameters() if p.ndim == 3)
    assert any(f"{gib(experts)} of experts are fused" in warning for warning in planned.warnings)
    with torch.no_grad():
        logits = [m(random_ids(1, 20)).logits.flatten().float() for m in (full, model)]
    assert torch.nn.functional.cosine_similarity(*logits, dim=0) > 0.9


def test_llama_4_scout_at_ten_million_tokens() -> None:
    planned = plan(scout(), 10_000_000)
    assert planned.parameters == 107_769_861_120  # 109 B with the vision tower, which a causal LM leaves out
    assert planned.weight_bytes == pytest.approx(2 * 107.77e9, rel=1e-4)
    assert planned.kv_bytes_per_token == 48 * 2 * 8 * 128 * 2 == 196_608
    assert planned.kv_bytes_full == pytest.approx(12 / 48 * 1_966_080_000_000, rel=0.01)  # 12 layers look at all
    assert not any("positions" in warning for warning in planned.warnings)
    assert any("beyond the 10,485,760" in warning for warning in plan(scout(), 11_000_000).warnings)


def test_llama_4_scout_with_a_budget_stays_flat() -> None:
    settings: dict[str, Any] = {
        "budget": 4096,
        "chunk_tokens": 4096,
        "tokens_per_second": 2000,
        "memory_limit": "80GiB",
    }
    million, ten = (plan(scout(), tokens, **settings) for tokens in (1_000_000, 10_000_000))
    for planned, own in ((million, 1_000_000 % 8192), (ten, 10_000_000 % 8192)):  # the chunk of the last token
        assert planned.kv_bytes_kept == (12 * 4096 + 36 * own) * 196_608 // 48
    assert ten.total_bytes == pytest.approx(million.total_bytes, rel=0.001)
    assert ten.prefill_seconds == 5000
    assert not any("look" in warning for warning in ten.warnings)
    assert any("the weights alone (201 GiB) exceed 80.0 GiB (given)" in warning for warning in ten.warnings)


def test_llama_4_scout_in_four_bits() -> None:
    """From the published bfloat16 weights experts stay as they are; a checkpoint stored in 4 bits holds them apart."""
    config, stored = scout(layers=2), scout(layers=2)
    stored.quantization_config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=["lm_head", "router"],
    ).to_dict()
    converted, prequantised = plan(config, 1000, load_in_4bit=True), plan(stored, 1000)
    experts = 2 * 16 * 3 * 5120 * 8192
    assert converted.weight_bytes > 2 * experts
    assert converted.weight_bytes - prequantised.weight_bytes == pytest.approx((2 - 0.516) * experts, rel=0.001)
    assert prequantised.parameters == converted.parameters
    assert any("experts are fused" in warning for warning in converted.warnings)
    assert prequantised.warnings == [w for w in prequantised.warnings if "weights alone" in w or "are needed" in w]
    assert "weights as the checkpoint stores them" in prequantised.lines()[-1 - len(prequantised.warnings)]


# --- what it says ---


def test_the_embedded_models_plan_is_readable() -> None:
    planned = plan(
        EMBEDDED,
        1_000_000,
        budget=1024,
        chunk_tokens=1024,
        tokens_per_second=900,
        decode_tokens_per_second=10,
        new_tokens=64,
        memory_limit="8GiB",
    )
    text = "\n".join(planned.lines())
    for part in (
        "0.13 B parameters, a context of 1,000,000 tokens in bfloat16",
        "weights 0.251 GiB",
        "KV cache without eviction 21.5 GiB, 22.5 KiB a token",
        "KV cache after eviction 0.0220 GiB (0.10% of it)",
        "prefill 19 min",
        "decoding 6.4 s",
        "WARNING: 1,000,000 positions are beyond the 8,192 that the model",
    ):
        assert part in text
    assert len(planned.warnings) == 1


@pytest.mark.parametrize(
    ("settings", "warning"),
    [
        ({"memory_limit": "1GiB"}, r"about 5\.\d+ GiB are needed, 1\.00 GiB are there"),
        ({"memory_limit": 1000}, r"the weights alone \(0.251 GiB\) exceed"),
        ({"memory_limit": "1000GB"}, None),
    ],
)
def test_it_warns_where_memory_is_short(settings: dict[str, Any], warning: str | None) -> None:
    planned = plan(EMBEDDED, 8000, batch=10, **settings)
    assert len(planned.warnings) == (warning is not None)
    if warning is not None:
        assert re.search(warning, planned.warnings[0])


def test_memory_is_looked_for_where_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    found = plan(EMBEDDED, 100)
    assert "RAM available" in found.memory
    assert found.memory_limit > GIB // 10
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (10 + index, 100))
    found = plan(EMBEDDED, 100)
    assert (found.memory_limit, found.memory) == (21, "free on 2 GPU(s)")


def test_a_quantised_checkpoint_of_another_kind_is_said_not_to_be_counted() -> None:
    config = LlamaConfig(num_hidden_layers=1, hidden_size=64, num_attention_heads=4, vocab_size=100)
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    assert any("quantised with gptq, which is not counted" in warning for warning in plan(config, 10).warnings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens": 0}, "tokens=0"),
        ({"compression_ratio": 1.0}, r"compression_ratio is 1\.0"),
        ({"compression_ratio": -0.1}, r"compression_ratio is -0\.1"),
        ({"budget": 0}, "budget=0"),
        ({"chunk_tokens": 0}, "chunk_tokens=0"),
        ({"batch": 0}, "batch=0"),
        ({"tokens_per_second": 0.0}, "tokens per second must be above 0"),
        ({"memory_limit": "lots"}, "memory_limit='lots' is no size"),
        ({"pretrained": "/no/such/folder"}, "there is no such folder"),
        ({"pretrained": "nobody/no-such-model"}, "config of pretrained='nobody/no-such-model' could not be read"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], message: str) -> None:
    settings = {"pretrained": EMBEDDED, "tokens": 100} | settings
    with pytest.raises(ValueError, match=message):
        plan(settings.pop("pretrained"), settings.pop("tokens"), **settings)


def test_units() -> None:
    assert [gib(size) for size in (3 * GIB, GIB / 2, 1831 * GIB)] == ["3.00 GiB", "0.500 GiB", "1,831 GiB"]
    assert [duration(s) for s in (12.34, 59.97, 600, 3723, 5e6)] == [
        "12.3 s",
        "1 min",
        "10 min",
        "1 h 02 min",
        "1,388 h 53 min",
    ]
