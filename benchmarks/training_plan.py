"""Compare the plan of a step (``train.py plan``) with the tensors that live in a real one, and with its time.

Run from the checkout: ``python benchmarks/training_plan.py``; takes some three minutes of one core.

The small model is SmolLM2-135M-Instruct, in the CPU's native precision, with the CPU's norms and adapters or a GPU's.
Then Qwen3-8B's and Llama-3.1-8B's shapes, two layers deep, with a GPU's: the real step runs at full width on fake
tensors, which hold no memory. Bytes are those of live tensors beside weights and optimizer. Time is CPU seconds against
the plan at the rate that ``--tflops measure`` finds, in steps of a few random layers.
"""

import time
from argparse import ArgumentParser
from typing import Any

import torch
from counted_step import (
    counted,
    eviction_of,
    fake_model,
    fake_tensors,
    objective_of,
    planned,
    robust_press,
    student_of,
)
from measure import report, seconds
from planned_shapes import shape

from sparsekv_pl.models.backbone import Backbone, causal_lm
from sparsekv_pl.models.lora import Lora
from sparsekv_pl.models.native_precision import decide
from sparsekv_pl.training.measured_step import MeasuredStep, batch_of
from sparsekv_pl.training.step_operations import row_operations
from sparsekv_pl.training.step_shape import StepShape, model_shape

NATIVE = decide(accelerator="cpu")
LENGTHS = (128, 256)
GOAL = 1.25
"""Most by which plan and measurement differ, either way."""
LARGE = Lora(r=64, alpha=128)


def settings() -> dict[str, dict[str, Any]]:
    """The steps of the small model."""
    return {
        "whole": {"on_cpu": True},
        "checkpointed": {"on_cpu": True, "chunk_tokens": 64, "checkpoint": True},
        "whole, a GPU's": {},
    }


def off(planned_bytes: float, real: float) -> float:
    """How many times the larger is the smaller."""
    return max(planned_bytes / real, real / planned_bytes)


def row(name: str, step: StepShape, real: dict[str, int], plan: dict[str, int]) -> dict[str, object]:
    """A line of the table."""
    peaks = max(real.values()), max(plan.values())
    return {
        "step": name,
        "tokens": step.context_tokens,
        "live MiB": f"{peaks[0] / 2**20:,.0f}",
        "planned": f"{peaks[1] / 2**20:,.0f}",
        "planned/live": f"{peaks[1] / peaks[0]:.2f}",
        "CPU s": "",
        "planned s": "",
    }


def cpu_seconds(model: Any, step: StepShape) -> float:
    """CPU seconds of the step, uncounted."""
    student, batch = student_of(model, step), batch_of(step)

    def run() -> None:
        with NATIVE.autocast():
            view, _ = student.view(batch, step.compression_ratio, 0)
            student.objective(view)["loss"].backward()

    return seconds(run, time.process_time)


def small(rows: list[dict[str, object]], ratios: dict[str, float], lengths: tuple[int, ...]) -> None:
    """Compare the small model's steps."""
    dtype = getattr(torch, NATIVE.dtype)
    model, _ = Backbone(dtype=NATIVE.dtype).load()
    config, lora = causal_lm(model).config, Lora()
    found = model_shape("small", config, lora, dtype, False)
    for tokens in lengths:
        for name, own in settings().items():
            step = StepShape(tokens, 64, 0.9, robust_press(), **({"dtype": dtype} | own))
            taken = cpu_seconds(model, step) if step.on_cpu else None  # before the CPU's forwards are taken off
            real, plan = counted(model, step), planned(config, lora, step)
            made = row(name, step, real, plan)
            if taken is not None:
                measured = MeasuredStep(config, lora, eviction_of(step), objective_of(step))
                rate = measured.tflops(found, step, torch.device("cpu"), time.process_time)
                expected = sum(row_operations(found, step).values()) / rate / 1e12
                made |= {"CPU s": f"{taken:.2f}", "planned s": f"{expected:.2f}"}
            rows.append(made)
            print(rows[-1], flush=True)
            ratios[f"{name}@{tokens}"] = off(max(plan.values()), max(real.values()))
            model.zero_grad()


def large(rows: list[dict[str, object]], ratios: dict[str, float], tokens: int, layers: int) -> None:
    """Compare steps of the two shapes of 8 billion parameters."""
    for kind in ("qwen3", "llama"):
        config, step = shape(kind, layers), StepShape(tokens, 128, 0.3, robust_press())
        with fake_tensors():
            real = counted(fake_model(config, LARGE, step.dtype), step)
        plan, name = planned(config, LARGE, step), f"{kind}, {layers} layers"
        rows.append(row(name, step, real, plan))
        print(rows[-1], flush=True)
        ratios[f"{name}@{tokens}"] = off(max(plan.values()), max(real.values()))


def main(lengths: tuple[int, ...], tokens: int, layers: int) -> None:
    """Measure and print both."""
    print(NATIVE)
    rows: list[dict[str, object]] = []
    ratios = dict[str, float]()
    large(rows, ratios, tokens, layers)
    small(rows, ratios, lengths)
    report("training_plan", rows, ratios, {}, dict.fromkeys(ratios, GOAL))


if __name__ == "__main__":
    parser = ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=LENGTHS, help="of the small model's contexts")
    parser.add_argument("--context", type=int, default=4_096, help="of the large shapes")
    parser.add_argument("--layers", type=int, default=2, help="of the large shapes")
    given = parser.parse_args()
    main(tuple(given.tokens), given.context, given.layers)
