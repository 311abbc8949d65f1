"""Out of memory in a command: one line with the settings that need less and their values."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from evaluate import EvaluateCommandLine
from sparsekv_pl.cli.out_of_memory import OutOfMemoryError, out_of_memory_explained
from sparsekv_pl.evaluation.evaluation_module import EvaluationModule
from sparsekv_pl.models.backbone import Backbone
from sparsekv_pl.training.eit_module import EITModule
from tests.refusals import refusal
from train import TrainCommandLine

CONFIGS = Path(__file__).parents[2] / "configs"
CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.00 GiB is "
    "free. If reserved but unallocated memory is large try setting PYTORCH_ALLOC_CONF=expandable_segments:True"
)


def out_of_gpu_memory(*_: Any, **__: Any) -> None:
    raise torch.OutOfMemoryError(CUDA)


def out_of_cpu_memory(*_: Any, **__: Any) -> None:
    torch.empty(2**60, dtype=torch.uint8)


@pytest.fixture
def arguments(tiny_models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    tiny = {"model.backbone.pretrained": tiny_models["llama"], "model.backbone.dtype": "float32"}
    tiny |= {"data.continuation_tokens": "16", "data.batch_size": "2", "trainer.accelerator": "cpu"}
    tiny |= {"trainer.default_root_dir": str(tmp_path), "trainer.logger": "false"}
    return [f"--{name}={value}" for name, value in tiny.items()]


def test_training_names_what_reduces_it_and_keeps_its_checkpoint(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step: Callable[..., Any] = EITModule.training_step
    steps = iter([step, out_of_gpu_memory])
    monkeypatch.setattr(EITModule, "training_step", lambda self, batch: next(steps)(self, batch))
    arguments += ["--data.context_tokens=96", "--trainer.precision=32-true", "--trainer.enable_progress_bar=false"]
    message = refusal(TrainCommandLine, "fit", "--config", str(CONFIGS / "quickstart.yaml"), *arguments)
    assert message.startswith("error: out of memory (CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")
    assert "PYTORCH_ALLOC_CONF" not in message
    for setting in (
        *("data.batch_size=2 (fewer", "data.context_tokens=96", "model.eviction.chunk_tokens=null"),
        *("model.eviction.budget=null", "model.eviction.checkpoint=False (true", "trainer.precision=32-true"),
        *("model.backbone.load_in_4bit=False (true)", "trainer.accumulate_grad_batches=1"),
        *("model.backbone.dtype=float32", "model.backbone.sharded=False"),
    ):
        assert setting in message
    assert "lora=" not in message  # there is an adapter already
    assert torch.load(next(tmp_path.rglob("*.ckpt")), weights_only=True)["global_step"] == 1


def test_evaluation_names_what_reduces_it(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EvaluationModule, "test_step", out_of_cpu_memory)
    arguments += ["--data.lengths=[96]", "--model.backbone.adapter=null", f"--model.output={tmp_path}"]
    message = refusal(
        EvaluateCommandLine, "test", "--config", str(CONFIGS / "evaluate" / "quickstart.yaml"), *arguments
    )
    assert "can't allocate memory" in message
    assert "data.batch_size=2" in message
    assert "data.lengths=[96]" in message
    assert "model.settings[0].chunk_tokens=null" in message
    assert not any(of_training in message for of_training in ("accumulate", "sharded", "checkpoint", "lora"))


def test_loading_a_model_that_is_too_large(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Backbone, "load", out_of_gpu_memory)
    message = refusal(TrainCommandLine, "fit", "--config", str(CONFIGS / "quickstart.yaml"), *arguments)
    assert "model.backbone.load_in_4bit=False" in message


@pytest.mark.parametrize("error", [MemoryError(), OSError(12, "Cannot allocate memory")])
def test_pythons_own_errors_count(error: Exception) -> None:
    with (
        pytest.raises(OutOfMemoryError, match=r"batch_size=4 .*lora=null"),
        out_of_memory_explained({"data": {"init_args": {"batch_size": 4}}, "lora": None}, training=True),
    ):
        raise error


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), OSError(28, "No space left on device")])
def test_other_errors_pass(error: Exception) -> None:
    with pytest.raises(type(error)) as passed, out_of_memory_explained({"batch_size": 4}, training=True):
        raise error
    assert passed.value is error


def test_what_has_nothing_left_to_give_is_not_named() -> None:
    spent = {"batch_size": 1, "precision": "bf16-mixed", "lora": {"r": 4}, "load_in_4bit": True, "checkpoint": True}
    with (
        pytest.raises(OutOfMemoryError, match=r"needs less: context_tokens=8 \(shorter\)$"),
        out_of_memory_explained({**spent, "context_tokens": 8}, training=True),
    ):
        raise MemoryError
