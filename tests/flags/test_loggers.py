"""Numbers, pictures and settings reach every logger of a run, or are left out with a line; no secret does."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from kvpress import KnormPress
from lightning.pytorch.loggers import CSVLogger, Logger

from sparsekv_pl.cli.saved_config import SaveRunConfig
from sparsekv_pl.evaluation.evaluation_module import EvaluationModule
from sparsekv_pl.evaluation.points import Setting
from tests.tiny_training import MakeBackbone, MakeCases, MakeTrainer
from train import TrainCommandLine

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
SECRET = "hf_ThisIsNoTokenButLooksLikeOne42"


class Keeps(Logger):
    """As W&B's and without a folder: takes pictures by ``log_image``."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: dict[str, float] = {}
        self.pictures: dict[str, Any] = {}
        self.settings: dict[str, Any] = {}

    name = "keeps"
    version = "0"

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:  # noqa: ARG002
        self.numbers |= metrics

    def log_hyperparams(self, params: dict[str, Any], *_: Any, **__: Any) -> None:  # type: ignore[override]
        self.settings |= params

    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:  # noqa: ARG002
        self.pictures[key] = images[0]


def test_training_gives_all_loggers_what_they_take(
    tiny_models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py"])
    monkeypatch.setenv("HF_TOKEN", SECRET)
    own = yaml.safe_load(QUICKSTART.read_text())
    own["model"]["init_args"]["backbone"] |= {"pretrained": tiny_models["llama"], "dtype": "float32"}
    own.pop("name", None)  # default_root_dir says where
    csv = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(tmp_path / "csv")}}
    own["trainer"] |= {
        "default_root_dir": str(tmp_path / "run"),
        "accelerator": "cpu",
        "precision": "32-true",
        "max_steps": 1,
        "log_every_n_steps": 1,
        "limit_val_batches": 0,
        "enable_checkpointing": False,
        "logger": [{"class_path": "tests.flags.test_loggers.Keeps"}, csv],
        "callbacks": [
            own["trainer"]["callbacks"][0],
            {"class_path": "callbacks.anchor_analysis.AnchorAnalysisCallback"},
        ],
    }
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(own))
    with pytest.warns(UserWarning, match="CSVLogger does not take the picture anchors/layers"):
        made = TrainCommandLine(args=["fit", "--config", str(config)], save_config_callback=SaveRunConfig)
    keeps, written = made.trainer.loggers
    assert isinstance(keeps, Keeps)
    assert isinstance(written, CSVLogger)
    assert keeps.settings["model"]["init_args"]["backbone"]["pretrained"] == tiny_models["llama"]
    assert keeps.pictures["anchors/layers"].shape[2] == 3
    assert {"train/loss", "anchors/share_sinks"} <= set(keeps.numbers)
    assert "anchors/share_sinks" in (Path(written.log_dir) / "metrics.csv").read_text()
    assert "pretrained" in (Path(written.log_dir) / "hparams.yaml").read_text()
    assert "pretrained" in (tmp_path / "run" / "final" / "config.yaml").read_text()
    assert SECRET not in str(keeps.settings)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]


def test_evaluation_gives_all_loggers_numbers_and_pictures(
    tiny_backbone: MakeBackbone, tiny_cases: MakeCases, tiny_trainer: MakeTrainer, tmp_path: Path
) -> None:
    loggers = Keeps(), Keeps()
    module = EvaluationModule(tiny_backbone(), [Setting(KnormPress(), [0.5])], str(tmp_path / "out"))
    tiny_trainer(logger=list(loggers)).test(module, tiny_cases())
    for keeps in loggers:
        assert "base_full_cache_0_dense/perplexity" in keeps.numbers
        assert keeps.pictures["report"].dtype == "uint8"
