"""What tests of training share: types of the tiny fixtures, an objective, an optimizer, what trains."""

from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import AdamW

from data.evaluation import EvaluationData
from data.mixture import EvictionData
from sparsekv_pl.models.backbone import Backbone
from sparsekv_pl.objectives import EIT, Mixed, SelectionObjective

MakeAdapter = Callable[..., str]
MakeBackbone = Callable[..., Backbone]
MakeCases = Callable[..., EvaluationData]
MakeData = Callable[..., EvictionData]
MakeTrainer = Callable[..., Trainer]


def mixed() -> Mixed:
    return Mixed([EIT(temperature=2.0), SelectionObjective()], [1.0, 0.5])


def adamw(parameters: Any) -> AdamW:
    return AdamW(parameters, lr=1e-2)


def trained(module: LightningModule) -> dict[str, Tensor]:
    """Copies of the parameters that train, by name."""
    return {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}
