"""A training's plan: bytes against the tensors of real steps, operations against counted ones, and its proposals."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from kvpress import KeyDiffPress, SnapKVPress, StreamingLLMPress, TOVAPress
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.counted_step import PHASES, counted, planned, robust_press, student_of
from benchmarks.planned_shapes import EIGHTH, shape
from sparsekv_pl.eviction.while_decoding import Decoding
from sparsekv_pl.models.backbone import causal_lm
from sparsekv_pl.models.lora import Lora, inject_lora
from sparsekv_pl.models.quantisation import four_bit, keep_unpacked
from sparsekv_pl.presses import EvictionAugPress, SparseRegPress
from sparsekv_pl.training.measured_step import batch_of
from sparsekv_pl.training.score_memory import uncounted
from sparsekv_pl.training.step_memory import StepMemory
from sparsekv_pl.training.step_operations import row_operations
from sparsekv_pl.training.step_shape import ModelShape, StepShape, model_shape
from sparsekv_pl.training.training_plan import TrainingPlan

LORA = Lora(r=16, alpha=32)
GIB = 2**30


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """Three layers of an eighth of Qwen3-8B's width."""
    with torch.random.fork_rng():
        return inject_lora(AutoModelForCausalLM.from_config(shape("qwen3", 3, **EIGHTH)), LORA)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"on_cpu": True, "rows": 2},
        {"chunk_tokens": 96, "checkpoint": True},
        {"local": True, "dtype": torch.float32},
        {"full_cache": True, "read_again": 41, "compared_layers": 1},
        {"first_chunk": True},
        {"first_chunk": True, "chunk_tokens": 96, "checkpoint": True},
        {"continuation_tokens": 128, "decoding": Decoding(48), "context_tokens": 96, "on_cpu": True},
        {"continuation_tokens": 128, "decoding": Decoding(48, budget=24, context=False), "scores": False},
        {"continuation_tokens": 128, "decoding": Decoding("turn"), "turn_ends": (40, 90)},
        {"press": SparseRegPress(SnapKVPress(window_size=32)), "press_losses": True, "scores": False, "on_cpu": True},
        {"press": None, "dropout": True, "scores": False, "on_cpu": True},
        {"press": None, "dropout": True, "scores": False, "checkpoint": True},
    ],
    ids=[
        *("gpu", "cpu, two rows", "checkpointed", "local", "read again", "first chunk", "first chunk, checkpointed"),
        *("evicted from again", "whole at first", "turns", "press losses", "dropout", "dropout, checkpointed"),
    ],
)
def test_the_peak_is_that_of_a_real_step_within_a_quarter(model: PreTrainedModel, settings: dict[str, Any]) -> None:
    model.zero_grad()
    given: dict[str, Any] = {"context_tokens": 192, "continuation_tokens": 32, "press": robust_press()} | settings
    step = StepShape(**given, compression_ratio=0.5)
    base = causal_lm(model)
    for name, weight in base.named_parameters():
        if "lora" not in name:
            weight.data = weight.data.to(step.dtype)
    real, expected = counted(model, step), planned(base.config, LORA, step)
    assert max(expected.values()) == pytest.approx(max(real.values()), rel=0.25), (expected, real)


def test_the_peak_over_4_bit_weights_is_that_of_a_real_step(tmp_path: Path) -> None:
    """Their hidden states, keys and values are float32, as peft leaves the embeddings."""
    config, step = shape("qwen3", 3, **EIGHTH), StepShape(192, 32, 0.5, robust_press())
    with torch.random.fork_rng():
        AutoModelForCausalLM.from_config(config, dtype=step.dtype).save_pretrained(tmp_path)
        quantised = four_bit(config, step.dtype)
        base = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=step.dtype, quantization_config=quantised)
        keep_unpacked(base)
        real = counted(inject_lora(base, LORA), step)
    expected = planned(config, LORA, step, load_in_4bit=True)
    assert max(expected.values()) == pytest.approx(max(real.values()), rel=0.25), (expected, real)


@pytest.mark.parametrize(
    "settings",
    [
        {"press": robust_press(), "checkpoint": True},
        {"press": SnapKVPress(window_size=32), "full_cache": True, "read_again": 41},
        {"press": SnapKVPress(window_size=32), "first_chunk": True},
        {"press": SnapKVPress(window_size=32), "chunk_tokens": 96, "first_chunk": True},
        {"press": SnapKVPress(window_size=32), "continuation_tokens": 128, "decoding": Decoding(48)},
        {
            "press": SnapKVPress(window_size=32),
            "continuation_tokens": 128,
            "decoding": Decoding("turn"),
            "turn_ends": (40, 90),
        },
        {"press": None, "dropout": True, "scores": False},
    ],
    ids=["checkpointed", "read again", "first chunk", "first of two chunks", "evicted from again", "turns", "dropout"],
)
def test_operations_are_those_of_a_step(model: PreTrainedModel, settings: dict[str, Any]) -> None:
    """Attention's own are left out: torch counts none of the CPU's kernel."""
    step = StepShape(
        **{"context_tokens": 192, "continuation_tokens": 32} | settings, compression_ratio=0.5, dtype=torch.float32
    )
    student = student_of(model.float(), step)
    with FlopCounterMode(display=False) as counter:
        view, _ = student.view(batch_of(step), step.compression_ratio, 0)
        student.objective(view)["loss"].backward()
    found = model_shape("model", causal_lm(model).config, LORA, torch.float32, False)
    without = replace(found, heads=0)
    assert sum(row_operations(without, step).values()) == pytest.approx(counter.get_total_flops(), rel=0.1)
    assert sum(row_operations(found, step).values()) > 1.02 * sum(row_operations(without, step).values())


@cache
def large() -> ModelShape:
    """Qwen3-8B, with the recipe's adapters."""
    return model_shape("m", shape("qwen3"), Lora(64, 128), torch.bfloat16, False)


def plan(**settings: Any) -> TrainingPlan:
    """The 8B recipe."""
    return TrainingPlan(large(), StepShape(4096, 128, 0.3, robust_press(), **settings), 600, 8, 512)


def test_terms_can_be_counted_by_hand() -> None:
    """Qwen3-8B, 36 layers of 4,096 and 12,288, 32 heads and 8 KV heads of 128; one row of 4,096 and 128 tokens."""
    made = plan()
    terms = {term.name: term.bytes for term in (*made.memory.always(), *made.memory.phases()[1].terms)}
    assert terms["weights"] == pytest.approx(2 * 8_190_735_360, rel=1e-5)  # and RoPE's frequencies
    trained = 36 * 64 * (2 * 8192 + 2 * 5120)  # q and o: 4096 -> 4096; k and v: 4096 -> 1024
    assert terms["adapter, gradients, optimizer"] == 16 * trained
    assert terms["context: norms"] == 35 * 4096 * 2 * 4096 * 4
    assert terms["context: feed-forward"] == 35 * 4096 * 3 * 12288 * 2
    assert terms["context: attention"] == 35 * 4096 * (2 * (4096 + 1024) * 2 + 4 * 32)
    assert terms["context: adapter inputs"] == 35 * 4096 * 2 * 4 * (4096 + 64)
    assert terms["teacher's attention"] == 36 * 8 * 4096 * 4
    assert terms["logits"] == 4 * 127 * 151936 * 4
    assert made.operations["teacher"] == pytest.approx(8 * 2 * 36 * 192.9e6 * 2432, rel=0.05)


def test_shards_and_half_the_rows_take_their_share() -> None:
    whole, shards = plan(), plan(devices=8, sharded=True)
    weights = {name: made.memory.always()[0].bytes for name, made in (("whole", whole), ("shards", shards))}
    assert weights["shards"] == weights["whole"] // 8
    assert shards.memory.phases() == whole.memory.phases()
    assert shards.rows == 8 * whole.rows
    assert shards.seconds(100.0) == pytest.approx(whole.seconds(100.0))
    assert sum(term.bytes for term in shards.memory.always()) > shards.model.weight_bytes / 8


def test_what_does_not_fit_proposes_what_does() -> None:
    """The mildest change first, and each fits by its own plan."""
    made = plan(rows=2)
    assert made.verdict(200 * GIB).startswith("fits: ")
    said = made.verdict(60 * GIB)
    assert said.startswith("DOES NOT FIT: ") and "--data.batch_size 1 --trainer.accumulate_grad_batches 16" in said
    assert "chunk_tokens" in plan().verdict(40 * GIB)
    assert "would either" in plan().verdict(10 * GIB)
    sizes = [proposed.total_bytes for _, proposed in plan().smaller()]
    assert max(sizes) < plan().total_bytes


def test_scores_of_presses_that_are_not_known_are_counted_as_the_largest_and_said() -> None:
    names = uncounted([TOVAPress(), SnapKVPress(), StreamingLLMPress()])
    assert names == ["StreamingLLM"]
    drawn = StepShape(256, 32, 0.5, EvictionAugPress([KeyDiffPress(), SnapKVPress()]))
    assert len(drawn.scorers) == 1
    assert StepShape(256, 32, 0.5, StreamingLLMPress()).scorers == []


def test_memory_of_evicted_chunks_does_not_grow_with_the_context() -> None:
    """With a budget, beside the caches between chunks."""

    def held(tokens: int) -> int:
        step = StepShape(tokens, 128, 0.0, robust_press(), chunk_tokens=512, budget=512, checkpoint=True)
        memory = StepMemory(large(), step)
        (states,) = [term.bytes for term in memory.states()]
        return memory.phases()[2].bytes - states - memory.attention_mass().bytes

    assert PHASES[2] == plan().memory.phases()[2].name
    assert held(8192) == held(4096)
