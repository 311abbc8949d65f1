"""A log has no libraries' progress bars and no warning at every step; its tables are as wide as needed."""

import io
import logging
import sys
from collections.abc import Callable
from typing import Any

import pytest
from kvpress import KnormPress
from lightning.pytorch import Trainer
from rich.table import Table
from tqdm import tqdm
from transformers import Olmo2Config, Olmo2ForCausalLM
from transformers.utils.logging import enable_progress_bar

from sparsekv_pl.cli.command_line import quieten
from sparsekv_pl.evaluation.pace import ticking, without_bars
from sparsekv_pl.models.backbone import Backbone
from sparsekv_pl.presses import kvpress_warnings as untested_models
from sparsekv_pl.reporting.console import show


def test_tables_are_as_wide_as_they_need_to_be(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("task", "metric")
    table.add_row("a task " * 20, "exact_match " * 10)
    show(table)
    assert ("a task " * 20).strip() in capsys.readouterr().out


def test_bars_leave_nothing_in_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setattr(sys, "stderr", file)
    with without_bars():
        for _ in tqdm(range(300), desc="Loading weights", mininterval=0):
            pass
        print("a warning\n", file=sys.stderr)
    assert file.getvalue() == "a warning\n\n"


def test_progress_is_printed_in_lines_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    done = ticking("asking", "requests", 2)
    done()
    done()
    said = capsys.readouterr()
    assert [line.partition(",")[0] for line in said.out.splitlines()] == [f"asking: {n} of 2 requests" for n in (1, 2)]
    assert not said.err


def test_loading_a_model_shows_no_bar(
    tiny_backbone: Callable[..., Backbone], capsys: pytest.CaptureFixture[str]
) -> None:
    enable_progress_bar()
    tiny_backbone().load()
    assert "Loading weights" not in capsys.readouterr().err


def test_kvpress_says_once_that_it_does_not_know_a_model(caplog: pytest.LogCaptureFixture) -> None:
    for name in untested_models.LOGGERS:
        for found in logging.getLogger(name).filters:
            if isinstance(found, untested_models.OnceShortened):
                found.passed.clear()
    sizes: dict[str, Any] = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    model = Olmo2ForCausalLM(Olmo2Config(**sizes, num_attention_heads=2))
    with caplog.at_level("WARNING"):
        for _ in range(4):
            with KnormPress(compression_ratio=0.5)(model):
                pass
    assert caplog.messages == ["kvpress does not list Olmo2ForCausalLM among the models it was tested with"]


def test_lightning_says_what_is_there_and_once(caplog: pytest.LogCaptureFixture) -> None:
    quieten()
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        Trainer(accelerator="cpu", precision="bf16-mixed", logger=False, enable_checkpointing=False)
    assert caplog.messages == ["GPU available: False, used: False"]


def test_an_optional_package_that_nothing_needs_is_not_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    with caplog.at_level("WARNING"):
        logger.warning(
            "Failed to load CPU gemm_4bit_forward: %s. Please make sure you already `pip install kernels`", 1
        )
        logger.warning("another")
    assert caplog.messages == ["another"]
