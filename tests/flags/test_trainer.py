"""Every flag of Lightning's Trainer and every callback of its works here, or is refused in one line."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer

from sparsekv_pl.training.eit_module import EITModule
from tests.flags.rows import CALLBACKS, FLAGS, Row
from tests.tiny_training import MakeData, MakeTrainer

TABLE = (Path(__file__).parents[2] / "docs" / "flags.md").read_text()
FLAG_ROWS = {f"{flag}-{n}": row for flag, rows in FLAGS.items() for n, row in enumerate(rows)}
CALLBACK_ROWS = {f"{name}-{n}": row for name, rows in CALLBACKS.items() for n, row in enumerate(rows)}


class Validations(Callback):
    """Counts batches of validation."""

    def __init__(self) -> None:
        self.batches = 0

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.batches += not trainer.sanity_checking


@pytest.fixture
def happens(module: Callable[..., EITModule], tiny_data: MakeData, tiny_trainer: MakeTrainer) -> Callable[..., None]:
    """Trains two steps with a row's settings and compares with what the row says."""

    def check(row: Row, *made: Callable[[], Callback]) -> None:
        counted = Validations()

        def fit() -> Trainer:
            trainer = tiny_trainer(*(make() for make in made), counted, **({"max_steps": 2} | row.settings))
            trainer.fit(module(), tiny_data())
            return trainer

        if row.says:
            with pytest.raises((ValueError, MisconfigurationException, ImportError), match=row.says) as refused:
                fit()
            assert "\n" not in str(refused.value)
        else:
            assert (fit().global_step, counted.batches) == (row.steps, row.validations)

    return check


@pytest.mark.parametrize("row", FLAG_ROWS.values(), ids=FLAG_ROWS.keys())
def test_a_flag_works_or_is_refused(row: Row, happens: Callable[..., None]) -> None:
    happens(row)


@pytest.mark.parametrize(("make", "row"), CALLBACK_ROWS.values(), ids=CALLBACK_ROWS.keys())
def test_a_callback_works_or_is_refused(make: Callable[[], Callback], row: Row, happens: Callable[..., None]) -> None:
    happens(row, make)


@pytest.mark.parametrize(
    ("rows", "there"),
    [(FLAGS, set(inspect.signature(Trainer).parameters)), (CALLBACKS, set(pl.callbacks.__all__))],  # type: ignore[attr-defined]
    ids=["flags", "callbacks"],
)
def test_none_is_left_out_here_or_in_the_documentation(rows: dict[str, Any], there: set[str]) -> None:
    assert set(rows) == there
    assert not [name for name in there if f"| {name} |" not in TABLE]
