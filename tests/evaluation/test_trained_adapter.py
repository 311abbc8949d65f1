"""Reading an adapter's folder."""

from pathlib import Path

import pytest
from kvpress import CriticalKVPress, KeyRerotationPress, KnormPress, SnapKVPress

from sparsekv_pl.evaluation.trained_adapter import fingerprint, seen_in_training
from sparsekv_pl.models.training_summary import training_summary


def test_a_press_around_a_trained_one_is_not_unseen() -> None:
    summary = {"presses": ["SnapKV"]}
    assert seen_in_training(SnapKVPress(), summary)
    assert seen_in_training(CriticalKVPress(SnapKVPress()), summary)
    assert seen_in_training(KeyRerotationPress(SnapKVPress()), summary)
    assert not seen_in_training(CriticalKVPress(KnormPress()), summary)
    assert not seen_in_training(None, summary)
    assert not seen_in_training(SnapKVPress(), {})
    continued = {"presses": ["Knorm"], "continued_from": {"presses": [], "continued_from": summary}}
    assert seen_in_training(SnapKVPress(), continued)
    assert seen_in_training(CriticalKVPress(KnormPress()), continued)


def test_a_fingerprint_is_of_weights_and_settings(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    before = fingerprint(str(tmp_path))
    (tmp_path / "training.json").write_text('{"steps": 3}')
    assert fingerprint(str(tmp_path)) == before
    assert training_summary(str(tmp_path)) == {"steps": 3}
    (tmp_path / "adapter_model.safetensors").write_bytes(b"others")
    assert fingerprint(str(tmp_path)) != before
    assert fingerprint(None) is None
    assert training_summary(None) == {}


def test_an_adapter_under_the_home_folder_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
    (tmp_path / "adapter" / "training.json").write_text('{"steps": 3}')
    monkeypatch.setenv("HOME", str(tmp_path))
    first = fingerprint("~/adapter")
    assert first == fingerprint(str(tmp_path / "adapter"))
    assert training_summary("~/adapter") == {"steps": 3}
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"others")
    assert fingerprint("~/adapter") != first
