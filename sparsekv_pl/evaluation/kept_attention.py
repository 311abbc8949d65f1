"""The attention that a press keeps, and the most that as many pairs could hold, by layer and KV head."""

import torch

from sparsekv_pl.evaluation.case_view import kept_by
from sparsekv_pl.evaluation.measurement import Measurement
from sparsekv_pl.evaluation.points import Point
from sparsekv_pl.models.layer_kinds import evicted_layers
from sparsekv_pl.objectives.kept_mass import kept_and_most
from sparsekv_pl.presses.oracle import oracles_in
from sparsekv_pl.storage.records import Record

SINKS = 4
"""First tokens of a context that are left out, as in the selection loss: they would take most of the attention."""


def keeps_attention(point: Point) -> bool:
    """Whether ``point`` evicts from the context alone, leaves pairs whole, and does not know the continuation."""
    return point.press is not None and not (point.decoding or point.quantisation or oracles_in(point.press))


@torch.no_grad()
def kept_attention(measurement: Measurement, point: Point) -> Record:
    """Return the attention kept at ``point`` and the most that as many pairs hold, (layers, K) each, summed over rows.

    The attention is that which the continuation, text or a question with its answers, pays with the full cache of the
    same model, as ``OraclePress`` knows it. Raises ``ValueError`` for a press that changes pairs.
    """
    held = torch.stack(kept_by(measurement, point, range(len(measurement.batch["cases"]))))  # (B, layers, K, L)
    sums = []
    for row, layer in enumerate(evicted_layers(measurement.model.config)):
        mass = measurement.foreseen_mass[layer][..., SINKS:]
        found = kept_and_most(mass, held[:, row, :, SINKS:].to(mass.device), mass.shape[-1])
        sums.append(torch.stack(found).sum(1))
    kept, most = torch.stack(sums, dim=1).tolist()
    return {"kept_attention": kept, "most_attention": most}
