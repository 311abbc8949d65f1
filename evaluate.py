"""Evaluate: python evaluate.py test --config configs/evaluate/quickstart.yaml. A second run continues the first."""

from callbacks.progress_lines import progress
from callbacks.stopping import Stopping
from sparsekv_pl.cli.command_line import CommandLine, run
from sparsekv_pl.cli.saved_config import SaveEvaluationConfig


class EvaluateCommandLine(CommandLine):
    """The commands test (measurements) and predict (analyses)."""

    commands = ("test", "predict")
    reports = True
    progress = staticmethod(progress)
    always = (Stopping,)

    def before_instantiate_classes(self) -> None:
        """Refuse --ckpt_path: evaluate.py loads exported adapters, not checkpoints."""
        super().before_instantiate_classes()
        if (path := self._get(self.config, "ckpt_path")) is not None:
            raise ValueError(f"ckpt_path is {path}: set model.backbone.adapter to the training's export instead")


if __name__ == "__main__":
    run(
        lambda: EvaluateCommandLine(
            save_config_callback=SaveEvaluationConfig,
            save_config_kwargs={"save_to_log_dir": False},
            seed_everything_default=0,
        )
    )
