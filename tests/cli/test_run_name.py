"""Values that follow from --name, --report and --trainer.max_steps."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import Namespace

from evaluate import EvaluateCommandLine
from sparsekv_pl.cli.command_line import CommandLine, run
from train import TrainCommandLine

CONFIGS = Path(__file__).parents[2] / "configs"
MODEL = "model.init_args."
ROOT, LOGS, OUTPUT = "trainer.default_root_dir", "trainer.logger.init_args.save_dir", f"{MODEL}output"
ADAPTER, TOTAL = f"{MODEL}backbone.adapter", f"{MODEL}lr_scheduler.init_args.total_steps"


class Parsed(Exception):
    """Carries the settings of the objects that would be made."""


@pytest.fixture(autouse=True)
def nothing_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(_self: CommandLine, _settings: Namespace, command: Namespace) -> None:
        raise Parsed(command)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pytest"])
    monkeypatch.setattr(CommandLine, "_make", stop)


def line_of(config: str, *arguments: str) -> Callable[[], CommandLine]:
    """The command line that runs ``config``."""
    line: type[CommandLine] = EvaluateCommandLine if config.startswith(("evaluate", "analyze")) else TrainCommandLine
    command = {"evaluate": "test", "analyze": "predict"}.get(config.partition("/")[0], "fit")
    args = [command, "--config", str(CONFIGS / f"{config}.yaml"), *arguments]
    return lambda: line(args=args, save_config_callback=None)


def made_of(config: str, *arguments: str) -> Namespace:
    """The settings with which ``config``'s objects would be made."""
    with pytest.raises(Parsed) as end:
        line_of(config, *arguments)()
    return end.value.args[0]


@pytest.mark.parametrize(
    ("config", "arguments", "expected"),
    [
        ("quickstart", [], {ROOT: "output/quickstart", LOGS: "output/quickstart"}),
        ("quickstart", ["--name=first"], {ROOT: "output/first", LOGS: "output/first"}),
        ("quickstart", ["--name=/else/where"], {ROOT: "/else/where", LOGS: "/else/where"}),
        ("train/gate", ["--name=a/b"], {ROOT: "output/a/b", LOGS: "output/a/b"}),
        ("quickstart", ["--trainer.default_root_dir=x"], {ROOT: "x", LOGS: "x"}),
        ("quickstart", ["--trainer.default_root_dir=x", "--trainer.logger.save_dir=y"], {ROOT: "x", LOGS: "y"}),
        ("quickstart", ["--name=null", "--trainer.logger=null"], {ROOT: None}),
        ("quickstart", ["--trainer.logger=false"], {ROOT: "output/quickstart", "trainer.logger": False}),
        ("quickstart", ["--trainer.logger=lightning.pytorch.loggers.CSVLogger"], {LOGS: "output/quickstart"}),
        (
            "evaluate/quickstart",
            ["--name=first"],
            {OUTPUT: "output/first", LOGS: "output/first/evaluation", ADAPTER: "output/first/final"},
        ),
        (
            "evaluate/retention",
            ["--name=first"],
            {
                OUTPUT: "output/first/retention",
                LOGS: "output/first/retention",
                ROOT: "output/first/retention",
                ADAPTER: "output/first/final",
            },
        ),
        ("evaluate/niah", [], {OUTPUT: "output/niah", LOGS: "output/niah", ADAPTER: None}),
        (
            "evaluate/niah",
            ["--name=first", "--model.backbone.adapter=checkpoint-46", "--report=other"],
            {OUTPUT: "output/first/other", ADAPTER: "output/first/checkpoint-46"},
        ),
        (
            "evaluate/quickstart",
            ["--model.output=x", "--model.backbone.adapter=y/final"],
            {OUTPUT: "x", LOGS: "x/evaluation", ADAPTER: "y/final"},
        ),
        ("evaluate/retention", ["--model.backbone.adapter=null"], {ADAPTER: None}),
        ("evaluate/hosted", ["--name=first"], {OUTPUT: "output/first/hosted"}),
        ("analyze/anchors", ["--name=first"], {OUTPUT: "output/first/anchors", "trainer.logger": False}),
        ("analyze/sketchwalk", [], {OUTPUT: "output/sketchwalk"}),
    ],
)
def test_a_name_is_said_once(config: str, arguments: list[str], expected: dict[str, Any]) -> None:
    settings = made_of(config, *arguments)
    assert {key: settings.get(key) for key in expected} == expected


def test_a_home_folder_is_meant_by_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shell expands none in ``--name=~/...``."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    run, report = str(tmp_path / "home/run"), str(tmp_path / "home/report")
    settings = made_of("quickstart", "--name=~/run")
    assert (settings.get(ROOT), settings.get(LOGS)) == (run, run)
    settings = made_of("evaluate/niah", "--name=~/run", "--model.backbone.adapter=final", "--report=~/report")
    assert (settings.get(ADAPTER), settings.get(OUTPUT), settings.get(ROOT)) == (f"{run}/final", report, report)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], 92),
        (["--trainer.max_steps=40"], 40),
        (["--trainer.max_steps=40", "--model.lr_scheduler.total_steps=60"], 60),
        (["--model.lr_scheduler=torch.optim.lr_scheduler.ExponentialLR", "--model.lr_scheduler.gamma=0.9"], None),
        (["--model.lr_scheduler.epochs=2", "--model.lr_scheduler.steps_per_epoch=9"], None),
    ],
)
def test_a_learning_rate_schedule_lasts_as_long_as_the_run(arguments: list[str], expected: int | None) -> None:
    assert made_of("quickstart", *arguments).get(TOTAL) == expected


COSINE = "--model.lr_scheduler=sparsekv_pl.training.cosine_schedule.CosineSchedule"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [([], 92), (["--trainer.max_steps=40"], 40), (["--model.lr_scheduler.T_max=30"], 30)],
)
def test_a_cosine_lasts_as_long_as_the_run_and_a_shorter_one_is_warned_of(
    arguments: list[str], expected: int, caplog: pytest.LogCaptureFixture
) -> None:
    schedule = made_of("quickstart", COSINE, *arguments)[f"{MODEL}lr_scheduler.init_args"]
    assert schedule.T_max == expected
    assert ("the learning rate rises again after step 30" in caplog.text) == (expected == 30)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([COSINE, "--trainer.max_steps=-1"], "T_max follows trainer.max_steps, which is -1: give either"),
        (
            ["--model.lr_scheduler.total_steps=40"],
            "total_steps is 40, and trainer.max_steps 92: training would stop",
        ),
        (["--trainer.max_steps=-1"], "total_steps follows trainer.max_steps, which is -1: give either"),
        (["--name="], "name is empty"),
        (["--name=null", "--model.backbone.adapter=final"], "adapter is final: of which run"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        run(line_of("quickstart", *arguments))


@pytest.mark.parametrize("config", ["quickstart", "evaluate/retention"])
def test_what_is_printed_and_saved_names_the_run_once(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        line_of(config, "--name=first", "--print_config")()
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["name"] == "first" and printed.count("first") == 1
    saved = tmp_path / "config.yaml"
    saved.write_text(printed)
    again = made_of(config, f"--config={saved}", "--name=second", "--trainer.max_steps=7")
    assert again.get(ROOT).startswith("output/second") and again.get(LOGS).startswith("output/second")
    assert again.get(TOTAL) in (7, None)


def test_every_config_says_its_name_once() -> None:
    repeating = {"default_root_dir", "save_dir", "output", "total_steps"}
    configs = {path: path.read_text().splitlines() for path in CONFIGS.rglob("*.yaml")}
    said = {path: yaml.safe_load("\n".join(lines)) for path, lines in configs.items()}
    named = [path for path, config in said.items() if {"name", "report"} & config.keys()]
    assert len(named) == 43
    for path in named:
        settings = [line for line in configs[path] if not line.lstrip().startswith("#")]
        assert not repeating & {line.partition(":")[0].strip() for line in settings}, path
        assert not [
            name for name in (said[path].get("name"), said[path].get("report")) if f"output/{name}" in str(settings)
        ]
