"""Keys of finished work include everything that decides it: every setting, adapter and token."""

import copy
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kvpress import SnapKVPress

import sparsekv_pl.presses
from sparsekv_pl.analysis.anchor_attention import AnchorAnalysis
from sparsekv_pl.analysis.oracle_blocks import OracleBlocks
from sparsekv_pl.analysis.statistics_analysis import AttentionStatisticsAnalysis
from sparsekv_pl.attention.statistics import StatisticsSettings
from sparsekv_pl.blocksparse.collection import TensorCollection
from sparsekv_pl.blocksparse.comparison import BlockComparison
from sparsekv_pl.blocksparse.validation import SketchWalkValidation
from sparsekv_pl.evaluation.evaluation_module import EvaluationModule
from sparsekv_pl.evaluation.hosted_client import HostedModel
from sparsekv_pl.evaluation.hosted_module import HostedModule
from sparsekv_pl.evaluation.lm_eval_module import LMEvalModule
from sparsekv_pl.evaluation.long_context import LongContextModule
from sparsekv_pl.evaluation.points import Setting
from sparsekv_pl.eviction.quantised_pairs import PairQuantisation
from sparsekv_pl.models.anchors import Anchors
from sparsekv_pl.models.backbone import Backbone
from sparsekv_pl.models.batch import CaseBatch, CaseInfo
from sparsekv_pl.storage.records import Results


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


def keys_of(module: Any, *batches: Any) -> list[str]:
    return [piece.key for variant in module.variants for batch in batches for piece in module.pieces(batch, variant)]


SETTINGS = [Setting(SnapKVPress(), [0.5])]
HOSTED = HostedModel("a-model", key_variable=None)
REPORTS = {"output", "title"}
OTHER: dict[str, Any] = {
    "output": "other",
    "title": "Other",
    "sparsity": True,
    "card": True,
    "views": 7,
    "kept_attention": True,
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
        keys_of,
        {"settings": SETTINGS},
        {"settings": [Setting(SnapKVPress(kernel_size=3), [0.5])], "stability": True},
        REPORTS | {"card", "kept_attention", "sparsity", "views"},  # the last three are pieces of work of their own
    ),
    Kept(
        LMEvalModule,
        lambda module, _: keys_of(module, *range(len(module.work))),
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
        REPORTS | {"views"},  # finished work keeps the documents with which it was measured
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
        lambda module, batch: [module._key(batch, variant) for variant in module.variants],
        {"press": SnapKVPress()},
        {
            "press": SnapKVPress(kernel_size=3),
            "budget": 5,
            "chunk_tokens": 7,
            "quantisation": [PairQuantisation(4), PairQuantisation(8), PairQuantisation(4, residual=1)],
        },
        REPORTS | {"save_every", "dry", "tokens_per_second", "views"},
    ),
    Kept(AnchorAnalysis, keys_of, {}, {"carrying": 0.5}, {"output", "sinks", "threshold", "recent_mass"}),
    Kept(
        AttentionStatisticsAnalysis,
        keys_of,
        {},
        {
            "statistics": StatisticsSettings(window=1),
            "anchors": [Anchors(recent=1), Anchors(recent=0, sinks=1), Anchors(recent=0, punctuation=False)],
            "chunk_tokens": None,
        },
        {"output"},
    ),
    Kept(TensorCollection, keys_of, {}, {"layers": [0], "statistics": StatisticsSettings(window=1)}, {"output"}),
    Kept(OracleBlocks, keys_of, {}, {"block_size": 3}, {"output", "top_k", "layers", "heads"}),
    Kept(
        BlockComparison,
        keys_of,
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
        lambda module, _: keys_of(module, [__file__]),
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
    kept: Kept, loaded: Backbone, batch: CaseBatch, tiny_trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsekv_pl.evaluation.lm_eval_module.task_manager", lambda *_: None)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"one")
    taken = inspect.signature(kept.kind).parameters
    backbone = {"backbone": replace(loaded, adapter=str(tmp_path))} if "backbone" in taken else {}
    assert kept.decide.keys() | kept.do_not | backbone.keys() == taken.keys()
    trainer = tiny_trainer()

    def keys(batch: CaseBatch = batch, **settings: Any) -> set[str]:
        module = kept.kind(**(backbone | copy.deepcopy(kept.given) | settings))
        module._trainer, module.results = trainer, Results(tmp_path / "none")
        return set(kept.keys(module, batch))

    first = keys()
    assert keys() == first
    for name, values in kept.decide.items():
        several = isinstance(values, list) and type(values[0]) in (Anchors, HostedModel, PairQuantisation)
        for value in values if several else [values]:
            assert keys(**{name: value}) - first, f"{name}={value!r} changed no key"
    for name in kept.do_not:
        if name not in ("tokenizer", "gates"):
            assert first <= keys(**{name: OTHER[name]}), f"{name} decides nothing"
    if backbone:
        (tmp_path / "adapter_model.safetensors").write_bytes(b"other")
        other = keys()
        assert other - first, "another adapter under the same path"
        for counted in ("version", "measuring_digest", "own_digest"):
            with monkeypatch.context() as patch:
                patch.setattr(f"sparsekv_pl.storage.result_keys.{counted}", lambda name: f"another {name}")
                assert not keys() & other, f"another {counted}"
    if kept.kind not in (LMEvalModule, SketchWalkValidation, HostedModule):
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


def test_other_gates_under_the_same_path_are_measured_again(
    loaded: Backbone, batch: CaseBatch, tiny_trainer: Any, tmp_path: Path
) -> None:
    from sparsekv_pl.blocksparse.gate import AttentionGates

    keys = []
    for seed in range(2):
        gates = AttentionGates.for_model(loaded.load()[0], block_size=64)
        next(gates.parameters()).data += seed
        gates.save(tmp_path)
        module = BlockComparison(loaded, "x", gates=str(tmp_path))
        module._trainer = tiny_trainer()
        keys.append(keys_of(module, batch))
    assert keys[0] != keys[1]
