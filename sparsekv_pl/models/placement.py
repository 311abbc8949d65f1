"""Place models larger than one device: layers over several GPUs, then CPU memory, then disk.

Only the decoder's layers are distributed. Embeddings, final norm and head stay on the first device, where the inputs
are and where losses and decoding use the head's weight directly.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from sparsekv_pl.models.decoder import decoder_of
from sparsekv_pl.models.quantisation import weight_bytes

Device = int | str
"""A GPU's index, "cpu" or "disk"."""
SPREAD = ("auto", "sequential")
HELD_BACK = 0.1
"""Share of the free memory left for the KV cache and activations if no limits are given."""


@dataclass
class Placement:
    """The placement of weights on devices; accelerate's hooks move each layer to its device when it runs.

    For evaluation. Weights in CPU memory or on disk are read again for every forward: use long chunks. Raises
    ``ValueError`` for an unknown device or size.

    Parameters
    ----------
    device_map
        ``auto`` distributes the layers evenly over the GPUs, ``sequential`` fills one after the other; the rest goes
        to the CPU, then to ``offload_folder``. Or one device: ``cpu``, ``cuda``, ``cuda:1``.
    max_memory
        Most memory for weights by device, such as ``{"0": "70GiB", "cpu": "100GiB"}``: leave room for the KV cache.
        Devices not named are not used. Null takes 90 % of the free memory of every device.
    offload_folder
        Folder for weights on disk; those of a safetensors checkpoint are read in place. Null allows none on disk.
    """

    device_map: str = "auto"
    max_memory: dict[str, str] | None = None
    offload_folder: str | None = None

    def __post_init__(self) -> None:
        if self.device_map not in SPREAD:
            try:
                torch.device(self.device_map)
            except RuntimeError as error:
                raise ValueError(
                    f"placement.device_map={self.device_map!r} must be one of {SPREAD}, or a device such as cuda:0"
                ) from error
            if self.max_memory is not None:
                raise ValueError(f"placement.max_memory has no effect with device_map={self.device_map!r}: use auto")
        for device, size in (self.max_memory or {}).items():
            in_bytes(size, f"placement.max_memory[{device!r}]")

    def arguments(self, model: PreTrainedModel, unquantised: PreTrainedModel) -> dict[str, Any]:
        """Return ``from_pretrained``'s arguments for this placement.

        ``model`` is the model's skeleton on the meta device, ``unquantised`` the one without 4-bit layers, as
        transformers does not quantise layers outside the GPUs. Raises ``ValueError`` for devices that this machine
        lacks, a folder that cannot be written, and weights that do not fit.
        """
        if self.device_map not in SPREAD:
            _check_device(torch.device(self.device_map))
            return {"device_map": {"": self.device_map}}
        if self.offload_folder is not None:
            _check_writable(self.offload_folder)
        device_map = self._device_map(model, unquantised)
        return {"device_map": device_map, "offload_folder": self.offload_folder}

    def rooms(self) -> dict[Device, int]:
        """Return the bytes that weights may take by device: GPUs first, then ``cpu``."""
        from accelerate.utils import get_max_memory

        found: dict[Device, int] = get_max_memory()
        if self.max_memory is None:
            return {device: int(size * (1 - HELD_BACK)) for device, size in found.items()}
        given = {int(d) if d.isdigit() else d: in_bytes(size, d) for d, size in self.max_memory.items()}
        unknown = sorted(str(device) for device in set(given) - set(found))
        if unknown:
            raise ValueError(
                f"placement.max_memory is {self.max_memory}, which names {unknown}, but this machine has "
                f"{[str(d) for d in found]}"
            )
        return {device: given[device] for device in found if device in given}

    def _device_map(self, model: PreTrainedModel, unquantised: PreTrainedModel) -> dict[str, Device]:
        layers = [weight_bytes(layer) for layer in _layers(model)]
        offloaded = [weight_bytes(layer) for layer in _layers(unquantised)]
        outside = weight_bytes(model) - sum(layers)
        rooms = self.rooms()
        devices = spread(outside, layers, offloaded, rooms, self.device_map == "auto")
        if "disk" in devices and self.offload_folder is None:
            raise ValueError(
                f"{(outside + sum(layers)) / 2**30:.2f} GiB of weights do not fit "
                f"{ {str(d): f'{r / 2**30:.2f} GiB' for d, r in rooms.items()} }: raise placement.max_memory, use "
                "load_in_4bit, or give placement.offload_folder to leave the rest on disk"
            )
        main = next(iter(rooms))
        if set(devices) == {main}:
            return {"": main}
        if main == "cpu" and layers != offloaded:
            raise ValueError(
                "load_in_4bit with weights on disk needs a GPU: transformers quantises nothing that it offloads. Raise "
                'placement.max_memory["cpu"], or set load_in_4bit=false'
            )
        return _named(model, devices, main)


def spread(
    outside: int, layers: Sequence[int], offloaded: Sequence[int], rooms: Mapping[Device, int], even: bool
) -> list[Device]:
    """Choose the device of each layer, in order: GPUs first, then ``cpu``, then ``disk``.

    ``outside`` bytes (embeddings, norm, head) always go to the first device of ``rooms``. A layer takes ``layers[i]``
    bytes on a GPU (or on the CPU of a machine without one) and ``offloaded[i]`` elsewhere. If layers are offloaded,
    room for the largest is reserved on the first device. Raises ``ValueError`` if ``rooms`` is empty or its first
    device has too little room.
    """
    if not rooms:
        raise ValueError("placement.max_memory leaves no device: name at least one, such as 'cpu' or '0'")
    main = next(iter(rooms))
    running = [device for device in rooms if device != "cpu"] or [main]
    share = -(-(outside + sum(layers)) // len(running)) + max(layers)
    evened = {device: min(room, share) if device in running else room for device, room in rooms.items()}
    for limits, reserve in ((evened if even else rooms, 0), (rooms, 0), (rooms, max(layers))):
        left = {**limits, main: limits[main] - outside - reserve}
        devices = _filled(layers, offloaded, left, running)
        if left[main] >= 0 and set(devices) <= set(running):
            return devices
    if left[main] < 0:
        raise ValueError(
            f"embeddings, head and the largest layer take {(outside + max(layers)) / 2**30:.4f} GiB, but {main!r} has "
            f"{rooms[main] / 2**30:.4f} GiB: raise placement.max_memory for it"
        )
    return devices


def _filled(
    layers: Sequence[int], offloaded: Sequence[int], left: dict[Device, int], running: Sequence[Device]
) -> list[Device]:
    order: list[Device] = [*left, "disk"]
    left = dict(left)
    devices: list[Device] = []
    for on_gpu, off in zip(layers, offloaded, strict=True):
        while order[0] != "disk" and (on_gpu if order[0] in running else off) > left[order[0]]:
            order.pop(0)
        if order[0] != "disk":
            left[order[0]] -= on_gpu if order[0] in running else off
        devices.append(order[0])
    return devices


def _layers(model: PreTrainedModel) -> nn.ModuleList:
    return decoder_of(model).layers


def _named(model: PreTrainedModel, devices: Sequence[Device], main: Device) -> dict[str, Device]:
    """Map module names to devices, for every module with weights; one name per layer."""
    layers = _layers(model)
    [prefix] = [name for name, module in model.named_modules() if module is layers]
    holders = [name for name, m in model.named_modules() if [*m.parameters(recurse=False), *m.buffers(recurse=False)]]
    named: dict[str, Device] = {name: main for name in holders if not name.startswith(f"{prefix}.")}
    return named | {f"{prefix}.{index}": device for index, device in enumerate(devices)}


def settle(model: PreTrainedModel) -> None:
    """Make a model on several devices usable like any other.

    Its decoder's outputs return to the device of its inputs. The model cannot be moved any more: Lightning moves every
    module to its own device, which would undo the placement and fails for weights on disk.
    """
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    main = model.get_input_embeddings().weight.device
    hook = AlignDevicesHook(main, io_same_device=True, skip_keys=model._skip_keys_device_placement)
    add_hook_to_module(decoder_of(model), hook, append=True)
    model._apply = lambda *_, **__: model  # type: ignore[method-assign]


def in_bytes(size: str | int, name: str) -> int:
    """Convert a size such as ``70GiB``, ``500MB`` or a number to bytes; ``ValueError`` with ``name`` if it is none."""
    from accelerate.utils import convert_file_size_to_int

    try:
        return int(size) if str(size).isdigit() else convert_file_size_to_int(size)
    except ValueError as error:
        raise ValueError(f"{name}={size!r} is no size: write a number with a unit, such as 70GiB or 500MB") from error


def _check_device(device: torch.device) -> None:
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(f"placement.device_map='{device}', but this machine has {count} GPUs that PyTorch sees")


def _check_writable(folder: str) -> None:
    path = Path(folder).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise ValueError(f"placement.offload_folder={folder!r} cannot be written to: {error}") from error
