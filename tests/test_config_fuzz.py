"""Every key of every config with a random wrong value: refused in one line that names it, or accepted as valid."""

import functools
import logging
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import Trainer

from evaluate import EvaluateCommandLine
from sparsekv_pl.cli.command_line import CommandLine, run
from tests.config_cases import CONFIGS, ROBUST, ROOT, Case, cases, check, check_kept, make_text_files, replaced, wrong
from tests.processes import Started
from train import TrainCommandLine

SEED = 0
"""Another seed draws another wrong value for every key."""

CASES = cases(SEED)
PARSERS: dict[type[CommandLine], dict[str, Any]] = {}
setup_parser = CommandLine.setup_parser


@pytest.fixture(scope="module")
def local(tiny_models: dict[str, str], tiny_adapter: Callable[..., str]) -> Any:
    """Makes a config's models local."""
    folder = tiny_adapter(0)

    def localise(config: dict[str, Any], path: tuple[str | int, ...]) -> dict[str, Any]:
        settings = (config.get("model") or {}).get("init_args", {})
        backbone = settings.get("backbone", {})
        if "pretrained" in backbone:
            backbone |= {"pretrained": tiny_models["llama"], "load_in_4bit": False}
        if "placement" not in path:
            backbone.pop("placement", None)
        if backbone.get("adapter"):
            backbone["adapter"] = folder
        if "tokenizer" in settings:
            settings["tokenizer"] = tiny_models["llama"]
        if settings.get("gates") and "gates" not in path:
            settings["gates"] = None
        if settings.get("include_path"):
            settings["include_path"] = str(ROOT / settings["include_path"])
        if (config.get("trainer") or {}).get("accelerator") == "gpu":
            config["trainer"]["accelerator"] = "cpu"
        return config

    return localise


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is made, the optimizers too, but nothing runs; what an object writes lands outside the checkout."""

    @functools.wraps(Trainer.fit)  # the command line's options are read off its signature
    def fit(_trainer: Trainer, model: Any, **_: Any) -> None:
        model.configure_optimizers()

    @functools.wraps(Trainer.test)
    def test(*_: Any, **__: Any) -> None:
        pass

    monkeypatch.setattr(CommandLine, "setup_parser", parser_once)
    monkeypatch.setattr(Trainer, "fit", fit)
    monkeypatch.setattr(Trainer, "test", test)
    monkeypatch.setattr(sys, "argv", ["pytest"])
    monkeypatch.chdir(tmp_path)
    make_text_files(ROBUST)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def parser_once(made: CommandLine, *settings: Any) -> None:
    """Give every command line of a class the first one's parser: to build it takes as long as to parse most configs."""
    if type(made) not in PARSERS:
        before = set(vars(made))
        setup_parser(made, *settings)
        PARSERS[type(made)] = {name: value for name, value in vars(made).items() if name not in before}
    vars(made).update(PARSERS[type(made)])


def started(config: Path, *files: Path) -> Any:
    """The settings of the command, parsed."""
    evaluated = config.parent.name in ("evaluate", "analyze")
    arguments = ["test" if evaluated else "fit"]
    for file in files:
        arguments += ["--config", str(file)]
    command_line = EvaluateCommandLine if evaluated else TrainCommandLine
    made: list[Any] = []
    run(lambda: made.append(command_line(args=arguments, save_config_callback=None)))
    return made[0].config[arguments[0]].as_dict()


def tried(case: Case, config: dict[str, Any], folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[str, Any]:
    """(error line for the user, accepted settings); any other exception is a failure of the test."""
    section = case.path[0]
    files = []
    for number, content in enumerate([*(yaml.safe_load(path.read_text()) for path in case.below), config]):
        # Sections do not depend on each other: one alone is parsed in a fraction of the time.
        alone = {name: value for name, value in content.items() if name in (section, f"{section}s")}
        if "model" not in (section, *alone):
            alone["model"] = {"class_path": "lightning.pytorch.demos.boring_classes.BoringModel"}
        if section != "trainer":
            alone["trainer"] = {"max_steps": 100}  # the learning rate's schedule is as long
        files.append(folder / f"{number}.yaml")
        files[-1].write_text(yaml.safe_dump(alone, sort_keys=False))
    capsys.readouterr()
    try:
        return "", started(case.config, *files)
    except SystemExit as end:
        assert end.code not in (0, None)
        printed = capsys.readouterr().err.strip().splitlines()
        return end.code if isinstance(end.code, str) else printed[-1], None


def test_there_are_many_keys_and_every_config_has_some() -> None:
    assert len(CASES) > 200
    assert len({case.config for case in CASES.values()}) > 30


@pytest.mark.usefixtures("stage")
@pytest.mark.parametrize("setting", CASES)
def test_a_wrong_value_is_named_in_one_line(
    setting: str, local: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], record_property: Any
) -> None:
    case = CASES[setting]
    name, value, must = wrong(case, random.Random(f"{SEED} {setting}"))
    said, settings = tried(case, replaced(case, name, value, local), tmp_path, capsys)
    record_property("outcome", "refused" if said else "accepted")
    assert said or not must, f"{'.'.join(map(str, case.path))} = {name}: {value!r} is accepted"
    if said:
        check(said, case, name, value)
    else:
        check_kept(settings, case, name, value)


EXPLICIT = {
    "devices": (["--trainer.devices=-7", "--trainer.accelerator=cpu"], "trainer.devices is '?-7'?"),
    "precision": (["--trainer.precision=banana"], "trainer.precision: .*banana"),
    "steps": (["--trainer.max_steps=x"], "trainer.max_steps: .*x"),
    "strategy": (["--trainer.strategy=banana"], "trainer: .*banana"),
    "callback": (
        ['--trainer.callbacks=[{"class_path": "collections.OrderedDict"}]'],
        "trainer.callbacks: .*OrderedDict",
    ),
    "lr": (["--model.optimizer.init_args.lr=-1"], r"model.optimizer.lr is -1.0"),
    "betas": (["--model.optimizer.init_args.betas=[2, 3]"], r"AdamW\(.*betas=.* refused: Invalid beta"),
    "total_steps": (["--model.lr_scheduler.init_args.total_steps=0"], "model.lr_scheduler.total_steps is 0"),
    "rank": (["--model.backbone.lora.r=0"], "lora.r=0 must be at least 1"),
    "targets": (["--model.backbone.lora.targets=[nowhere]"], r"lora.targets \['nowhere'\] are not in"),
    "window": (
        ['--model.eviction.press={"class_path": "kvpress.SnapKVPress", "init_args": {"window_size": -1}}'],
        "model.eviction.press.window_size is -1: give 1 or more",
    ),
    "ratio": (
        ['--model.eviction.press={"class_path": "kvpress.SnapKVPress", "init_args": {"compression_ratio": 1.5}}'],
        r"SnapKVPress\(compression_ratio=1.5.* refused: Compression ratio must be between 0 and 1",
    ),
    "adapter": (["--model.backbone.adapter=/nowhere"], "adapter='/nowhere': there is no such folder"),
}
"""What is known only when an object is made."""


@pytest.mark.usefixtures("stage")
@pytest.mark.parametrize("mistake", EXPLICIT)
def test_what_an_object_refuses_is_one_line(
    mistake: str, tiny_models: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    options, message = EXPLICIT[mistake]
    arguments = ["fit", "--config", str(CONFIGS / "quickstart.yaml"), *options]
    arguments.append(f"--model.backbone.pretrained={tiny_models['llama']}")
    with pytest.raises(SystemExit) as end:
        run(lambda: TrainCommandLine(args=arguments, save_config_callback=None))
    printed = capsys.readouterr().err.strip().splitlines()
    said = end.value.code if isinstance(end.value.code, str) else printed[-1]
    assert re.search(message, said), said
    assert "\n" not in said and "Namespace(" not in said and len(said) < 500


@pytest.mark.usefixtures("stage")
def test_a_file_of_garbage_is_named_in_one_line(tmp_path: Path) -> None:
    garbage = tmp_path / "model.gguf"
    garbage.write_bytes(b"garbage" * 100)
    arguments = ["fit", "--config", str(CONFIGS / "quickstart.yaml"), f"--model.backbone.pretrained={garbage}"]
    arguments.append(f"--model.backbone.cache_dir={tmp_path}")
    with pytest.raises(SystemExit) as end:
        run(lambda: TrainCommandLine(args=arguments, save_config_callback=None))
    assert str(end.value.code).startswith(f"error: {garbage} is no whole GGUF file")
    assert "\n" not in str(end.value.code)


def test_the_real_process_prints_one_line_and_ends_with_an_error(tmp_path: Path) -> None:
    config = yaml.safe_load((CONFIGS / "quickstart.yaml").read_text())
    config["trainer"]["callbacks"][0]["class_path"] = None
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(config))
    process = Started(["train.py", "fit", "--config", str(tmp_path / "wrong.yaml")], tmp_path / "log")
    assert process.wait() in (1, 2)
    assert process.printed.strip().splitlines()[-1] == (
        f"error: {tmp_path}/wrong.yaml: trainer.callbacks[0].class_path is null: give a class as package.module.Class"
    )
    assert "Traceback" not in process.printed
