"""Which tokens attention rests on, by type, position, distance and head, and the anchors that follow."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from sparsekv_pl.analysis.anchor_figures import anchor_figures
from sparsekv_pl.analysis.anchor_profile import GROUPS, LEADING, AnchorProfile, groups_of, profile_records
from sparsekv_pl.analysis.anchor_report import PICTURES, anchor_sections, anchor_summary, anchor_yaml
from sparsekv_pl.analysis.token_types import types_for
from sparsekv_pl.attention.received_attention import ReceivedAttention
from sparsekv_pl.evaluation.model_analysis import Analysis
from sparsekv_pl.eviction.prefill import continue_from
from sparsekv_pl.models.backbone import Backbone
from sparsekv_pl.models.batch import CaseBatch
from sparsekv_pl.reporting.analysis_page import write_analysis
from sparsekv_pl.reporting.console import show
from sparsekv_pl.reporting.sorted_records import VARIANTS
from sparsekv_pl.storage.records import Record


class AnchorAnalysis(Analysis):
    """Attention by token type, by position and by head over the contexts of a datamodule, and a recommended rule.

    Continuations are not read. Beside the report it writes ``anchors.yaml``, the recommended anchors of the model that
    is used (trained, where there is an adapter).

    Parameters
    ----------
    backbone, output
        As in ``Analysis``.
    sinks
        So many tokens at the start of a text are told apart as sinks, up to 16.
    carrying
        Of each head: the share of tokens that carry this share of the attention.
    threshold
        A position or type is recommended as an anchor if it gets so many times the attention that chance gives.
    recent_mass
        So many recent tokens are recommended as hold this share of the attention that is not on sinks.
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
                f"sinks is {sinks}: only the first {LEADING} positions are told apart, give 0 to {LEADING}"
            )
        for name, value in {"carrying": carrying, "recent_mass": recent_mass}.items():
            if not 0 < value <= 1:
                raise ValueError(f"{name} is {value}: give a share of the attention above 0 and at most 1")
        if threshold <= 0:
            raise ValueError(f"threshold is {threshold}: give a multiple of chance above 0")
        super().__init__(backbone, output or "output/anchors")
        self.sinks, self.carrying, self.threshold, self.recent_mass = sinks, carrying, threshold, recent_mass

    def described(self) -> dict[str, Any]:
        """Sinks, threshold and recent_mass decide what is written, not what is measured."""
        return {"carrying": self.carrying}

    def measure(self, batch: CaseBatch) -> Sequence[Record]:
        """A record for each context."""
        ids = batch["context_ids"]
        types = types_for(self.tokenizer).of(ids)
        records = profile_records(observed(self.causal_lm, ids, types), types, self.carrying)
        return [{"id": case.id, **record} for case, record in zip(batch["cases"], records, strict=True)]

    def write(self, records: list[Record], environment: dict[str, object]) -> list[Path]:
        """Report, pictures and anchors.yaml."""
        own = {variant: [r for r in records if r["variant"] == variant] for variant in VARIANTS}
        summaries = {
            variant: anchor_summary(AnchorProfile.of(found), self.sinks, self.threshold, self.recent_mass)
            for variant, found in own.items()
            if found
        }
        snippet = anchor_yaml(list(summaries.values())[-1]["rule"]["anchors"])
        self._say(summaries, snippet)
        pictures = anchor_figures(summaries, self.carrying)
        lengths = sorted({record["length"] for record in records})
        content = {"sinks": self.sinks, "carrying": self.carrying, "lengths": lengths, "variants": summaries}
        return write_analysis(
            self.output,
            "Where attention rests, and the anchors that follow",
            anchor_sections(summaries, self.sinks, self.carrying),
            content,
            environment,
            {f"{name}.png": (PICTURES[name], figure) for name, figure in pictures.items()},
            {"anchors.yaml": f"{snippet}\n".encode()},
        )

    def _say(self, summaries: dict[str, Any], snippet: str) -> None:
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
    """What each layer's keys receive in one pass over ``ids`` (B, S), unpadded, whose types (B, S) are known."""
    observer = ReceivedAttention(groups_of(types), GROUPS)
    continue_from(model, ids, DynamicCache(), 0, observer=observer)
    return observer
