"""How much of the teacher's attention each press keeps in validation, with pictures by layer and KV head."""

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn

from sparsekv_pl.eviction.interface import Selection
from sparsekv_pl.eviction.request import NOTHING, Request
from sparsekv_pl.metrics import MassByHead
from sparsekv_pl.models.backbone import causal_lm
from sparsekv_pl.models.batch import Batch
from sparsekv_pl.models.cache_shape import cache_shape
from sparsekv_pl.models.decoder import decoder_of
from sparsekv_pl.objectives.attention_mass import with_mass
from sparsekv_pl.presses.nesting import scorer_names
from sparsekv_pl.reporting.ceiling_maps import reached_map
from sparsekv_pl.reporting.logged_terms import KEPT, MOST
from sparsekv_pl.reporting.loggers import log_picture
from sparsekv_pl.reporting.plots import pixels
from sparsekv_pl.training.student import Student

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule


log = logging.getLogger(__name__)

SCORES = Request(scores=True)


class ValidationMass(nn.Module):
    """The kept attention of every press of ``student``; measures nothing if its objective has no selection loss.

    The teacher's attention costs one more pass per batch. ``follow`` finds out, before anything is measured, whether a
    press's scores say what it keeps.
    """

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student
        press, self.loss = student.eviction.press, student.objective.selection_loss
        self.metrics = nn.ModuleDict()
        self.unfit = ""
        """Why nothing is measured, if the eviction's scores cannot be followed."""
        if press is not None and self.loss is not None:
            model = causal_lm(student.model)
            shape = len(decoder_of(model).layers), cache_shape(model.config).kv_heads
            self.metrics.update({name: MassByHead(*shape) for name in scorer_names(press)})

    def follow(self, lengths: Iterable[int]) -> None:
        """Measure if what the eviction keeps of contexts of ``lengths`` (tokens) can be followed; else log why not."""
        before, self.unfit = self.unfit, self._unfit(lengths) if self.metrics else ""
        if self.unfit and self.unfit != before:
            log.warning("validation does not measure how much attention its press keeps: %s", self.unfit)

    def _unfit(self, lengths: Iterable[int]) -> str:
        try:
            for tokens in lengths:
                self.student.eviction.check(tokens, SCORES)
        except ValueError as unfit:
            return str(unfit)
        return ""

    @property
    def request(self) -> Request:
        """What ``add`` needs of a validation's eviction."""
        return SCORES if self.metrics and not self.unfit else NOTHING

    def add(self, batch: Batch, selections: Iterable[Selection], again: bool) -> None:
        """Add a batch of equally long contexts; one that comes ``again`` runs, for sharded models, and is not added."""
        if self.loss is None or not self.request.scores:
            return
        mass = self.student.attention_mass(batch)
        self.student.teacher(batch["context_ids"], batch["continuation_ids"], mass)
        targets = self.loss.targets(() if again else with_mass(selections, mass.mass, mass.later))
        for one in self.loss.kept_mass(targets):
            self.metrics[one.press].update(one.layer, one.kept, one.most, one.weights)  # type: ignore[operator]

    def log(self, module: "LightningModule") -> None:
        """Log each press's means, and a picture of one over the other, and start again from zero. Collective."""
        for press, metric in () if self.unfit else self.metrics.items():
            found = metric.compute()  # type: ignore[operator]
            metric.reset()  # type: ignore[operator]
            if found["kept"].isnan():  # never drawn, or validation's ratio is 0
                continue
            logs = {f"val/{KEPT}/{press}": found["kept"], f"val/{MOST}/{press}": found["most"]}
            module.log_dict(logs, sync_dist=True)
            if not module.trainer.sanity_checking and module.trainer.is_global_zero and module.loggers:
                figure = reached_map(press, found["reached"].cpu().numpy())
                log_picture(module.loggers, f"val/reached/{press}", pixels(figure), module.global_step)
