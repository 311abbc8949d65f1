"""Two processes of the CPU that share a model out (FSDP2) train as one process does: benchmarks/fsdp.py --gloo."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "fsdp.py"
CHECKS = (
    "lora_real_eviction",
    "lora_real_eviction_selection_loss_accumulated",
    "lora_chunks_checkpointed",
    "lora_kv_dropout",
    "lora_kv_dropout_layers_checkpointed",
    "full_tied_clipped",
    "full_untied_kv_dropout",
    "lora_bf16_mixed",
    "full_bf16_mixed",
    "lora_bf16_true",
    "resume_sharded",
    "resume_consolidated",
    "consolidated_in_one_process",
    "export",
    "never_whole",
)


@pytest.fixture(scope="module")
def found(tiny_models: dict[str, str]) -> dict[str, str]:
    """Each check's line, "PASS" or "FAIL: why"."""
    command = [sys.executable, str(SCRIPT), "--gloo", "--models", tiny_models["llama"], tiny_models["qwen3"]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    lines = re.findall(r"^(PASS|FAIL) (\w+)(.*)$", done.stdout, re.MULTILINE)
    assert lines, done.stderr[-4_000:]
    return {name: verdict + why for verdict, name, why in lines}


@pytest.mark.parametrize("name", CHECKS)
def test_ranks_that_share_a_model_train_as_one_process_does(found: dict[str, str], name: str) -> None:
    assert found[name] == "PASS"


def test_every_check_is_looked_at(found: dict[str, str]) -> None:
    assert set(found) == set(CHECKS)
