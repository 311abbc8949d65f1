"""A key of finished work holds all that decides the outcome and nothing else: every press, setting and module."""

import copy
import importlib
import inspect
import json
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import kvpress
import pytest
import torch
from kvpress import BasePress, KnormPress, SnapKVPress, TOVAPress

import sparsekv_pl.presses
from data.cases import Frame
from sparsekv_pl.models.backbone import Backbone
from sparsekv_pl.models.placement import Placement
from sparsekv_pl.storage.result_keys import settings_of

NEEDED: dict[str, Any] = {
    "press": KnormPress(),
    "base_press": KnormPress(),
    "presses": [KnormPress(), SnapKVPress()],
    "scorers": [KnormPress(), SnapKVPress()],
    "compression_ratios": [0.1, 0.2],
}
"""Arguments for the constructors of presses."""


def press_classes() -> list[type[BasePress]]:
    """Every press of kvpress's and of ours that can be built."""
    for package in (kvpress.presses, sparsekv_pl.presses):
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")
    found, left = set(), [BasePress]
    while left:
        left += (own := left.pop().__subclasses__())
        found.update(own)
    public = [
        kind for kind in found if kind.__module__.startswith(("kvpress.", "sparsekv_pl.")) and kind.__name__[0] != "_"
    ]
    return sorted((kind for kind in public if not inspect.isabstract(kind)), key=lambda kind: kind.__name__)


def built(kind: type[BasePress]) -> Any:
    taken = inspect.signature(kind).parameters
    return kind(**{name: copy.deepcopy(value) for name, value in NEEDED.items() if name in taken})


def others(value: Any) -> Iterator[Any]:
    """Values that differ from ``value`` in one thing, at any depth."""
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int | float):
        yield value + 0.5
    elif isinstance(value, str | None):
        yield f"{value} other"
    elif isinstance(value, list | tuple):
        yield [*value, *value[:1]]
        yield value[1:]
        for i, item in enumerate(value):
            yield from ([*value[:i], other, *value[i + 1 :]] for other in others(item))
    else:
        yield TOVAPress(0.125)
        for name in inspect.signature(type(value)).parameters:
            for other in others(getattr(value, name)) if name[0] != "_" else ():
                changed = copy.deepcopy(value)
                object.__setattr__(changed, name, other)
                yield changed


def parts(value: Any) -> Iterator[Any]:
    """``value``, and all objects that it was built with."""
    if isinstance(value, list):
        for item in value:
            yield from parts(item)
    elif hasattr(value, "__dict__"):
        yield value
        for name in inspect.signature(type(value)).parameters:
            yield from parts(getattr(value, name))


@pytest.mark.parametrize("kind", press_classes(), ids=lambda kind: kind.__name__)
def test_every_setting_of_a_press_is_in_its_key_and_nothing_that_a_run_leaves(kind: type[BasePress]) -> None:
    press = built(kind)
    key = json.dumps(settings_of(press))
    assert json.dumps(settings_of(built(kind))) == key
    changed = [json.dumps(settings_of(other)) for other in others(press)]
    settings = [name for name in inspect.signature(kind).parameters if name[0] != "_"]
    assert len(changed) > len(settings)
    assert key not in changed
    assert len(set(changed)) == len(changed)
    for part in parts(press):
        if isinstance(part, BasePress):
            left = (
                {field.name for field in fields(part) if not field.init}
                if hasattr(part, "__dataclass_fields__")
                else set()
            )
            for name in {"scores", "context_ids", "tokenizer", *left}:
                object.__setattr__(part, name, torch.ones(2))
    assert json.dumps(settings_of(press)) == key


def test_a_setting_that_does_not_store_its_arguments_is_refused() -> None:
    with pytest.raises(TypeError, match=r"does not store its constructor.s arguments"):
        settings_of(lambda: 0.5)


def test_a_folder_in_a_setting_counts_by_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stats").mkdir()
    (tmp_path / "stats" / "a.safetensors").write_bytes(b"one")
    spelled = [settings_of(name) for name in (str(tmp_path / "stats"), "./stats", "~/stats")]
    assert spelled[1:] == spelled[:-1]
    (tmp_path / "stats" / "a.safetensors").write_bytes(b"other")
    assert settings_of("./stats") != spelled[0]


@pytest.mark.parametrize(
    ("field", "value", "decides"),
    [
        ("dtype", "bfloat16", True),
        ("attention", "eager", True),
        ("load_in_4bit", True, True),
        ("placement", Placement("cpu"), True),
        ("trust_remote_code", True, True),
        ("revision", "main", False),  # of a folder there is none
        ("lora", None, False),  # none is made for evaluation
        ("adapter", "x", False),  # the trained variant's own part of the key
        ("sharded", True, False),
        ("cache_dir", "/tmp", False),
    ],
)
def test_a_backbone_is_what_decides_its_outputs(
    tiny_backbone: Callable[..., Backbone], field: str, value: Any, decides: bool
) -> None:
    backbone = tiny_backbone()
    assert (replace(backbone, **{field: value}).identity() != backbone.identity()) == decides


def test_weights_replaced_under_the_same_path_are_another_model(
    tiny_models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    model = tmp_path / "model"
    shutil.copytree(tiny_models["llama"], model)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    names = [str(model), "./model", "~/model", f"{tmp_path}/./model"]
    found = [Backbone(pretrained=name, dtype="float32").identity() for name in names]
    assert found[1:] == found[:-1]
    for file in ("model.safetensors", "tokenizer.json", "generation_config.json", "chat_template.jinja"):
        content = (model / file).read_bytes()
        (model / file).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert Backbone(pretrained="./model", dtype="float32").identity() not in found, file
        (model / file).write_bytes(content)
    (model / "README.md").write_text("nothing that is loaded")
    assert Backbone(pretrained="./model", dtype="float32").identity() == found[0]


def test_a_chat_template_that_prints_the_date_prints_the_same_one_every_day(
    tiny_models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparsekv_pl.evaluation.lm_eval_model import PressedLM

    model, tokenizer = Backbone(pretrained=tiny_models["llama"], dtype="float32").load(trainable=False)
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + str(tokenizer.chat_template)
    lm = PressedLM(model, tokenizer)
    prompts = set()
    for day in (1, 2):

        class Clock(datetime):
            @classmethod
            def now(cls, tz: Any = None, day: int = day) -> "Clock":
                return cls(2031, 5, day, tzinfo=tz)

        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)
        prompts.add((Frame(tokenizer).prefix, lm.apply_chat_template([{"role": "user", "content": "Hello"}])))
    ((prefix, prompt),) = prompts
    assert prefix.startswith("26 Jul 2024") and prompt.startswith("26 Jul 2024")
