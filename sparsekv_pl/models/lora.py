"""Low-rank adapters: inject them into a model, or load exported ones."""

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from sparsekv_pl.models.decoder import decoder_of
from sparsekv_pl.models.weight_match import check_adapter_keys, check_adapts, check_head

if TYPE_CHECKING:
    from peft import PeftConfig

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass
class Lora:
    """Low-rank adapters (LoRA, https://arxiv.org/abs/2106.09685) through peft.

    Raises ``ValueError`` for a setting out of range.

    Parameters
    ----------
    r
        Rank, at least 1.
    alpha
        The adapter's output is scaled by alpha / r; above 0.
    targets
        Names of the decoder's layers that get an adapter.
    dropout
        Dropout on the adapter's input, in [0, 1). 0 by default: SnapKV and ExpectedAttention recompute queries when
        they score, and with dropout these would differ from the model's own.
    """

    r: int = 16
    alpha: int = 32
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if not self.targets or not all(self.targets):
            raise ValueError(f"lora.targets={list(self.targets)} must name at least one layer, such as q_proj")
        if self.r < 1:
            raise ValueError(f"lora.r={self.r} must be at least 1")
        if self.alpha <= 0:
            raise ValueError(f"lora.alpha={self.alpha} must be above 0: the adapter's output is scaled by alpha / r")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout={self.dropout} must be in [0, 1)")


def inject_lora(model: PreTrainedModel, lora: Lora, revision: str | None = None) -> PreTrainedModel:
    """Return ``model`` with new adapters in its decoder, not in vision or audio towers, nor in the head.

    ``revision`` is the base model's, saved in the adapter's config. Raises ``ValueError`` for targets that the decoder
    does not have.
    """
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    from sparsekv_pl.models.cpu_kernels import quicken

    decoder = decoder_of(model)
    names = {name.rsplit(".", 1)[-1] for name, _ in decoder.named_modules()} | {"lm_head"}  # refused below, by name
    missing = sorted(set(lora.targets) - names)
    if missing:
        linear = sorted({n.rsplit(".", 1)[-1] for n, m in decoder.named_modules() if isinstance(m, torch.nn.Linear)})
        raise ValueError(
            f"lora.targets {missing} are not in the decoder of {type(model).__name__}; its linear layers are {linear}"
        )
    if getattr(model, "is_loaded_in_4bit", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        target_modules=list(lora.targets),
        exclude_modules=_beside(model, decoder, lora.targets),
        revision=revision,
        lora_dropout=lora.dropout,
        task_type="CAUSAL_LM",
    )
    on_meta = model.device.type == "meta"
    try:
        adapted = get_peft_model(model, config, low_cpu_mem_usage=on_meta)
    except ValueError as error:
        raise ValueError(f"lora.targets={list(lora.targets)}: {_in_a_line(error)}") from error
    check_head(model, f"lora.targets={list(lora.targets)}")
    if not on_meta:
        quicken(adapted)
    return adapted  # type: ignore[return-value]


def _beside(model: PreTrainedModel, decoder: torch.nn.Module, targets: Collection[str]) -> str | None:
    """Return a pattern of the parts of ``model`` outside its decoder that have modules named in ``targets``, or None.

    A vision tower's layers have the same names; its adapters would be exported untrained.
    """
    names = {id(module): name for name, module in model.named_modules()}
    inside = names.get(id(decoder), "").split(".")
    parts = set()
    for name in names.values():
        path = name.split(".")
        if path[-1] in targets and path[-1] != "lm_head" and path[: len(inside)] != inside:
            shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(path, inside, strict=False)))
            parts.add(".".join(path[: shared + 1]))
    return "|".join(rf"{re.escape(part)}(\..*)?" for part in sorted(parts)) or None


def adapter_settings(adapter: str) -> "PeftConfig":
    """Read the settings of the adapter in folder ``adapter``, and check all that can be checked without its model.

    Raises ``ValueError`` if there is no adapter, if it is damaged or has numbers that are not finite, and if it is of a
    kind that would have no effect.
    """
    from peft import PeftConfig

    folder = Path(adapter).expanduser()
    if not folder.is_dir():
        raise ValueError(f"adapter={adapter!r}: there is no such folder; give one that a training run exported")
    for name in (SETTINGS, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"adapter={adapter!r} has no {name}: give a folder that a training run exported")
    with _damage_named(adapter):
        _check_finite(folder / WEIGHTS)
        config = PeftConfig.from_pretrained(str(folder))
    if config.is_prompt_learning:
        raise ValueError(
            f"adapter={adapter!r} is of type {config.peft_type}, which puts tokens before the prompt and changes no "
            "layer: the decoder alone is run here, so it would do nothing. Give a LoRA"
        )
    return config


def load_adapter(model: PreTrainedModel, adapter: str, config: "PeftConfig", trainable: bool) -> PreTrainedModel:
    """Return ``model`` with the adapter in folder ``adapter``; its weights train if ``trainable``.

    ``config`` is ``adapter_settings(adapter)``. Raises ``ValueError`` for weights that do not fit the model, and if the
    adapter would have no effect or only a part of it.
    """
    from peft import get_peft_model

    from sparsekv_pl.models.cpu_kernels import quicken

    folder = Path(adapter).expanduser()
    config.inference_mode = not trainable
    config.base_model_name_or_path = None  # peft warns of a name that is not this machine's folder
    on_meta = model.device.type == "meta"
    with _damage_named(adapter):
        adapted = get_peft_model(model, config, low_cpu_mem_usage=on_meta)
        found = None if on_meta else adapted.load_adapter(str(folder), "default", is_trainable=trainable)
    if found is not None:
        check_adapter_keys(adapter, found.missing_keys, found.unexpected_keys)
        adapted.train(trainable)
        quicken(adapted)
    check_adapts(model, adapter)
    check_head(model, f"adapter={adapter!r}")
    return adapted  # type: ignore[return-value]


@contextmanager
def _damage_named(adapter: str) -> Iterator[None]:
    """Turn the various errors of peft, safetensors and torch for a damaged file into a ``ValueError``."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"adapter={adapter!r} cannot be loaded: {_in_a_line(error)}; give a whole folder that a training run of "
            "this model exported"
        ) from error


def _check_finite(weights: Path) -> None:
    with safe_open(weights, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  not a mapping
            if not torch.isfinite(file.get_tensor(name)).all():
                raise ValueError(f"{WEIGHTS}: {name} holds NaN or infinity")


def _in_a_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return f"{kind}{text if len(text) <= 300 else f'{text[:300]}...'}".rstrip(".:")
