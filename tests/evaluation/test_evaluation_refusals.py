"""Errors and warnings of an evaluation before it measures anything."""

import re
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from kvpress import (
    AdaKVPress,
    BasePress,
    KnormPress,
    SnapKVPress,
)

from data.text import Splits
from sparsekv_pl.evaluation.evaluation_module import EvaluationModule
from sparsekv_pl.evaluation.long_context import LongContextModule
from sparsekv_pl.evaluation.points import Setting
from sparsekv_pl.eviction.while_decoding import Decoding
from sparsekv_pl.presses import EvictionAugPress
from sparsekv_pl.presses.block_dropout import BlockDropoutPress
from sparsekv_pl.presses.nesting import press_name
from sparsekv_pl.presses.sparse_reg import SparseRegPress
from sparsekv_pl.presses.variable_block import VariableBlockPress
from tests.tiny_training import MakeBackbone, MakeTrainer


def settings() -> list[Setting]:
    return [Setting(SnapKVPress(window_size=8), [0.25, 0.75]), Setting(KnormPress(), [0.5])]


@pytest.mark.parametrize(
    "press",
    [
        BlockDropoutPress(),
        AdaKVPress(VariableBlockPress()),
        SparseRegPress(),
        EvictionAugPress([BlockDropoutPress(), KnormPress()]),
    ],
    ids=press_name,
)
def test_what_evicts_in_training_alone_is_not_evaluated(press: BasePress, tiny_backbone: MakeBackbone) -> None:
    message = rf"{re.escape(press_name(press))} evicts only in training"
    with pytest.raises(ValueError, match=message):
        Setting(press, [0.5])
    with pytest.raises(ValueError, match=message):
        LongContextModule(tiny_backbone(), press)


@pytest.mark.parametrize("ratio", [-0.1, 1.0])
def test_a_ratio_outside_0_to_1_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match=f"{ratio}"):
        Setting(KnormPress(), [0.5, ratio])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chunk_tokens": 0}, "chunk_tokens=0"),
        ({"decoding": {"interval": 0}}, r"decoding\.interval=0"),
        ({"decoding": {"interval": 8, "budget": 0}}, r"decoding\.budget=0"),
        ({"chunk_tokens": 8, "decoding": {"interval": 8}}, "chunk_tokens or decoding"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decoding = settings.pop("decoding", None)
        Setting(KnormPress(), [0.5], **settings, decoding=decoding and Decoding(**decoding))


def test_settings_that_the_report_could_not_tell_apart_are_refused(tiny_backbone: MakeBackbone) -> None:
    twice = [Setting(SnapKVPress(window_size=8), [0.5]), Setting(SnapKVPress(window_size=16), [0.25, 0.5])]
    with pytest.raises(ValueError, match=r"SnapKV at 0\.5, dense, more than once"):
        EvaluationModule(tiny_backbone(), twice)


def test_a_context_longer_than_the_model_stops_before_measuring(
    tiny_backbone: MakeBackbone, tiny_trainer: MakeTrainer, tmp_path: Path
) -> None:
    from data.evaluation import EvaluationData

    module = EvaluationModule(tiny_backbone(), settings(), str(tmp_path))
    with pytest.raises(ValueError, match=r"takes 1025 positions, .* trained on 1024 .*KeyRerot"):
        tiny_trainer().test(module, EvaluationData(lengths=[96, 1025]))
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (Setting(SnapKVPress(window_size=96), [0.5]), "SnapKV looks at a window of 96"),
        (Setting(SnapKVPress(window_size=16), [0.5], chunk_tokens=12), "SnapKV looks at a window of 16"),
        (Setting(SnapKVPress(window_size=16), [0.5], decoding=Decoding(16)), "interval=16 must be above the window"),
        (Setting(AdaKVPress(KnormPress()), [0.5], decoding=Decoding(16)), "AdaKV.* cannot evict again and again"),
        (Setting(KnormPress(), [0.5], decoding=Decoding("turn")), r"interval=turn .* data\.tasks makes none"),
    ],
)
def test_contexts_shorter_than_a_window_stop_before_measuring(
    setting: Setting, message: str, tiny_backbone: MakeBackbone, tiny_trainer: MakeTrainer, tmp_path: Path
) -> None:
    from data.evaluation import EvaluationData

    module = EvaluationModule(tiny_backbone(), [setting], str(tmp_path))
    with pytest.raises(ValueError, match=message):
        tiny_trainer().test(module, EvaluationData(lengths=[96]))


def test_validation_is_no_result_to_publish(
    tiny_backbone: MakeBackbone, tiny_trainer: MakeTrainer, tmp_path: Path
) -> None:
    from data.evaluation import EvaluationData

    module = EvaluationModule(tiny_backbone(), settings(), str(tmp_path), card=True)
    with pytest.raises(ValueError, match=r"held-out results: with data\.split validation set model\.card to false"):
        tiny_trainer().test(module, EvaluationData(lengths=[96], split="validation"))


@pytest.mark.parametrize(
    ("trained", "message"),
    [
        (asdict(Splits()), ""),
        (asdict(Splits(0.5, 0.2, 0.3)), "trained on data split by {'train': 0.5"),
        (None, "trained on data split by document names"),
    ],
)
def test_splits_that_training_did_not_have_are_named(
    trained: Any, message: str, tiny_backbone: MakeBackbone, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from data.evaluation import EvaluationData

    module = EvaluationModule(tiny_backbone(), settings(), str(tmp_path))
    module.training_summary = {"steps": 3, "splits": trained}
    module._trainer = SimpleNamespace(datamodule=EvaluationData())  # type: ignore[assignment]
    module._compare_splits()
    assert (message in caplog.text) if message else not caplog.text
