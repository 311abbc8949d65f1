"""Two ranks write the report that one process writes."""

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

from kvpress import KnormPress, SnapKVPress
from lightning.pytorch.strategies import DDPStrategy

from sparsekv_pl.evaluation.evaluation_module import EvaluationModule, Setting
from tests.tiny_training import MakeBackbone, MakeCases, MakeTrainer


def test_two_ranks_count_every_case_once(
    tiny_backbone: MakeBackbone, tiny_cases: MakeCases, tiny_trainer: MakeTrainer, tmp_path: Path
) -> None:
    """Two batches of text and one of needles: one rank has nothing to do in the last turn."""

    def rows(folder: str, **settings: Any) -> list[dict[str, Any]]:
        points = [Setting(SnapKVPress(window_size=8), [0.5]), Setting(KnormPress(), [0.5])]
        module = EvaluationModule(tiny_backbone(), points, str(tmp_path / folder))
        tiny_trainer(**settings).test(module, tiny_cases(windows=4, depths=[0.2, 0.8], cases_per_cell=1), verbose=False)
        return json.loads((tmp_path / folder / "report.json").read_text())["rows"]

    alone = rows("alone")
    assert [row["cases"] for row in alone] == [2, 4] * 3
    # Ranks that wait for each other fail soon.
    strategy = DDPStrategy(process_group_backend="gloo", start_method="forkserver", timeout=timedelta(minutes=2))
    assert rows("two", strategy=strategy, devices=2) == alone
