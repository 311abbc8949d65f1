"""``python train.py plan``: steps, hours and bytes of a training from its configuration files, without its weights."""

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import psutil
import torch
from jsonargparse import ArgumentParser as ObjectParser
from jsonargparse import Namespace

from sparsekv_pl.cli.command_line import CommandLine
from sparsekv_pl.eviction import Eviction
from sparsekv_pl.eviction.dropout import KVDropout
from sparsekv_pl.eviction.real import RealEviction
from sparsekv_pl.eviction.request import Request
from sparsekv_pl.models.backbone import Backbone
from sparsekv_pl.models.lora import Lora, adapter_settings
from sparsekv_pl.models.memory_planner import read_config
from sparsekv_pl.models.native_precision import AUTO, decide, dtype_of
from sparsekv_pl.models.placement import in_bytes
from sparsekv_pl.objectives import EIT, Mixed, Objective, Reconstruction
from sparsekv_pl.schedules import Schedule
from sparsekv_pl.training.eit_module import EITModule
from sparsekv_pl.training.measured_step import MeasuredStep
from sparsekv_pl.training.sharding import SAME_LENGTHS
from sparsekv_pl.training.step_shape import StepShape, model_shape
from sparsekv_pl.training.training_plan import TFLOPS, TrainingPlan

MEASURE = "measure"
MOST_RATIOS = 1_000
"""Steps of a schedule that are asked for their ratio."""


class ParsedOnly(CommandLine):
    """A command line that parses its files and makes no objects."""

    def before_instantiate_classes(self) -> None:
        """Claim no folder, choose no precision."""

    def instantiate_classes(self) -> None:
        """Load no model."""


@dataclass(frozen=True)
class Planned:
    """A plan, and the step that can be measured for it."""

    plan: TrainingPlan
    measured: MeasuredStep


def planned(arguments: Sequence[str], on_cpu: bool = False, here: bool = False) -> Planned:
    """Plan the training of train.py's ``arguments`` ("--config FILE" and settings).

    Where the settings name no precision it is this machine's if the plan is for it (``here``), else bfloat16, and
    float32 on a CPU. Raises ``ValueError`` for settings that parsing refuses, and for a training whose steps are not
    planned: not EITModule's, or without an adapter.
    """
    settings = ParsedOnly(args=list(arguments), run=False, save_config_callback=None).config
    if settings.model.class_path != f"{EITModule.__module__}.{EITModule.__qualname__}":
        raise ValueError(f"model.class_path is {settings.model.class_path}: only EITModule's steps can be planned")
    made = _objects(settings)
    eviction, backbone, trainer, data = made.eviction, made.backbone, settings.trainer, settings.data.init_args
    devices = _devices(trainer, on_cpu, here)
    _check_sharded(backbone, data)
    objective = made.objective or EIT()
    request = objective.request
    _check_planned(eviction, request)
    evicts = _dropout(eviction, data) if isinstance(eviction, KVDropout) else _real(eviction, data)
    dtype = _dtype(backbone, trainer.precision, on_cpu, here)
    step = StepShape(
        compression_ratio=_least_ratio(trainer),
        rows=data.batch_size,
        teacher=request.teacher,
        scores=request.scores,
        first_chunk=request.first_chunk,
        full_cache=request.full_cache,
        read_again=_read_again(objective),
        compared_layers=len(request.layers),
        press_losses=request.press_losses,
        dtype=dtype,
        on_cpu=on_cpu,
        devices=devices,
        sharded=backbone.sharded,
        **evicts,
    )
    shortest = step.context_tokens if step.turn_ends else data.shortest_context or step.context_tokens
    config, lora = read_config(backbone.pretrained, backbone.cache_dir), _lora(backbone)
    model = model_shape(backbone.pretrained, config, lora, dtype, backbone.load_in_4bit)
    if trainer.max_steps < 1:
        raise ValueError(f"trainer.max_steps is {trainer.max_steps}: give the number of steps to plan")
    plan = TrainingPlan(model, step, trainer.max_steps, trainer.accumulate_grad_batches, shortest)
    return Planned(plan, MeasuredStep(config, lora, eviction, objective))


def main(arguments: Sequence[str]) -> None:
    """Print the plan of train.py's ``arguments``, for a device that the plan's own options describe."""
    parser = ArgumentParser(prog="train.py plan", description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--memory", help="of one device, such as 80GiB; left out: this machine's GPU, or RAM")
    parser.add_argument("--device", choices=("gpu", "cpu"), help="left out: gpu if --memory is given or a GPU is here")
    parser.add_argument(
        "--tflops",
        help="of one device, or measure: steps of a few random layers here; left out: measured for this machine, "
        f"{TFLOPS:g} for one that --memory describes",
    )
    given, others = parser.parse_known_args(arguments)
    on_cpu = given.device == "cpu" or (given.device is None and not given.memory and not torch.cuda.is_available())
    limit = _limit(given.memory, on_cpu)
    here = given.memory is None
    made = planned(others, on_cpu, here)
    usual = MEASURE if here and made.plan.total_bytes <= limit else str(TFLOPS)
    tflops, rate = _rate(given.tflops or usual, on_cpu, made)
    sys.stdout.write("\n".join(made.plan.lines(limit, tflops, rate)) + "\n")


def _check_planned(eviction: Eviction, request: Request) -> None:
    """Raise ``ValueError`` for evictions and passes whose steps are not planned."""
    if request.chunks:
        raise ValueError("model.objective has Chunks, whose losses are not planned: leave it out")
    if isinstance(eviction, RealEviction) and eviction.quantisation is not None:
        raise ValueError("model.eviction.quantisation is set: rounded pairs are not planned, set it to null")
    if isinstance(eviction, RealEviction) and eviction.decoding is not None and eviction.checkpoint:
        raise ValueError("model.eviction has decoding and checkpoint, which are planned one at a time: leave one out")


def _dropout(eviction: KVDropout, data: Namespace) -> dict[str, Any]:
    """Return what the step's shape has of random dropout."""
    lengths = {"context_tokens": data.context_tokens, "continuation_tokens": data.continuation_tokens}
    return {**lengths, "press": None, "dropout": True, "checkpoint": eviction.checkpoint}


def _real(eviction: RealEviction, data: Namespace) -> dict[str, Any]:
    """Return what the step's shape has of a press; a conversation has the most turns, of equal length."""
    local, decoding, tokens = eviction.local_gradients, eviction.decoding, data.context_tokens
    found = {
        "context_tokens": tokens,
        "continuation_tokens": data.continuation_tokens,
        "press": eviction.press,
        "chunk_tokens": eviction.chunk_tokens,
        "budget": eviction.budget,
        "checkpoint": eviction.checkpoint,
        "local": local is not None and local.through_every is None and local.above_tokens < tokens,
        "decoding": decoding,
    }
    if decoding is None or not decoding.by_turn or not data.turns:
        return found
    turn = tokens // data.turns[1]
    ends = tuple(range(turn, tokens - turn, turn))
    return found | {"context_tokens": turn, "continuation_tokens": tokens - turn, "turn_ends": ends}


def _read_again(objective: Objective) -> int:
    """Return the tokens that Reconstruction reads after the evicted cache; an instruction has a token per word."""
    if isinstance(objective, Mixed):
        return sum(_read_again(one) for one in objective.objectives)
    if not isinstance(objective, Reconstruction):
        return 0
    return objective.cue_tokens + objective.block_size + len(objective.instruction.split())


def _limit(memory: str | None, on_cpu: bool) -> int:
    if memory is not None:
        return in_bytes(memory, "memory")
    if not on_cpu and not torch.cuda.is_available():
        raise ValueError("--device gpu without --memory, and this machine has no GPU: give its size, --memory 80GiB")
    return int(psutil.virtual_memory().available) if on_cpu else torch.cuda.mem_get_info()[0]


def _rate(text: str, on_cpu: bool, made: Planned) -> tuple[float, str]:
    """Return the 10^12 operations a second that ``--tflops`` gives, and where they come from."""
    if text == MEASURE:
        if not on_cpu and not torch.cuda.is_available():
            raise ValueError("--tflops measure, and this machine has no GPU: measure there, or give a number")
        device = torch.device("cpu" if on_cpu else "cuda")
        tflops = made.measured.tflops(made.plan.model, made.plan.typical_step, device)
        return tflops, "measured in steps of a few random layers here"
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise ValueError(f"--tflops is {text}: give a number above 0, or {MEASURE}")
    return number, "assumed; --tflops sets it" if number == TFLOPS else "given"


def _objects(settings: Namespace) -> Namespace:
    """Make the backbone, eviction and objective, which load nothing."""
    parser = ObjectParser(exit_on_error=False)
    for name, kind in (("backbone", Backbone), ("eviction", Eviction), ("objective", Objective | None)):
        parser.add_argument(f"--{name}", type=kind)
    given = {name: settings.model.init_args[name] for name in ("backbone", "eviction", "objective")}
    return parser.instantiate(parser.parse_object(Namespace(**given).as_dict()))


def _lora(backbone: Backbone) -> Lora:
    if backbone.adapter is not None:
        kept: Any = adapter_settings(backbone.adapter)
        return Lora(r=kept.r, alpha=kept.lora_alpha, targets=tuple(sorted(kept.target_modules)))
    if backbone.lora is None:
        raise ValueError("backbone.lora is null, which trains every weight: only adapters are planned, set lora")
    return backbone.lora


def _dtype(backbone: Backbone, precision: str | int | None, on_cpu: bool, here: bool) -> torch.dtype:
    named: Literal["float32", "bfloat16", "float16"] = "float32" if on_cpu else "bfloat16"
    if precision is not None:
        named = dtype_of(precision)
    elif backbone.dtype != AUTO:
        named = backbone.dtype
    elif here:
        named = decide(accelerator="cpu" if on_cpu else "auto").dtype
    found: torch.dtype = getattr(torch, named)
    return found


def _devices(trainer: Namespace, on_cpu: bool, here: bool) -> int:
    """Count the devices of a run on all nodes, as Lightning reads ``trainer.devices``: 2, "2", "0,1", [0, 1], -1, auto.

    All devices are those of this machine if the plan is for it (``here``), else one.
    """
    given = trainer.devices
    try:
        if isinstance(given, str) and given != "auto":
            given = [int(part) for part in given.split(",") if part] if "," in given else int(given)
    except ValueError as error:
        raise ValueError(
            f"trainer.devices is {given!r}: give a number, the devices' numbers such as 0,1, -1 or auto for all"
        ) from error
    if given in ("auto", -1):
        given = torch.cuda.device_count() if here and not on_cpu else 1
    count = given if isinstance(given, int) else len(given)
    return max(1, count) * int(trainer.num_nodes)


def _check_sharded(backbone: Backbone, data: Namespace) -> None:
    """Raise ``ValueError`` for what a sharded run refuses once it has ranks."""
    if backbone.sharded and backbone.load_in_4bit:
        raise ValueError("backbone.sharded=true does not go with load_in_4bit=true: 4-bit weights train under DDP")
    if backbone.sharded and data.shortest_context not in (None, data.context_tokens):
        raise ValueError(SAME_LENGTHS)


def _least_ratio(trainer: Namespace) -> float:
    """Return the least compression ratio that the Curriculum's schedule gives; 0 without one."""
    callbacks = trainer.callbacks if isinstance(trainer.callbacks, list) else [trainer.callbacks]
    for callback in filter(None, callbacks):
        if str(callback.class_path).endswith(".Curriculum"):
            parser = ObjectParser(exit_on_error=False)
            parser.add_argument("--schedule", type=Schedule)
            given = {"schedule": callback.init_args.schedule.as_dict()}
            schedule: Schedule = parser.instantiate(parser.parse_object(given)).schedule.over(max(1, trainer.max_steps))
            return min(schedule.ratio(step) for step in range(min(max(1, trainer.max_steps), MOST_RATIOS)))
    return 0.0
