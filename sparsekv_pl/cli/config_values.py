"""Checks of a configuration beyond its types: its shape, nulls in place of numbers, and numbers out of range."""

import dataclasses
import importlib
import inspect
import math
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from sparsekv_pl.reporting.redaction import check_no_secret

CLASS_KEYS = {"class_path", "init_args", "dict_kwargs"}
LARGEST = 2**63 - 1
"""Largest integer of torch; larger values fail deep inside libraries."""

LEAST: dict[str, dict[str, float]] = {
    "lightning": {
        **{"log_every_n_steps": 0, "num_sanity_val_steps": -1, "accumulate_grad_batches": 1, "gradient_clip_val": 0},
        **{"save_top_k": -1, "every_n_train_steps": 0, "every_n_epochs": 0},
        **{"data_parallel_size": 1, "tensor_parallel_size": 1},
    },
    "torch": {"lr": 0, "max_lr": 0, "eta_min": 0, "total_steps": 1, "T_max": 1, "step_size": 1},
    "kvpress": {
        **dict.fromkeys(("window_size", "kernel_size", "chunk_length", "chunk_size", "block_size", "lag_size"), 1),
        **dict.fromkeys(("n_future_positions", "sketch_dimension", "compression_interval", "target_size"), 1),
        **dict.fromkeys(("n_sink", "num_sinks", "local_window_size", "sliding_window_size", "sink_size_start"), 0),
        **dict.fromkeys(("sink_size_end", "epsilon", "tau", "n_last", "n_recent", "n_initial"), 0),
    },
}
"""Package -> setting -> least value, for settings that the package does not check itself."""


def check_shape(node: Any, key: str = "") -> None:
    """Raise ``ValueError`` for a loaded file that cannot be a configuration, before jsonargparse interprets it.

    ``node`` is the loaded YAML of a file or an argument, and ``key`` its dotted path.
    """
    if isinstance(node, list):
        for index, item in enumerate(node):
            if isinstance(item, dict) and "init_args" in item and "class_path" not in item:
                raise ValueError(f"{key}[{index}] has init_args, but no class_path: name the class")
            check_shape(item, f"{key}[{index}]")
    if not isinstance(node, dict):
        return
    for name in ("trainer", "init_args"):
        if name in node and not isinstance(node[name], dict):
            raise ValueError(
                f"{_joined(key, name)} is {_shown(node[name])}: give a mapping of settings, or leave it out"
            )
    if "class_path" in node and not (isinstance(node["class_path"], str) and node["class_path"]):
        raise ValueError(
            f"{_joined(key, 'class_path')} is {_shown(node['class_path'])}: give a class as package.module.Class"
        )
    strange = sorted(map(str, set(node) - CLASS_KEYS)) if CLASS_KEYS & set(node) else []
    if strange:
        raise ValueError(f"{_joined(key, strange[0])} is no key: beside a class_path only init_args may stand")
    for name, value in node.items():
        check_shape(value, _joined(key, str(name)))


def check_values(value: Any, key: str, hint: Any = Any) -> None:
    """Raise ``ValueError`` for a value that cannot work, with its dotted path.

    jsonargparse accepts null for every setting of a nested class, and any number for a number. ``value`` is resolved:
    numbers, texts, lists, mappings with class_path and init_args, mappings of a dataclass's settings (``hint``).
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{key} is {value}: give a finite number")
    if isinstance(value, int) and abs(value) > LARGEST:
        raise ValueError(f"{key} is {value}: give a number within 64 bits")
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        check_no_secret(key, str(value))
    if isinstance(value, list | tuple):
        for index, item in enumerate(value):
            check_values(item, f"{key}[{index}]", hint)
    if not isinstance(value, Mapping):
        return
    if "class_path" in value:
        made = _imported(value["class_path"])
        if inspect.isclass(made):
            _check_settings(made, value.get("init_args") or {}, key)
        return
    kinds = [kind for kind in _dataclasses(hint) if set(value) <= {field.name for field in dataclasses.fields(kind)}]
    if kinds:
        _check_settings(kinds[0], value, key)
        return
    for name, item in value.items():
        check_values(item, _joined(key, str(name)))


def _check_settings(made: type, settings: Mapping[str, Any], key: str) -> None:
    """``check_values`` for the settings of ``made(**settings)``."""
    parameters, hints = inspect.signature(made).parameters, _hints(made)
    least = LEAST.get(made.__module__.partition(".")[0], {})
    for name, value in settings.items():
        path, hint = _joined(key, name), hints.get(name, Any)
        default = parameters[name].default if name in parameters else None
        if value is None and default is not None and not _takes_null(hint):
            raise ValueError(f"{path} is null: give a value, or leave it out{_meant(default)}")
        if not isinstance(value, Mapping) and hint in _dataclasses(hint):
            raise ValueError(f"{path} is {_shown(value)}: give a mapping of {hint.__name__}'s settings")
        if isinstance(value, int | float) and value < least.get(name, -math.inf):
            raise ValueError(f"{path} is {value}: give {least[name]} or more")
        check_values(value, path, hint)
    if made.__module__.startswith("kvpress") and settings.get("kernel_size", 1) % 2 == 0:
        raise ValueError(f"{key}.kernel_size is {settings['kernel_size']}: give an odd number of tokens")


def explained(made: type, *args: Any, **settings: Any) -> Any:
    """Return ``made(*args, **settings)``; a refusal by another package's class becomes a ``ValueError`` with its name.

    This project's own classes name the setting themselves, and a bug in them must keep its traceback.
    """
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    if made.__module__.partition(".")[0] in ("sparsekv_pl", "data", "callbacks"):
        return made(*args, **settings)
    refusals = (ValueError, TypeError, AssertionError, ArithmeticError, RuntimeError, MisconfigurationException)
    try:
        return made(*args, **settings)
    except refusals as error:
        given = ", ".join(f"{name}={_shown(value)}" for name, value in settings.items())
        reason = str(error) or _assertion_meaning(made)
        raise ValueError(f"{made.__name__}({given}) is refused: {reason}") from error


def _assertion_meaning(made: type) -> str:
    """The meaning of an assertion without a message."""
    if made.__module__.startswith("kvpress"):
        return "it takes a press that scores (kvpress.ScorerPress) and no other"
    return "an assertion failed"


def _imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name, None)


def _hints(made: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(made.__init__)  # type: ignore[misc]
    except (NameError, TypeError):  # names that a library imports only for type checkers
        return {}


def _parts(hint: Any) -> Iterator[Any]:
    yield hint
    for part in typing.get_args(hint):
        yield from _parts(part)


def _dataclasses(hint: Any) -> list[Any]:
    return [part for part in _parts(hint) if inspect.isclass(part) and dataclasses.is_dataclass(part)]


def _takes_null(hint: Any) -> bool:
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return hint in (Any, None, types.NoneType) or (is_union and types.NoneType in typing.get_args(hint))


def _joined(key: str, name: str) -> str:
    """The dotted path as on a command line: without init_args."""
    return key if name == "init_args" and key else f"{key}.{name}" if key else name


def _meant(default: Any) -> str:
    return "" if default is inspect.Parameter.empty or not isinstance(default, int | float | str) else f" for {default}"


def _shown(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
