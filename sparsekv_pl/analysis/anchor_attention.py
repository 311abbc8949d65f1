"""Attention by token type, position, distance and head, and the anchors recommended from it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from sparsekv_pl.analysis.anchor_figures import anchor_figures
from sparsekv_pl.analysis.anchor_profile import GROUPS, LEADING, AnchorProfile, groups_of, profile_records
from sparsekv_pl.analysis.anchor_report import anchor_sections, anchor_summary, anchor_yaml
from sparsekv_pl.analysis.token_types import types_for
from sparsekv_pl.attention.received_attention import ReceivedAttention
from sparsekv_pl.evaluation.model_analysis import Analysis
from sparsekv_pl.eviction.prefill import continue_from
from sparsekv_pl.models.backbone import Backbone
from sparsekv_pl.models.batch import CaseBatch
from sparsekv_pl.models.layer_kinds import evicted_layers
from sparsekv_pl.reporting.analysis_page import write_analysis
from sparsekv_pl.reporting.console import show
from sparsekv_pl.storage.records import Record, grouped


class AnchorAnalysis(Analysis):
    """Measures attention by token type, position and head over a datamodule's contexts, and recommends anchors.

    Continuations are not read. Besides the report it writes ``anchors.yaml`` with the recommended anchors (of the
    trained model, if there is an adapter). Raises ``ValueError`` for a setting out of range.

    Parameters
    ----------
    backbone, output
        As in ``Analysis``.
    sinks
        Number of tokens at the start of a text that are listed as sinks, at most 16.
    carrying
        For each head, the share of tokens that carry this share of the attention is measured.
    threshold
        A position or type is recommended as an anchor if its attention is at least this multiple of chance.
    recent_mass
        The recommended number of recent tokens holds this share of the attention that is not on sinks.
    """

    def __init__(
        self,
        backbone: Backbone,
        output: str | None = None,
        sinks: int = 4,
        carrying: float = 0.8,
        threshold: float = 2.0,
        recent_mass: float = 0.5,
    ) -> None:
        if not 0 <= sinks <= LEADING:
            raise ValueError(
                f"sinks is {sinks}: only the first {LEADING} positions are measured one by one, give 0 to {LEADING}"
            )
        for name, value in {"carrying": carrying, "recent_mass": recent_mass}.items():
            if not 0 < value <= 1:
                raise ValueError(f"{name} is {value}: give a share of the attention above 0 and at most 1")
        if threshold <= 0:
            raise ValueError(f"threshold is {threshold}: give a multiple of chance above 0")
        super().__init__(backbone, output or "output/anchors")
        self.sinks, self.carrying, self.threshold, self.recent_mass = sinks, carrying, threshold, recent_mass

    def described(self) -> dict[str, Any]:
        """The settings that decide what is measured; sinks, threshold and recent_mass only decide the report."""
        return {"carrying": self.carrying}

    def measure(self, batch: CaseBatch) -> Sequence[Record]:
        """Measure a batch; return a record per context."""
        ids = batch["context_ids"]
        types = types_for(self.tokenizer).of(ids)
        records = profile_records(observed(self.causal_lm, ids, types), types, self.carrying)
        return [{"id": case.id, **record} for case, record in zip(batch["cases"], records, strict=True)]

    def write(self, records: list[Record], environment: dict[str, object]) -> list[Path]:
        """Write report, pictures and anchors.yaml; print the main figures; return the paths."""
        layers = evicted_layers(self.causal_lm.config)
        summaries = {
            variant: anchor_summary(AnchorProfile.of(found), self.sinks, self.threshold, self.recent_mass, layers)
            for variant, found in grouped(records, "variant").items()
        }
        snippet = anchor_yaml(list(summaries.values())[-1]["rule"]["anchors"])
        self._print(summaries, snippet)
        lengths = sorted({record["length"] for record in records})
        content = {"sinks": self.sinks, "carrying": self.carrying, "lengths": lengths, "variants": summaries}
        return write_analysis(
            self.output,
            "Where attention rests, and the anchors that follow",
            anchor_sections(summaries, self.sinks, self.carrying),
            content,
            environment,
            anchor_figures(summaries, self.carrying),
            {"anchors.yaml": f"{snippet}\n".encode()},
        )

    def _print(self, summaries: dict[str, Any], snippet: str) -> None:
        for variant, summary in summaries.items():
            shown = [row for row in summary["types"] if row["times_chance"] is not None]
            times = ", ".join(f"{row['type']} {row['times_chance']:.2f}" for row in shown)
            show(f"{variant}, times chance: {times}")
        for kept in list(summaries.values())[-1]["rule"]["kept"]:
            show(
                f"{kept['name']}: {kept['attention']:.1%} of the attention, "
                f"{kept['tokens_at_the_end']:.0f} tokens at a text's end"
            )
        show(f"recommended {snippet}")


def observed(model: PreTrainedModel, ids: Tensor, types: Tensor) -> ReceivedAttention:
    """Observe the attention that each layer's keys receive in one pass over unpadded ``ids`` (B, S).

    ``types`` (B, S) are the tokens' types, as ``TokenTypes.of`` gives them.
    """
    observer = ReceivedAttention(groups_of(types), GROUPS)
    continue_from(model, ids, DynamicCache(), 0, observer=observer)
    return observer
