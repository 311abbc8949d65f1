"""Evaluate: python evaluate.py test --config configs/evaluate/quickstart.yaml."""

from sparsekv_pl.cli import CommandLine, run


class EvaluateCommandLine(CommandLine):
    """test (measures) and predict (analyses)."""

    commands = ("test", "predict")


if __name__ == "__main__":
    run(lambda: EvaluateCommandLine(save_config_callback=None, seed_everything_default=0))
