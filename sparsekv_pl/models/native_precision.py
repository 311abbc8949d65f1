"""The default precision of a run: the one that its machine computes natively."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator
from lightning.pytorch.utilities import rank_zero_warn

Dtype = Literal["float32", "bfloat16", "float16"]
AskedDtype = Literal["auto", "float32", "bfloat16", "float16"]

AUTO: Literal["auto"] = "auto"
"""The dtype setting that follows the precision of the computation."""

NATIVE_CAPABILITY = (8, 0)
"""Lowest compute capability of GPUs with bfloat16."""

NATIVE_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
"""torch's names of CPU instructions that multiply bfloat16: x86's, then Arm's."""

EMULATION = "products took 4 to 9 times as long as in float32 forwards and 13 to 65 times backwards (docs/log/speed.md)"
"""The cost of emulated bfloat16 on a CPU, measured with benchmarks/bfloat16.py."""


@dataclass(frozen=True)
class Machine:
    """The device of a run and its capabilities, as reported by torch."""

    device: str
    """cpu, cuda, or another accelerator of Lightning."""
    name: str
    """The device's name in messages."""
    capability: tuple[int, int] = (0, 0)
    """Compute capability of the oldest CUDA GPU."""
    instructions: frozenset[str] = frozenset()
    """The CPU's instruction sets, named as in ``torch.cpu.get_capabilities``."""
    onednn: bool = False
    """Whether oneDNN, which multiplies matrices on CPUs, supports bfloat16."""

    @property
    def bfloat16(self) -> bool:
        """Whether bfloat16 is native.

        A CPU needs both: oneDNN supports bfloat16 on every AVX-512 processor, even if it has to convert each number,
        and the processor's instructions are unused if torch has no oneDNN or is set not to use them.
        """
        if self.device == "cuda":
            return self.capability >= NATIVE_CAPABILITY
        return self.device == "cpu" and self.onednn and bool(self.instructions.intersection(NATIVE_INSTRUCTIONS))

    @property
    def emulates(self) -> bool:
        """Whether bfloat16 works, but is emulated and slow."""
        return self.device in ("cpu", "cuda") and not self.bfloat16

    def __str__(self) -> str:
        if self.device == "cuda":
            capability, least = (".".join(map(str, version)) for version in (self.capability, NATIVE_CAPABILITY))
            return f"{self.name} has compute capability {capability}; bfloat16 takes {least}"
        if self.device != "cpu":
            return f"{self.name} is not known to compute in bfloat16"
        native = sorted(self.instructions.intersection(NATIVE_INSTRUCTIONS))
        return f"{self.name} has {', '.join(native)}" if self.bfloat16 else f"{self.name} emulates bfloat16"


@dataclass(frozen=True)
class Decision:
    """A trainer's ``precision``, the ``dtype`` of the base weights, the reason, and the device."""

    precision: str
    dtype: Dtype
    why: str
    device: str

    def __str__(self) -> str:
        return f"precision: {self.precision} over {self.dtype} weights ({self.why})"

    def autocast(self) -> AbstractContextManager[None]:
        """Return the autocast context of a trainer with this precision, for code without a trainer."""
        return torch.autocast(
            self.device, getattr(torch, dtype_of(self.precision)), enabled=self.precision.endswith("mixed")
        )


def decide(
    precision: str | int | None = None,
    dtype: AskedDtype = AUTO,
    *,
    accelerator: str = "auto",
    every_weight: bool = False,
    sharded: bool = False,
) -> Decision:
    """Decide the precision of training, evaluation, analyses, plans, benchmarks and notebooks.

    bfloat16 where it is native, float16 with a loss scaler on older GPUs, otherwise float32. Warns once per process if
    bfloat16 was requested and is emulated.

    Parameters
    ----------
    precision, dtype
        Settings that were given take precedence; None and ``auto`` if not given. A dtype of ``auto`` follows
        ``precision``.
    accelerator
        As in a trainer.
    every_weight
        Whether the base weights train: with a loss scaler they must be in float32.
    sharded
        Whether ModelParallelStrategy shards the model; it has no loss scaler.
    """
    machine = probe(accelerator)
    given = precision is not None
    if precision is None:
        precision = _native(machine, sharded)
    if dtype == AUTO:
        dtype = dtype_of(precision)
        if dtype == "float16" and every_weight:
            dtype = "float32"
    if machine.emulates and "bfloat16" in (dtype, dtype_of(precision)):
        _warn_of_emulation(machine)
    return Decision(str(precision), dtype, "given" if given else str(machine), machine.device)


def probe(accelerator: str = "auto") -> Machine:
    """Query torch for the machine that ``accelerator`` selects, as Lightning does.

    The only place with such a query. On a GPU it initialises CUDA in this process, after which a trainer cannot fork
    (ddp_notebook, ddp_fork): set the dtype of such a run.
    """
    if accelerator in ("auto", "gpu") and MPSAccelerator.is_available():
        return Machine("mps", "mps")
    if accelerator in ("auto", "gpu", "cuda") and CUDAAccelerator.is_available():
        oldest = min(range(torch.cuda.device_count()), key=torch.cuda.get_device_capability)
        return Machine("cuda", torch.cuda.get_device_name(oldest), torch.cuda.get_device_capability(oldest))
    if accelerator not in ("auto", "cpu"):
        return Machine(accelerator, accelerator)
    has = {name for name, value in torch.cpu.get_capabilities().items() if value is True}
    built = torch.backends.mkldnn.is_available()
    return Machine(
        "cpu", "this CPU", instructions=frozenset(has), onednn=built and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def warn_of_emulation(trainer: Trainer) -> None:
    """Warn if ``trainer`` computes in a precision that its device emulates; the user may have made the trainer."""
    decide(trainer.precision, accelerator=trainer.strategy.root_device.type)


def dtype_of(precision: str | int) -> Dtype:
    """Return the dtype of matrix products under a trainer's ``precision``; float32 for 64 bits too."""
    text = str(precision)
    if text.startswith("16") or text.endswith("float16"):
        return "float16"
    return "bfloat16" if text.startswith(("bf16", "transformer-engine")) else "float32"


def _native(machine: Machine, sharded: bool) -> str:
    if machine.bfloat16:
        return "bf16-mixed"
    return "16-mixed" if machine.device == "cuda" and not sharded else "32-true"


@cache
def _warn_of_emulation(machine: Machine) -> None:
    if machine.device == "cpu":
        cost, instead = f": {EMULATION}", "32-true and dtype float32"
    else:
        cost, instead = "", "16-mixed and dtype float16"
    rank_zero_warn(
        f"bfloat16 was requested, which {machine.name} emulates{cost}. Leave precision and dtype out, or give "
        f"precision {instead}"
    )
