"""A folder of attention gates without a model: ``gates.json`` (the shape) and ``gates.safetensors`` (the weights)."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsekv_pl.storage.whole_files import replace, written_whole

SHAPE, TENSORS = "gates.json", "gates.safetensors"


@dataclass(frozen=True)
class GateShape:
    """The model's attention shape that gates need, and the gates' own size."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    """Number of leading coordinates of a head that RoPE rotates."""
    block_size: int = 64
    gate_dim: int = 64

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be a whole number from 1 on")
        if self.gate_dim % 2:
            raise ValueError(f"gate_dim={self.gate_dim} must be even: RoPE rotates pairs of coordinates")


def write_gates(folder: str | Path, shape: GateShape, tensors: Mapping[str, Tensor]) -> None:
    """Write gates to ``folder``; it is made if missing."""
    folder = Path(folder)
    with written_whole(folder / TENSORS) as partial:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial)
    replace(folder / SHAPE, (json.dumps(asdict(shape), indent=2) + "\n").encode())


def read_gates(folder: str | Path) -> tuple[GateShape, dict[str, Tensor]]:
    """Read the shape and the tensors that ``write_gates`` wrote.

    Raises ``ValueError`` for a folder without gates, an invalid shape, or a damaged file of tensors.
    """
    folder = Path(folder).expanduser()
    missing = [name for name in (SHAPE, TENSORS) if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} has no {' and no '.join(missing)}: give a folder that a training of gates exported")
    try:
        shape = GateShape(**json.loads((folder / SHAPE).read_text()))
        return shape, load_file(folder / TENSORS)
    except (TypeError, ValueError, SafetensorError) as error:
        raise ValueError(f"{folder} holds no gates that can be read ({error}): export them again") from error
