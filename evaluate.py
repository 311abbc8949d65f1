"""Evaluate: python evaluate.py test --config configs/evaluate/quickstart.yaml; run again, it goes on where it was."""

from sparsekv_pl.cli import CommandLine, SaveEvaluationConfig, run


class EvaluateCommandLine(CommandLine):
    """test (measures) and predict (analyses)."""

    commands = ("test", "predict")


if __name__ == "__main__":
    run(
        lambda: EvaluateCommandLine(
            save_config_callback=SaveEvaluationConfig,
            save_config_kwargs={"save_to_log_dir": False},
            seed_everything_default=0,
        )
    )
