"""Where models come from: full, LoRA, 4-bit, adapter folders, weights on disk."""

from pathlib import Path
from typing import Any

import pytest
import torch
from kvpress import BasePress, ExpectedAttentionPress, KnormPress, SnapKVPress
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

from sparsekv_pl.eviction.decoding import greedy
from sparsekv_pl.eviction.prefill import continue_from, prefill
from sparsekv_pl.eviction.replay import RecordedPrefill
from sparsekv_pl.models.backbone import Backbone, adapter_off, causal_lm
from sparsekv_pl.models.lora import Lora, inject_lora
from sparsekv_pl.models.placement import Placement
from tests.models.backbone_cases import ids, trainable
from tests.tiny_training import MakeAdapter, MakeBackbone

# --- what trains ---


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_full_fine_tuning_trains_every_weight(kind: str, tiny_backbone: MakeBackbone) -> None:
    model, tokenizer = tiny_backbone(kind, lora=None).load()
    assert trainable(model) == {name for name, _ in model.named_parameters()}
    assert causal_lm(model) is model
    assert tokenizer.decode(tokenizer.encode("Naïve café\n")) == "Naïve café\n"
    with adapter_off(model) as nothing:
        assert nothing is None


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_lora_trains_its_targets_alone_and_starts_as_the_base(kind: str, tiny_backbone: MakeBackbone) -> None:
    base = tiny_backbone(kind, lora=None).load()[0]
    model = tiny_backbone(kind, lora=Lora(r=3, targets=("q_proj", "down_proj"))).load()[0]
    names = trainable(model)
    assert len(names) == 2 * 2 * 2  # layers, targets, A and B
    assert all("lora" in name and ("q_proj" in name or "down_proj" in name) for name in names)
    assert {tuple(p.shape) for n, p in model.named_parameters() if "q_proj.lora_A" in n} == {(3, 64)}
    with torch.no_grad():
        assert torch.equal(causal_lm(model)(ids()).logits, base(ids()).logits)


def test_adapters_are_float32_on_a_bfloat16_base(tiny_backbone: MakeBackbone) -> None:
    model = tiny_backbone(dtype="bfloat16").load()[0]
    types = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert {types[name] for name in trainable(model)} == {torch.float32}
    assert {dtype for name, dtype in types.items() if name not in trainable(model)} == {torch.bfloat16}


def test_an_adapter_folder_loads_trained_and_switches_off(tiny_backbone: MakeBackbone, tmp_path: Path) -> None:
    model = tiny_backbone().load()[0]
    for name in trainable(model):
        torch.nn.init.normal_(model.get_parameter(name), std=0.1)
    model.save_pretrained(tmp_path)
    loaded = tiny_backbone(adapter=str(tmp_path)).load()[0]
    frozen = tiny_backbone(adapter=str(tmp_path)).load(trainable=False)[0]
    base = tiny_backbone(lora=None).load()[0]
    assert trainable(loaded) == trainable(model)
    assert trainable(frozen) == set()
    with torch.no_grad():
        expected = model(ids()).logits
        assert torch.equal(loaded(ids()).logits, expected)
        assert torch.equal(frozen(ids()).logits, expected)
        with adapter_off(loaded):
            off = causal_lm(loaded)(ids()).logits
        assert torch.equal(off, base(ids()).logits)
        assert not torch.equal(off, expected)


# --- 4 bit ---


@pytest.fixture
def four_bit(tiny_backbone: MakeBackbone) -> Any:
    return tiny_backbone(load_in_4bit=True).load()[0]


def lora_gradient(model: Any) -> Tensor:
    model.train()
    model.zero_grad()
    model(ids(), labels=ids()).loss.backward()
    return torch.cat([p.grad.flatten() for n, p in model.named_parameters() if "lora_B" in n])


def test_four_bit_gradients_survive_an_evaluation(four_bit: Any) -> None:
    """bitsandbytes would repack its weights for AVX512 in the first evaluation, and train on garbage after it."""
    before = lora_gradient(four_bit)
    four_bit.eval()
    with torch.no_grad():
        four_bit(ids())
    after = lora_gradient(four_bit)
    assert before.norm() > 0
    assert torch.nn.functional.cosine_similarity(before, after, dim=0) > 0.99


def test_four_bit_quantises_the_base_and_trains_the_adapter(four_bit: Any, tiny_backbone: MakeBackbone) -> None:
    from bitsandbytes.nn import Linear4bit

    quantised: list[Any] = [module for module in four_bit.modules() if isinstance(module, Linear4bit)]
    assert len(quantised) == 2 * 7
    assert {module.weight.quant_type for module in quantised} == {"nf4"}
    assert all("lora" in name for name in trainable(four_bit))
    full = tiny_backbone(lora=None).load()[0]
    with torch.no_grad():
        similarity = torch.nn.functional.cosine_similarity(
            four_bit(ids()).logits.flatten().float(), full(ids()).logits.flatten(), dim=0
        )
    assert 0.9 < similarity < 0.9999


def test_four_bit_without_an_adapter_has_nothing_to_train(tiny_backbone: MakeBackbone) -> None:
    with pytest.raises(ValueError, match="load_in_4bit=true freezes the base weights: set lora"):
        tiny_backbone(load_in_4bit=True, lora=None).load()


def test_four_bit_without_an_adapter_can_be_evaluated(tiny_backbone: MakeBackbone) -> None:
    model = tiny_backbone(load_in_4bit=True, lora=None).load(trainable=False)[0]
    assert model.is_loaded_in_4bit
    assert trainable(tiny_backbone().load(trainable=False)[0]) == trainable(tiny_backbone(lora=None).load()[0])


def test_a_checkpoint_stored_in_four_bits_loads_as_it_is(tiny_backbone: MakeBackbone, tmp_path: Path) -> None:
    quantised, tokenizer = tiny_backbone(load_in_4bit=True, lora=None).load(trainable=False)
    quantised.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for load_in_4bit in (False, True):
        loaded = Backbone(str(tmp_path), dtype="float32", lora=None, load_in_4bit=load_in_4bit).load(trainable=False)[0]
        with torch.no_grad():
            assert torch.equal(loaded(ids()).logits, quantised(ids()).logits)


# --- placement ---

LAYER_KB = 4 * (64 * (4 + 2 + 2 + 4) * 16 + 3 * 64 * 96 + 2 * 64) // 1000  # a tiny Llama's layer in float32
OUTSIDE_KB = 4 * (1024 * 64 + 64 + 8) // 1000 + 1


@pytest.fixture
def on_disk(tiny_backbone: MakeBackbone, tmp_path: Path) -> Any:
    """The tiny Llama with its layers on disk: there is room for the embedding and one layer to bring in."""
    room = f"{OUTSIDE_KB + LAYER_KB + 2}KB"
    placement = Placement(max_memory={"cpu": room}, offload_folder=str(tmp_path / "off"))
    return tiny_backbone(lora=None, placement=placement).load(trainable=False)[0]


@pytest.mark.parametrize(
    "press",
    [None, SnapKVPress(0.5, window_size=8), ExpectedAttentionPress(0.5), KnormPress(0.3)],
    ids=lambda press: type(press).__name__,
)
def test_weights_on_disk_give_the_same_answers(
    press: BasePress | None, on_disk: Any, tiny_backbone: MakeBackbone
) -> None:
    """accelerate's hooks, which bring a layer in, and kvpress's, which evict after it, work side by side."""
    assert on_disk.hf_device_map["model.layers.0"] == on_disk.hf_device_map["model.layers.1"] == "disk"
    assert {p.device.type for p in on_disk.model.layers.parameters()} == {"meta"}
    assert {p.device.type for p in (on_disk.lm_head.weight, on_disk.model.norm.weight)} == {"cpu"}
    context = ids().repeat(1, 3)
    results = []
    for model in (tiny_backbone(lora=None).load()[0], on_disk):
        with torch.no_grad():
            chunked = prefill(model, context, press, chunk_tokens=24, budget=None if press is None else 20)
            replayed = RecordedPrefill(model, context).evicted(press)
            results.append(
                (
                    model(ids()).logits,
                    continue_from(model, ids(), chunked.cache, chunked.next_position),
                    continue_from(model, ids(), replayed.cache, replayed.next_position),
                    torch.tensor(greedy(model, chunked, ids(), torch.tensor([24, 20]), [3, 3])),
                )
            )
    for whole, spread in zip(*results, strict=True):
        assert torch.equal(whole, spread)


def test_a_placed_model_stays_where_it_is(on_disk: Any) -> None:
    """Lightning moves every module to its device; weights on disk cannot be moved."""
    before = {name: parameter.device for name, parameter in on_disk.named_parameters()}
    torch.nn.ModuleDict({"model": on_disk}).to("cpu", torch.float64)
    assert {name: parameter.device for name, parameter in on_disk.named_parameters()} == before
    assert on_disk.model.embed_tokens.weight.dtype == torch.float32


def test_a_placement_with_room_for_all_changes_nothing(tiny_backbone: MakeBackbone) -> None:
    expected = tiny_backbone(lora=None).load()[0](ids()).logits
    for placement in (Placement(), Placement(max_memory={"cpu": "1GiB"}), Placement("cpu"), Placement("sequential")):
        model = tiny_backbone(placement=placement).load()[0]
        assert torch.equal(model(ids()).logits, expected)
        assert trainable(model)


def test_weights_on_disk_are_for_evaluation(
    tiny_backbone: MakeBackbone, tiny_adapter: MakeAdapter, tmp_path: Path
) -> None:
    room = {"cpu": f"{OUTSIDE_KB + LAYER_KB + 2}KB"}
    spread = Placement(max_memory=room, offload_folder=str(tmp_path))
    with pytest.raises(ValueError, match=r"placement puts weights on \['cpu', 'disk'\], which is for evaluation"):
        tiny_backbone(placement=spread).load()
    with pytest.raises(ValueError, match=r"adapter='.*' cannot be loaded .*merge it first"):
        tiny_backbone(placement=spread, adapter=tiny_adapter()).load(trainable=False)
    with pytest.raises(ValueError, match="load_in_4bit with weights on disk needs a GPU"):
        tiny = {"cpu": f"{OUTSIDE_KB + LAYER_KB // 4}KB"}
        small = Placement(max_memory=tiny, offload_folder=str(tmp_path))
        tiny_backbone(placement=small, load_in_4bit=True, lora=None).load(trainable=False)
    with pytest.raises(ValueError, match=r"GiB of weights do not fit .*give placement.offload_folder"):
        tiny_backbone(placement=Placement(max_memory=room), lora=None).load(trainable=False)


# --- wrong sources ---


def test_lora_leaves_what_sees_and_the_head_alone() -> None:
    """A vision tower calls its projections as a decoder does."""
    text = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    sees = CLIPVisionConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=sees, text_config=text))
    assert any("vision" in name and "q_proj" in name for name, _ in model.named_modules())
    adapted = inject_lora(model, Lora(r=2, targets=("q_proj", "down_proj")))
    trains = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert len(trains) == 2 * 2 * 2  # layers, targets, factors
    assert all("language_model" in name for name in trains)
    with pytest.raises(ValueError, match=r"adapts the head \(lm_head\)"):
        inject_lora(LlamaForCausalLM(text), Lora(targets=("lm_head",)))
