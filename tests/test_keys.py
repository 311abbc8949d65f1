"""A key of finished work holds all that decides the outcome and nothing else: every press, setting and module."""

import copy
import importlib
import inspect
import json
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import kvpress
import pytest
import torch
from kvpress import BasePress, KnormPress, SnapKVPress, TOVAPress

import sparsekv_pl.presses
from data.cases import Frame
from sparsekv_pl.analyses.anchors import AnchorAnalysis
from sparsekv_pl.analyses.collection import TensorCollection
from sparsekv_pl.analyses.comparison import BlockComparison
from sparsekv_pl.analyses.oracle import OracleBlocks
from sparsekv_pl.analyses.statistics import AttentionStatisticsAnalysis
from sparsekv_pl.analyses.validation import SketchWalkValidation
from sparsekv_pl.anchors import Anchors
from sparsekv_pl.attention.statistics import StatisticsSettings
from sparsekv_pl.backbone import Backbone
from sparsekv_pl.batch import CaseBatch, CaseInfo
from sparsekv_pl.eviction.setting import Setting
from sparsekv_pl.hosted_client import HostedModel
from sparsekv_pl.keys import settings_of
from sparsekv_pl.measures import Measurement
from sparsekv_pl.modules.evaluation import EvaluationModule
from sparsekv_pl.modules.harness import HarnessModule
from sparsekv_pl.modules.hosted import HostedModule
from sparsekv_pl.modules.long_context import LongContextModule
from sparsekv_pl.placement import Placement

NEEDED: dict[str, Any] = {
    "press": KnormPress(),
    "base_press": KnormPress(),
    "presses": [KnormPress(), SnapKVPress()],
    "compression_ratios": [0.1, 0.2],
}
"""What constructors of presses ask for."""


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


def test_what_a_setting_of_a_press_cannot_tell_is_refused() -> None:
    with pytest.raises(TypeError, match="does not show what it was built with"):
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


# Modules. Of each: what it is built with, another value of every setting that decides, and the settings that do not.


@dataclass(frozen=True)
class Kept:
    """A module that keeps results, and the keys of a batch's."""

    kind: type
    keys: Callable[[Any, CaseBatch], list[str]]
    given: dict[str, Any]
    decide: dict[str, Any]
    do_not: set[str]

    def __str__(self) -> str:
        return self.kind.__name__


def analysis_keys(module: Any, batch: CaseBatch) -> list[str]:
    return [module._key(batch, variant) for variant in module.variants]


def evaluation_keys(module: Any, batch: CaseBatch) -> list[str]:
    measurement = Measurement(module.model, module.tokenizer, batch, module.stability)
    return [module._key_at(measurement, variant, point) for variant in module.variants for point in module.points]


def gated(module: BlockComparison, batch: CaseBatch) -> list[str]:
    module._gates()
    return analysis_keys(module, batch)


SETTINGS = [Setting(SnapKVPress(), [0.5])]
HOSTED = HostedModel("a-model", key_variable=None)
REPORTS = {"output", "title"}
OTHER: dict[str, Any] = {
    "output": "other",
    "title": "Other",
    "sparsity": True,
    "dry": True,
    "save_every": 3,
    "tokens_per_second": 2.0,
    "sinks": 2,
    "threshold": 3.0,
    "recent_mass": 0.25,
    "top_k": 1,
    "layers": [0],
    "heads": [0],
}
"""Another value of each setting that decides nothing."""
KEPT = [
    Kept(
        EvaluationModule,
        evaluation_keys,
        {"settings": SETTINGS},
        {"settings": [Setting(SnapKVPress(kernel_size=3), [0.5])], "stability": True},
        REPORTS | {"sparsity"},  # it is a piece of work of its own
    ),
    Kept(
        HarnessModule,
        lambda module, _: [module._key(piece) for piece in module.pieces],
        {"settings": SETTINGS, "tasks": ["a"]},
        {
            "settings": [Setting(SnapKVPress(kernel_size=3), [0.5])],
            "tasks": ["b"],
            "include_path": str(Path(__file__).parent / "reporting"),
            "limit": 3,
            "num_fewshot": 1,
            "apply_chat_template": True,
            "held_back": 2,
        },
        REPORTS,
    ),
    Kept(
        HostedModule,
        lambda module, batch: [module._question(info, 9).key for info in batch["cases"]],
        {"hosted": HOSTED},
        {
            "hosted": [
                replace(HOSTED, model="b"),
                replace(HOSTED, base_url="http://localhost:1/v1"),
                replace(HOSTED, options={"top_p": 1}),
                replace(HOSTED, thinking_tokens=3),
                replace(HOSTED, length_parameter="max_completion_tokens"),
            ],
            "extra_tokens": 1,
        },
        REPORTS | {"dry", "tokenizer"},  # the tokenizer counts; what is sent is text
    ),
    Kept(
        LongContextModule,
        lambda module, batch: [module._key(batch)],
        {"press": SnapKVPress()},
        {"press": SnapKVPress(kernel_size=3), "budget": 5, "chunk_tokens": 7},
        REPORTS | {"save_every", "dry", "tokens_per_second"},
    ),
    Kept(AnchorAnalysis, analysis_keys, {}, {"carrying": 0.5}, {"output", "sinks", "threshold", "recent_mass"}),
    Kept(
        AttentionStatisticsAnalysis,
        analysis_keys,
        {},
        {
            "statistics": StatisticsSettings(window=1),
            "anchors": [Anchors(recent=1), Anchors(recent=0, sinks=1), Anchors(recent=0, punctuation=False)],
            "chunk_tokens": None,
        },
        {"output"},
    ),
    Kept(TensorCollection, analysis_keys, {}, {"layers": [0], "statistics": StatisticsSettings(window=1)}, {"output"}),
    Kept(OracleBlocks, analysis_keys, {}, {"block_size": 3}, {"output", "top_k", "layers", "heads"}),
    Kept(
        BlockComparison,
        gated,
        {"output": "x"},
        {
            "block_size": 32,
            "sketch_dim": 32,
            "exponent": 2,
            "dense_layers": 0,
            "dampings": [0.5],
            "top_k_blocks": 3,
            "threshold": 0.2,
            "budgets": [3],
            "pass_budgets": [3],
            "picture_layers": [0],
            "seed": 1,
        },
        {"output", "gates"},  # gates: their own test below
    ),
    Kept(
        SketchWalkValidation,
        lambda module, _: [module._key([Path(__file__)])],
        {},
        {
            "block_size": 32,
            "sketch_dim": 32,
            "top_k_blocks": 3,
            "exponent": 2,
            "dense_layers": 0,
            "damping": 0.5,
            "seed": 1,
            "repeats": 1,
        },
        {"output"},
    ),
]


@pytest.fixture(scope="module")
def loaded(tiny_backbone: Callable[..., Backbone]) -> Iterator[Backbone]:
    """A backbone whose model was loaded once, for all modules of this file."""
    backbone = tiny_backbone()
    found = backbone.load(trainable=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Backbone, "load", lambda *_, **__: found)
        yield backbone


@pytest.fixture(scope="module")
def batch() -> CaseBatch:
    """A window of text."""
    ids = torch.arange(12)[None]
    return CaseBatch(
        context_ids=ids, continuation_ids=ids, continuation_lengths=torch.tensor([12]), cases=[CaseInfo("a", "text")]
    )


@pytest.mark.parametrize("kept", KEPT, ids=str)
def test_a_module_keeps_results_by_every_setting_that_decides_them(
    kept: Kept, loaded: Backbone, batch: CaseBatch, tiny_trainer: Any, tmp_path: Path
) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"one")
    taken = inspect.signature(kept.kind).parameters
    backbone = {"backbone": replace(loaded, adapter=str(tmp_path))} if "backbone" in taken else {}
    assert kept.decide.keys() | kept.do_not | backbone.keys() == taken.keys()
    trainer = tiny_trainer()

    def keys(batch: CaseBatch = batch, **settings: Any) -> set[str]:
        module = kept.kind(**(backbone | copy.deepcopy(kept.given) | settings))
        module._trainer = trainer
        return set(kept.keys(module, batch))

    first = keys()
    assert keys() == first
    for name, values in kept.decide.items():
        several = isinstance(values, list) and type(values[0]) in (Anchors, HostedModel)
        for value in values if several else [values]:
            assert keys(**{name: value}) - first, f"{name}={value!r} changed no key"
    for name in kept.do_not:
        if name not in ("tokenizer", "gates"):
            assert keys(**{name: OTHER[name]}) == first, f"{name} decides nothing"
    if backbone:
        (tmp_path / "adapter_model.safetensors").write_bytes(b"other")
        assert keys() - first, "another adapter under the same path"
    if kept.kind not in (HarnessModule, SketchWalkValidation, HostedModule):
        for name in ("context_ids", "continuation_ids", "continuation_lengths"):
            assert not keys({**batch, name: batch[name] + 1}) & first, name  # type: ignore[literal-required, misc, typeddict-item]


def test_every_module_that_keeps_results_is_walked_over() -> None:
    """Whoever imports Results keeps some."""
    folder = Path(sparsekv_pl.presses.__file__).parents[1]
    keep = {
        path.stem
        for path in folder.rglob("*.py")
        if "results import" in (text := path.read_text()) and "Results(" in text
    }
    walked = {
        Path(inspect.getfile(base)).stem
        for kept in KEPT
        for base in kept.kind.__mro__
        if "sparsekv_pl" in base.__module__
    }
    assert keep - {"results"} <= walked


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
    found = [Backbone(pretrained=name).identity() for name in names]
    assert found[1:] == found[:-1]
    for file in ("model.safetensors", "tokenizer.json", "generation_config.json", "chat_template.jinja"):
        content = (model / file).read_bytes()
        (model / file).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert Backbone(pretrained="./model").identity() not in found, file
        (model / file).write_bytes(content)
    (model / "README.md").write_text("nothing that is loaded")
    assert Backbone(pretrained="./model").identity() == found[0]


def test_other_gates_under_the_same_path_are_measured_again(
    loaded: Backbone, batch: CaseBatch, tiny_trainer: Any, tmp_path: Path
) -> None:
    from sparsekv_pl.attention.gate import AttentionGates

    keys = []
    for seed in range(2):
        gates = AttentionGates.for_model(loaded.load()[0], block_size=64)
        next(gates.parameters()).data += seed
        gates.save(tmp_path)
        module = BlockComparison(loaded, "x", gates=str(tmp_path))
        module._trainer = tiny_trainer()
        keys.append(gated(module, batch))
    assert keys[0] != keys[1]


def test_a_chat_template_that_prints_the_date_prints_the_same_one_every_day(
    tiny_models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparsekv_pl.pressed_lm import PressedLM

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
