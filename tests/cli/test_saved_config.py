"""Where a run's configuration is saved: never over one that somebody wrote."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from jsonargparse import Namespace

from sparsekv_pl.cli.saved_config import SaveEvaluationConfig, SaveRunConfig


@pytest.mark.parametrize(("kind", "name"), [(SaveRunConfig, "config.yaml"), (SaveEvaluationConfig, "evaluation.yaml")])
def test_a_configuration_that_a_user_wrote_is_not_replaced(
    kind: type[SaveRunConfig], name: str, tmp_path: Path
) -> None:
    """Runs without a name and a logger save theirs beside it."""
    trainer: Any = SimpleNamespace(log_dir=None, default_root_dir=str(tmp_path), is_global_zero=False)
    trainer.strategy = SimpleNamespace(broadcast=lambda value: value)
    module: Any = SimpleNamespace(output=tmp_path)
    callback: Any = kind(None, Namespace())  # type: ignore[arg-type]
    (tmp_path / name).write_text("# my notes\nname: first\n")
    with pytest.raises(ValueError, match=f"{tmp_path}/{name} is a configuration that you wrote"):
        callback.setup(trainer, module, "fit")
    for saved in ("# lightning.pytorch==2.6.6\nname: first\n", ""):
        (tmp_path / name).write_text(saved)
        callback.setup(trainer, module, "fit")
