"""Which precisions can train here."""

import torch
from lightning.pytorch import LightningModule, Trainer


def check_precision(trainer: Trainer, module: LightningModule) -> None:
    """Raise ``ValueError`` for a precision that could only fail, or that the device does not have.

    Called once the parameters have the dtype and the device that they train in.
    """
    device = trainer.strategy.root_device
    if trainer.precision.startswith("bf16") and device.type == "cuda":
        with torch.cuda.device(device):
            if not torch.cuda.is_bf16_supported(including_emulation=False):
                raise ValueError(
                    f"trainer.precision={trainer.precision}: {torch.cuda.get_device_name(device)} does not compute in "
                    "bfloat16: give 16-mixed, or 32-true"
                )
    half = [name for name, p in module.named_parameters() if p.requires_grad and p.dtype == torch.float16]
    if half:
        raise ValueError(
            f"{len(half)} parameters would train in float16 (the first is {half[0]}; trainer.precision="
            f"{trainer.precision}): AdamW's eps is 0 there and small gradients vanish. For float16 with a loss scaler "
            "give precision 16-mixed, and backbone.dtype float32 or bfloat16 where every weight trains"
        )


def check_kept(asked: object, trainer: Trainer) -> None:
    """Raise ``ValueError`` where Lightning has put another precision in the place of the one that was ``asked`` for."""
    if str(asked) in ("16", "16-mixed") and trainer.precision != "16-mixed":
        raise ValueError(
            f"precision={asked} would become {trainer.precision}, as Lightning has no float16 for a CPU: give "
            "bf16-mixed or 32-true; to try the float16 path there, leave precision out and set plugins to a "
            "lightning.pytorch.plugins.MixedPrecision with precision 16-mixed and device cpu"
        )
