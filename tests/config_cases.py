"""The keys of every config, random wrong values for them, and the expected refusals or accepted values."""

import copy
import math
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from data.mixture import EvictionData
from evaluate import EvaluateCommandLine
from sparsekv_pl.cli.command_line import CommandLine
from train import TrainCommandLine

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
ABLATIONS = CONFIGS / "train" / "ablations"
SMALL = CONFIGS / "train" / "small.yaml"
ROBUST = CONFIGS / "train" / "robust.yaml"
OVER = {
    **{CONFIGS / "train" / f"robust_{name}.yaml": ROBUST for name in ("8b", "keydiff", "long")},
    CONFIGS / "evaluate" / "robust_64k.yaml": CONFIGS / "evaluate" / "million.yaml",
    **{
        CONFIGS / "evaluate" / f"robust_{name}.yaml": CONFIGS / "evaluate" / "robust.yaml"
        for name in ("lengths", "ruler", "distractors", "ceiling")
    },
}
"""Files that go over one other file."""

EVALUATED = ("evaluate", "analyze")
"""Folders under configs/ that evaluate.py reads; train.py reads all others."""

NO_CLASS = ["nonsense", "kvpress.NoSuchPress", "os.path.join", "datetime.datetime", "no.such.module.Class", ""]
NO_SETTINGS: list[Any] = ["many", [1, 2], True, 3.7, -7, math.nan, None, [None]]
NO_NUMBER: list[Any] = ["many", [1, 2], {"nonsense": 1}, math.nan, math.inf, -math.inf, 10**30, "", [None], -7]
ANYTHING: list[Any] = ["many", [1, 2], {"nonsense": 1}, True, None, 3.7, -7, 0, math.nan, math.inf, 10**30, "", [], "3"]
NEGATIVE = {"max_steps", "max_epochs", "num_sanity_val_steps", "version", "seed_everything", "seed"}
"""Numbers for which -1 or every integer means something, or of which Lightning names the key itself."""
STRUCTURE = {"class_path", "init_args"}


class Case(NamedTuple):
    """A key of a config, and the files that its config goes over."""

    config: Path
    below: tuple[Path, ...]
    path: tuple[str | int, ...]
    value: Any

    @property
    def names(self) -> list[str]:
        return [str(part) for part in self.path if isinstance(part, str) and part not in STRUCTURE]


def instantiate(path: Path, *overrides: str, over: Sequence[Path] = ()) -> CommandLine:
    evaluated = path.relative_to(CONFIGS).parts[0] in EVALUATED
    command_line = EvaluateCommandLine if evaluated else TrainCommandLine
    configs = [argument for file in (path, *over) for argument in ("--config", str(file))]
    return command_line(args=[*configs, *overrides], run=False, save_config_callback=None)


def check_training(made: CommandLine) -> None:
    """What every training config must have right."""
    assert isinstance(made.datamodule, EvictionData)
    assert made.trainer.max_steps > 0
    assert made.trainer.max_epochs == -1  # else a finished run could not be given more steps
    if hasattr(made.model, "eviction"):
        made.model.eviction.check(made.datamodule.context_tokens)
    optimizers = made.model.configure_optimizers()
    if isinstance(optimizers, dict):
        schedule = optimizers["lr_scheduler"]["scheduler"]
        assert getattr(schedule, "total_steps", made.trainer.max_steps) >= made.trainer.max_steps


def make_text_files(config: Path) -> None:
    """Make the text files that ``config`` names, empty, relative to the working folder."""
    for name in (name for names in re.findall(r"paths: \[(.+)\]", config.read_text()) for name in names.split(", ")):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()


def shipped() -> Iterator[tuple[Path, tuple[Path, ...]]]:
    for path in sorted(CONFIGS.rglob("*.yaml")):
        if path.parent == ABLATIONS:
            below = (CONFIGS / "quickstart.yaml", *([] if path.stem == "base" else [ABLATIONS / "base.yaml"]))
            yield path, below
        elif path == SMALL:
            yield path, (CONFIGS / "train" / "mixed_8b.yaml",)
        elif path in OVER:
            yield path, (OVER[path],)
        elif path.parent.name not in ("lm_eval_tasks", "cluster"):
            yield path, ()


def keys(node: Any, path: tuple[str | int, ...] = (), owner: str = "") -> Iterator[tuple[tuple[Any, ...], str, Any]]:
    """(path, what identifies the setting, value): the same setting of the same class is tried in one config."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for name, value in items:
        if isinstance(node, list) and not isinstance(value, dict | list):
            continue
        here = (*path, name)
        inside = f"{node['class_path']}:" if isinstance(node, dict) and "class_path" in node else owner
        setting = inside + ("" if isinstance(name, int) or name in STRUCTURE else f".{name}")
        if not isinstance(name, int):
            yield here, f"{setting} {name}", value
        yield from keys(value, here, setting)


def cases(seed: int) -> dict[str, Case]:
    """One config's key for every setting of every class, by what identifies it."""
    found: dict[str, Case] = {}
    for config, below in shipped():
        for path, setting, value in keys(yaml.safe_load(config.read_text())):
            found.setdefault(setting, Case(config, below, path, value))
    rng = random.Random(seed)
    return {
        setting: case
        for setting, case in found.items()
        if case.path[-1] not in STRUCTURE or rng.random() < 0.2  # all are handled alike, whatever the class
    }


def wrong(case: Case, rng: random.Random) -> tuple[str, Any, bool]:
    """(the key's name, its wrong value, whether it must be refused)."""
    name, value = case.path[-1], case.value
    if name == "class_path":
        return name, rng.choice(NO_CLASS), True
    if name in ("init_args", "trainer"):
        return name, rng.choice(NO_SETTINGS), True
    if rng.random() < 0.2 and "options" not in case.path:
        return f"{name}s", value, True
    if isinstance(value, int | float) and not isinstance(value, bool):
        drawn = rng.choice(NO_NUMBER)
        fine = (drawn == -7 and name in NEGATIVE) or (drawn == 10**30 and isinstance(value, float))
        return str(name), drawn, not fine
    return str(name), rng.choice(ANYTHING), False


def check(said: str, case: Case, name: str, value: Any) -> None:
    """One clear line, which names the key by its path, or by its name and value."""
    assert said.startswith("error: ") and "\n" not in said
    assert len(said) < 700
    assert not re.search(r"Traceback|Namespace\(|object at 0x|Union subtypes|functools|NoneType' object", said)
    names = [*case.names[:-1], name] if name not in STRUCTURE else case.names
    if ".".join(names) in re.sub(r"\[\d+\]", "", said):
        return
    if name != case.path[-1] or isinstance(value, dict):  # an unknown key, or one that is missing now
        assert any(text in said for text in (name, str(case.path[-1]), *(value if isinstance(value, dict) else ()))), (
            said
        )
        return
    if re.search(rf"are required: ([\w.]+\.)?{names[-1]}\b", said):
        return
    parts = value if isinstance(value, list) else [value]
    shown = {text for part in parts for text in (str(part), repr(part), "null" if part is None else repr(part))}
    shown |= {str(value)} | {str(float(part)) for part in parts if isinstance(part, int | float)}
    assert names[-1] in said and any(text in said for text in shown), said


def check_kept(settings: Any, case: Case, name: str, value: Any) -> None:
    """An accepted value is what the run has: not dropped, not another number, not a switch made of a word."""
    path = (*case.path[:-1], name)
    for part in path:
        if isinstance(settings, list) and not isinstance(part, int):
            settings = settings[0]  # one callback stands for a list of one
        settings = settings[part]
    assert same(value, settings), f"{'.'.join(map(str, path))} = {value!r} became {settings!r}"


def same(value: Any, kept: Any) -> bool:
    if isinstance(value, dict):
        return isinstance(kept, dict) and all(name in kept and same(value[name], kept[name]) for name in value)
    if isinstance(value, list):
        return isinstance(kept, list | tuple) and len(kept) == len(value) and all(map(same, value, kept))
    if value is None or isinstance(value, bool) or isinstance(kept, bool):
        return value is kept
    if isinstance(value, int | float) and isinstance(kept, int | float):
        return float(value) == float(kept)
    return str(value) == str(kept)


def replaced(case: Case, name: str, value: Any, local: Any) -> dict[str, Any]:
    config = local(yaml.safe_load(case.config.read_text()), case.path)
    inside = config
    for part in case.path[:-1]:
        inside = inside[part]
    del inside[case.path[-1]]
    inside[name] = copy.deepcopy(value)
    return config
