"""The precision of a run: a default for this machine, and checks that it can work."""

from collections.abc import Mapping
from pkgutil import resolve_name
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import Precision
from lightning.pytorch.utilities import rank_zero_info

from sparsekv_pl.models.native_precision import AUTO, decide, warn_of_emulation


def decide_settings(settings: Namespace, trains: bool) -> None:
    """Fill in a precision and a dtype that were left out, as ``decide`` chooses them, and print the decision.

    ``settings`` are a command's, resolved; ``trains`` is True for training. Without a backbone there is no model to
    run, and Lightning's default stays.

    Raises
    ------
    ValueError
        For float16 on a CPU, where Lightning would use bfloat16 instead.
    """
    trainer, plugin = settings.trainer, _plugin(settings.trainer.get("plugins"))
    asked, accelerator = trainer.get("precision"), trainer.get("accelerator")
    backbone = settings.model.get("init_args", {}).get("backbone") or Namespace()
    decision = decide(
        asked if plugin is None else plugin.get("precision", "32-true"),
        backbone.get("dtype", AUTO),
        accelerator=accelerator if isinstance(accelerator, str) else "auto",
        every_weight=trains and backbone.get("lora") is None and backbone.get("adapter") is None,
        sharded=backbone.get("sharded", False),
    )
    if str(asked) in ("16", "16-mixed") and decision.device == "cpu":
        raise ValueError(
            f"precision={asked} would become bf16-mixed, as Lightning has no float16 for a CPU: leave precision out, "
            "or give bf16-mixed or 32-true; to try the float16 path there, leave precision out and set plugins to a "
            "lightning.pytorch.plugins.MixedPrecision with precision 16-mixed and device cpu"
        )
    if not backbone:
        return
    if plugin is None:
        trainer.precision = decision.precision
    backbone.dtype = decision.dtype
    rank_zero_info(str(decision))


def check_precision(trainer: Trainer, module: LightningModule) -> None:
    """Raise ``ValueError`` for a precision in which training would fail; warn of one that the device emulates.

    Called once the parameters have the dtype and the device that they train in.
    """
    warn_of_emulation(trainer)
    half = [name for name, p in module.named_parameters() if p.requires_grad and p.dtype == torch.float16]
    if half:
        raise ValueError(
            f"{len(half)} parameters would train in float16 (the first is {half[0]}; trainer.precision="
            f"{trainer.precision}): AdamW's eps is 0 there and small gradients vanish. For float16 with a loss scaler "
            "give precision 16-mixed, and backbone.dtype float32 or bfloat16 where every weight trains"
        )


def _plugin(plugins: Any) -> Mapping[str, Any] | None:
    """Return the settings of the precision plugin among ``plugins``; None if there is none."""
    for plugin in plugins if isinstance(plugins, list) else [plugins]:
        if isinstance(plugin, Namespace) and issubclass(resolve_name(plugin.class_path), Precision):
            return (plugin.get("init_args") or Namespace()).as_dict()
    return None
