"""Accelerators that are not there: CPU tensors that say they lie on one, refuse those of another, and count waits.

A real GPU runs behind the program that feeds it until the program asks for a number; each such wait costs the time that
both could have worked. Here every operator runs on the CPU, and each wait of a GPU is recorded with the place that
asked: numbers read (``item``, ``tolist``, ``bool``), sizes that depend on values (``nonzero``, boolean masks), copies
between the host and the device. It says nothing of speed, kernels or numerics.
"""

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only

OURS = str(Path(__file__).parents[1] / "sparsekv_pl")
aten = torch.ops.aten
READS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default}
MASKABLE = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
COPIES = {aten.copy_.default, aten._to_copy.default}


class Placed(Tensor):
    """The numbers of ``plain``, a CPU tensor, said to lie on the device ``where``."""

    plain: Tensor
    home: torch.device

    def __new__(cls, plain: Tensor, where: torch.device) -> "Placed":
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            plain.shape,
            strides=plain.stride(),
            storage_offset=plain.storage_offset(),
            dtype=plain.dtype,
        )
        made.plain, made.home = plain.detach(), where
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: self.home)  # type: ignore[assignment]
    is_cuda = property(lambda _: True)  # type: ignore[assignment]
    is_cpu = property(lambda _: False)  # type: ignore[assignment]

    def untyped_storage(self) -> Any:
        return self.plain.untyped_storage()

    def __repr__(self, *_: Any, **__: Any) -> str:
        return f"Placed({tuple(self.shape)}, {self.dtype}, {self.home})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        flat = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
        places = {value.home for value in flat if isinstance(value, Placed)}
        if func in READS or (func in MASKABLE and any(index.dtype == torch.bool for index in _given(args[1]))):
            _note(str(func))
        elif func in COPIES and len({isinstance(value, Placed) for value in flat}) > 1:
            _note(f"{func} from or to the host")
        elif func not in COPIES and len(places) > 1:
            _refuse(func, flat)
        where = args[0].home if isinstance(args[0], Placed) else next(iter(places))
        plain_args, plain_kwargs = tree_map_only(Placed, lambda value: value.plain, (args, kwargs))
        found = tree_map_only(Tensor, lambda value: Placed(value, where), func(*plain_args, **plain_kwargs))
        return return_and_correct_aliasing(func, args, kwargs, found)


def _given(indices: Sequence[Tensor | None]) -> list[Tensor]:
    return [index for index in indices if index is not None]


def _refuse(func: Any, values: Sequence[Tensor]) -> None:
    where = [str(getattr(value, "home", "cpu")) for value in values]
    raise RuntimeError(f"Expected all tensors to be on the same device: {func} got {where}")


class Accelerators(TorchFunctionMode):
    """Inside the block ``cuda:0``, ``cuda:1`` ... can be named as devices; ``waits`` counts by what and where."""

    running: ClassVar[list["Accelerators"]] = []

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __enter__(self) -> "Accelerators":
        self.running.append(self)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.running.remove(self)

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        first = args[0] if args else None
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return _moved(func, args, kwargs)
        if func is Tensor.pin_memory:
            return _pinned(first)
        if func is Tensor.tolist and isinstance(first, Placed):
            _note("tolist")
            return first.plain.tolist()
        if func in (Tensor.new_tensor, Tensor.numpy) and isinstance(first, Placed):
            _note(func.__name__)
            made = func(first.plain, *args[1:], **kwargs)
            return Placed(made, first.home) if func is Tensor.new_tensor else made
        if func is Tensor.backward:  # recomputes what was checkpointed, by Python code that names devices
            with _Again(self):
                start = (first,), (torch.ones_like(first),)
                return _engine_run_backward(*start, False, False, (), allow_unreachable=True, accumulate_grad=True)
        flat = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
        host = [value for value in flat if not isinstance(value, Placed) and value.dim()]  # PyTorch's own are let be
        if host and any(isinstance(value, Placed) for value in flat) and func not in (Tensor.copy_, Tensor.__setitem__):
            _refuse(func, flat)
        device = kwargs.get("device")
        if device is None or torch.device(device).type != "cuda":
            return func(*args, **kwargs)
        args, kwargs = tree_map_only(Placed, lambda value: value.plain, (args, {**kwargs, "device": "cpu"}))
        made = func(*args, **kwargs)
        if func in (torch.tensor, torch.as_tensor) and made.numel():
            _note(func.__name__)
        return Placed(made, torch.device(device))


class _Again(TorchFunctionMode):
    """The mode inside of what it is handling."""

    def __init__(self, mode: Accelerators) -> None:
        super().__init__()
        self.mode = mode

    def __torch_function__(self, *call: Any) -> Any:
        return self.mode.__torch_function__(*call)


def _note(what: str) -> None:
    """Count a wait by the nearest line of the project that asked for it."""
    frame = sys._getframe()
    while frame.f_back is not None and not frame.f_code.co_filename.startswith(OURS):
        frame = frame.f_back
    where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
    for running in Accelerators.running:
        running.waits[f"{what} at {where}"] += 1


def _pinned(values: Tensor) -> Tensor:
    pinned = values.clone()
    pinned.pinned = True  # type: ignore[attr-defined]
    return pinned


def _moved(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    """``Tensor.to`` and its like, between the host and any device."""
    values, *rest = args
    if func is not Tensor.to:
        rest, kwargs = [torch.device("cpu" if func is Tensor.cpu else "cuda:0")], {}
    device, dtype, _, _ = torch._C._nn._parse_to(*rest, **{k: v for k, v in kwargs.items() if k != "copy"})
    if rest and isinstance(rest[0], Tensor):
        device, dtype = rest[0].device, rest[0].dtype
    target = values.device if device is None else device
    target = torch.device("cuda", 0) if target == torch.device("cuda") else target
    if dtype is not None and dtype != values.dtype:
        values = values.to(dtype=dtype)
    if target == values.device:
        return values
    if "cpu" in (target.type, values.device.type) and not getattr(values, "pinned", False):
        _note(f"copy to {target.type}")
    return _Move.apply(values, target)


class _Move(torch.autograd.Function):
    """A copy to another device, with a gradient that comes back."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, target: torch.device) -> Tensor:
        ctx.back = values.device
        plain = values.plain if isinstance(values, Placed) else values
        return plain.clone() if target.type == "cpu" else Placed(plain.clone(), target)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        plain = gradient.plain if isinstance(gradient, Placed) else gradient
        return plain if ctx.back.type == "cpu" else Placed(plain, ctx.back), None


def placed(values: Any, device: str) -> Any:
    """All tensors in ``values`` (a batch), on ``device``; nothing is counted."""
    return tree_map_only(Tensor, lambda tensor: Placed(tensor, torch.device(device)), values)


def place(module: nn.Module, device: str) -> None:
    """Move a module's parameters and buffers to ``device``; shared parameters stay shared."""
    memo: dict[int, nn.Parameter] = {}
    for inner in module.modules():
        for name, parameter in inner._parameters.items():
            if parameter is not None and not isinstance(parameter, Placed):
                new = nn.Parameter(placed(parameter.detach(), device), parameter.requires_grad)
                inner._parameters[name] = memo.setdefault(id(parameter), new)
        for name, buffer in inner._buffers.items():
            if buffer is not None and not isinstance(buffer, Placed):
                inner._buffers[name] = placed(buffer, device)


def spread(decoder: nn.Module, devices: Sequence[str]) -> None:
    """Put a decoder's layers on these devices, with hooks that bring them their inputs, as a placement does."""

    def bringing(module: nn.Module, device: str) -> None:
        place(module, device)
        module.register_forward_pre_hook(
            lambda _, args, kwargs: tree_map_only(Tensor, lambda tensor: tensor.to(device), (args, kwargs)),
            with_kwargs=True,
        )

    for layer, device in zip(decoder.layers, devices, strict=True):
        bringing(layer, device)
    bringing(decoder.norm, devices[0])
