"""A real step of a plan, whose live tensors are counted: on real tensors, or on fake ones, which run at any size.

torch.distributed._tools.mem_tracker.MemTracker counts by module and wants steps that call the model as a module; here
passes call the decoder, and one number is needed. Operators' own buffers are not seen.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from kvpress import ExpectedAttentionPress, KeyDiffPress, KnormPress, SnapKVPress
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, is_fake
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedConfig
from transformers.integrations.sdpa_attention import repeat_kv

from sparsekv_pl.attention import evicted_attention
from sparsekv_pl.eviction import Eviction
from sparsekv_pl.eviction.dropout import KVDropout
from sparsekv_pl.eviction.local_gradients import LocalGradients
from sparsekv_pl.eviction.real import RealEviction
from sparsekv_pl.models.anchors import AnchorTable
from sparsekv_pl.models.backbone import causal_lm
from sparsekv_pl.models.lora import Lora, inject_lora
from sparsekv_pl.models.quantisation import skeleton
from sparsekv_pl.objectives import (
    EIT,
    FirstChunk,
    FullCache,
    Layerwise,
    Mixed,
    Objective,
    Reconstruction,
    SelectionObjective,
    SparseLM,
)
from sparsekv_pl.presses import EvictionAugPress
from sparsekv_pl.training.measured_step import Words, batch_of
from sparsekv_pl.training.step_memory import PHASES, StepMemory
from sparsekv_pl.training.step_shape import StepShape, model_shape
from sparsekv_pl.training.student import Student
from sparsekv_pl.training.teacher import Teacher

ITEM = torch.ops.aten._local_scalar_dense.default


class LiveBytes(TorchDispatchMode):
    """Bytes of storages made inside the block that still live, and their peak.

    Fake tensors hold no numbers: what is read back from them is 1, or True.
    """

    def __init__(self, ignored: nn.Module) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: Any = WeakIdKeyDictionary()
        for tensor in (*ignored.parameters(), *ignored.buffers()):
            self._known[tensor.untyped_storage()] = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is ITEM and is_fake(args[0]):
            return {torch.bool: True, torch.int64: 1}.get(args[0].dtype, 1.0)
        made = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._count, made)
        return made

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known[storage] = weakref.ref(storage, partial(self._free, size))
        self.live += size
        self.peak = max(self.peak, self.live)

    def _free(self, size: int, _: object) -> None:
        self.live -= size


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Let tensors made inside the block hold no memory and compute nothing."""
    shapes = ShapeEnv(allow_scalar_outputs=True, allow_dynamic_output_shape_ops=True)
    with FakeTensorMode(allow_non_fake_inputs=True, shape_env=shapes, static_shapes=True):
        yield


def fake_model(config: PreTrainedConfig, lora: Lora, dtype: torch.dtype) -> Any:
    """Build an adapted model of fake weights; call it inside ``fake_tensors``."""
    with _disable_current_modes():
        model = inject_lora(skeleton(config, dtype), lora)
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                made = torch.empty(weight.shape, dtype=weight.dtype)
                module._parameters[name] = nn.Parameter(made, requires_grad=weight.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    return model.train()


@contextmanager
def as_on_a_gpu(model: nn.Module) -> Iterator[None]:
    """Run what a GPU runs: peft's adapters, transformers' norms, keys repeated for all query heads under a mask."""
    own = [(module, vars(module).pop("forward")) for module in model.modules() if "forward" in vars(module)]

    def masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **settings: Any) -> Tensor:
        groups = query.shape[1] // key.shape[1]
        return original(query, repeat_kv(key, groups), repeat_kv(value, groups), mask, **settings)

    original = evicted_attention._masked
    try:
        with patch.object(evicted_attention, "_masked", masked):
            yield
    finally:
        for module, forward in own:  # of models/cpu_kernels.py
            vars(module)["forward"] = forward


def robust_press() -> EvictionAugPress:
    """The presses of configs/train/robust.yaml, all aligned at every step."""
    presses = [KeyDiffPress(), KnormPress(), SnapKVPress(window_size=32), ExpectedAttentionPress()]
    return EvictionAugPress(presses, score_all=True)


def objective_of(step: StepShape) -> Objective:
    """The losses that the step has."""
    objectives: list[Objective] = [
        EIT(),
        *([SelectionObjective()] if step.scores else []),
        *([FirstChunk()] if step.first_chunk else []),
        *([FullCache()] if step.full_cache else []),
        *([Layerwise()] if step.compared_layers else []),
        *([SparseLM()] if step.press_losses else []),
        *([Reconstruction(step.read_again - 9, 8, instruction="repeat")] if step.read_again else []),
    ]
    objective = Mixed(objectives, [1.0] * len(objectives))
    objective.prepare(Words())
    return objective


def eviction_of(step: StepShape) -> Eviction:
    """The eviction of the step."""
    if step.press is None:
        dropout = KVDropout(checkpoint=step.checkpoint)
        dropout.tokenizer = AnchorTable(*torch.zeros(2, 64, dtype=torch.bool))
        return dropout
    local = LocalGradients() if step.local else None
    return RealEviction(step.press, step.chunk_tokens, step.budget, step.checkpoint, local, decoding=step.decoding)


def student_of(model: Any, step: StepShape) -> Student:
    """The student of ``model``, whose eviction is the step's."""
    return Student(model.train(), eviction_of(step), Teacher(model), objective_of(step))


def counted(model: Any, step: StepShape) -> dict[str, int]:
    """Run a step of an adapted ``model`` and return the peak of live bytes by phase, beside its weights.

    Gradients and the adapter's copies for products are counted, optimizer states are not: there is no optimizer.
    """
    student, batch = student_of(model, step), batch_of(step)
    device = nullcontext() if step.on_cpu else as_on_a_gpu(model)
    mixed = torch.autocast("cpu", step.dtype, enabled=step.dtype != torch.float32)
    peaks = dict[str, int]()
    with device, mixed, LiveBytes(causal_lm(model)) as held:
        view, _ = student.view(batch, step.compression_ratio, 0)
        peaks[PHASES[0]], held.peak = held.peak, held.live
        loss = student.objective(view)["loss"]
        del view
        peaks[PHASES[1]], held.peak = held.peak, held.live
        loss.backward()
        peaks[PHASES[2]] = held.peak
    return peaks


def planned(config: PreTrainedConfig, lora: Lora, step: StepShape, load_in_4bit: bool = False) -> dict[str, int]:
    """The plan of the same: by phase, with what ``counted`` counts."""
    memory = StepMemory(model_shape("model", config, lora, step.dtype, load_in_4bit), step)
    copies = memory.model.trained * step.dtype.itemsize if step.dtype.itemsize < 4 else 0
    unpacked = sum(term.bytes for term in memory.always() if term.name == "one unpacked weight")
    found = {phase.name: phase.bytes + copies + unpacked for phase in memory.phases()}
    found[PHASES[2]] += 4 * memory.model.trained
    return found
