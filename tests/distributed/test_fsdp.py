"""Two processes of the CPU that share a model out (FSDP2) train as one process does: benchmarks/fsdp.py --gloo."""

import re

import pytest

from tests.processes import Started

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
def found(tiny_models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Each check's line, "PASS" or "FAIL: why"."""
    command = ["benchmarks/fsdp.py", "--gloo", "--models", tiny_models["llama"], tiny_models["qwen3"]]
    benchmark = Started(command, tmp_path_factory.mktemp("fsdp") / "log")
    benchmark.wait(900)
    lines = re.findall(r"^(PASS|FAIL) (\w+)(.*)$", benchmark.printed, re.MULTILINE)
    assert lines, benchmark.printed[-4_000:]
    return {name: verdict + why for verdict, name, why in lines}


@pytest.mark.parametrize("name", CHECKS)
def test_ranks_that_share_a_model_train_as_one_process_does(found: dict[str, str], name: str) -> None:
    assert found[name] == "PASS"


def test_every_check_is_looked_at(found: dict[str, str]) -> None:
    assert set(found) == set(CHECKS)
