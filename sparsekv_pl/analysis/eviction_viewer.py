"""The eviction viewer: a page per case that shows what each press kept, and base beside trained in the terminal."""

from pathlib import Path
from typing import Any, ClassVar

from sparsekv_pl.analysis.side_by_side import side_by_side
from sparsekv_pl.evaluation.evaluation_module import EvaluationModule
from sparsekv_pl.evaluation.points import Setting
from sparsekv_pl.models.backbone import Backbone
from sparsekv_pl.reporting.console import show
from sparsekv_pl.reporting.file_formats import replace_all
from sparsekv_pl.storage.records import Record


class EvictionViewer(EvaluationModule):
    """Measures a few cases as ``EvaluationModule`` does and makes a page of each; it computes no scores over cases.

    Parameters
    ----------
    backbone, settings
        As in ``EvaluationModule``.
    output
        Folder for the pages and the finished work.
        Null: where the report's name says, else output/viewer.
    title
        Heading of the pages.
    views
        Most cases that get a page.
    """

    viewed_tokens: ClassVar[int | None] = None

    def __init__(
        self,
        backbone: Backbone,
        settings: list[Setting],
        output: str | None = None,
        title: str = "What the cache kept",
        views: int = 8,
    ) -> None:
        super().__init__(backbone, settings, output or "output/viewer", title, views=views)

    def write(self, records: list[Record], environment: dict[str, Any]) -> list[Path]:
        """Write the pages, print base beside trained for each case, and say that the pages are to be opened."""
        pages = self.pages(records, self.viewed.count)
        for case in dict.fromkeys(record["case"] for record in records if "case" in record):
            show(*side_by_side([record for record in records if record.get("case") == case]))
        paths = replace_all(self.output, {name: page for name, (_, page) in pages.items()})
        page = "this page" if len(paths) == 1 else "these pages"
        show(f"{environment['wall_seconds']:.0f} s. Open {page} in a browser: which tokens each layer and head kept.")
        return paths
