"""Time of a quickstart training step by part, over the time of its matrix products.

Run from the checkout: ``OMP_NUM_THREADS=1 python benchmarks/quickstart_profile.py``; a minute or two on one free core.
``--dtype bfloat16`` if the CPU computes it natively; ``--layers 6`` for a part of the model on a busy machine.

Time is the process's CPU time. A part's floor is the operations of its matrix products at the rate that one product of
the model's shapes reaches here. It excludes attention, presses, norms, rotations, SwiGLU, allocation and Python.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from kvpress import ExpectedAttentionPress, SnapKVPress
from measure import report
from torch import Tensor

from data.mixture import EvictionData
from data.mixture_stream import MixtureStream
from sparsekv_pl.eviction.real import RealEviction
from sparsekv_pl.models.backbone import Backbone, causal_lm
from sparsekv_pl.models.batch import Batch
from sparsekv_pl.models.decoder import decoder_of
from sparsekv_pl.models.lora import Lora
from sparsekv_pl.objectives import EIT, Mixed, SelectionObjective
from sparsekv_pl.presses import EvictionAugPress
from sparsekv_pl.training.eit_module import EITModule

STEPS = 3


def build(dtype: str, layers: int | None) -> tuple[EITModule, Iterator[Batch]]:
    """The quickstart's module and training batches; ``layers`` limits the model's depth."""
    torch.manual_seed(0)
    press = EvictionAugPress([ExpectedAttentionPress(), SnapKVPress()], score_all=True)
    objective = Mixed([EIT(), SelectionObjective()], [1.0, 3.0])
    module = EITModule(Backbone(dtype=dtype, lora=Lora()), RealEviction(press), objective)  # type: ignore[arg-type]
    model = causal_lm(module.model)
    if layers is not None:
        decoder_of(model).layers = decoder_of(model).layers[:layers]
        model.config.num_hidden_layers = layers
    data = EvictionData(context_tokens=256, continuation_tokens=64, batch_size=4, retrieval_share=0.65)
    data.tokenizer = module.tokenizer
    data.setup()
    return module.train(), iter(MixtureStream(data, 0, 1))


class Clock:
    """Measures CPU seconds by part."""

    def __init__(self) -> None:
        self.spent: dict[str, list[float]] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = time.process_time()
        yield
        self.spent.setdefault(part, []).append(time.process_time() - start)

    def timed(self, part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """Run ``work`` and add its time to ``part``."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with self(part):
                return work(*args, **kwargs)

        return run


def step(module: EITModule, batch: Batch, clock: Clock, dtype: str) -> None:
    """Run forward and backward of one step, and time each part."""
    module.zero_grad()
    student, objective = module.student, module.objective
    with (
        patch.object(student, "teacher", _Timed(clock, student.teacher)),
        patch.object(student, "evict", clock.timed("student", student.evict)),
        torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"),
    ):
        view, _ = student.view(batch, 0.5, 0)
        with clock("losses"):
            loss = objective(view)["loss"]
    with clock("backward"):
        loss.backward()


class _Timed:
    """The teacher, timed when it is called."""

    def __init__(self, clock: Clock, teacher: Any) -> None:
        self._clock, self._teacher = clock, teacher

    def __call__(self, *args: Any) -> Tensor:
        hidden: Tensor = self._clock.timed("teacher", self._teacher)(*args)
        return hidden

    def __getattr__(self, name: str) -> Any:
        return getattr(self._teacher, name)


def rate(dtype: str) -> float:
    """Operations per second of the MLP's product on 1,024 rows, the best of ten."""
    rows, weight = (torch.randn(size, 576).to(getattr(torch, dtype)) for size in (1_024, 1_536))
    best = min(_seconds(lambda: rows @ weight.T) for _ in range(10))
    return 2 * rows.numel() * len(weight) / best


def floors(module: EITModule, batch: Batch) -> dict[str, float]:
    """Operations of each part's products. Frozen weights have no gradient, so a backward costs as much as a forward."""
    model = causal_lm(module.model)
    weights = {name: p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "layers" in name}
    tokens = 2.0 * (batch["context_ids"].numel() + batch["continuation_ids"].numel())
    adapted, adapter = (tokens * sum(n for name, n in weights.items() if ("lora" in name) >= lora) for lora in (0, 1))
    head = 2.0 * int((batch["labels"][:, 1:] >= 0).sum()) * model.get_output_embeddings().weight.numel()
    return {"teacher": adapted - adapter, "student": adapted, "losses": 3 * head, "backward": adapted + adapter}


def _seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    """Print the parts of a step as ratios to the whole and to their products."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--layers", type=int)
    given = parser.parse_args()
    torch.set_num_threads(1)
    module, batches = build(given.dtype, given.layers)
    step(module, next(batches), Clock(), given.dtype)
    clock, needed = Clock(), []
    for batch in (next(batches) for _ in range(STEPS)):
        needed.append(floors(module, batch))
        step(module, batch, clock, given.dtype)
    speed = rate(given.dtype)
    means = {part: statistics.mean(spent) for part, spent in clock.spent.items()}
    least = {part: statistics.mean(one[part] for one in needed) / speed for part in means}
    means["step"], least["step"] = sum(means.values()), sum(least.values())
    rows = [
        {"part": part, "share": f"{spent / means['step']:.2f}", "over its products": f"{spent / least[part]:.2f}"}
        for part, spent in means.items()
    ]
    ratios = {f"{part} over its products": spent / least[part] for part, spent in means.items()}
    report("quickstart_profile", rows, ratios, dict.fromkeys(ratios, 1.0), {})


if __name__ == "__main__":
    main()
