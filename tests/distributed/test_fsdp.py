"""Two CPU processes that share a model out (FSDP2) train as one process does: the checks of benchmarks/fsdp.py."""

from collections.abc import Iterator

import pytest

from tests.processes import ROOT

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
def found(tiny_models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Each check's fault, empty if it passes. Its ranks are forked from a process that has imported the libraries."""
    folder = tmp_path_factory.mktemp("fsdp")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        from fsdp import save_adapter
        from fsdp_checks import check
        from fsdp_runs import Run

        save_adapter(folder, tiny_models["llama"])
        models = {"tied": tiny_models["llama"], "untied": tiny_models["qwen3"]}
        yield check(Run(folder, models, 2, "cpu"), start_method="forkserver")


@pytest.mark.parametrize("name", CHECKS)
def test_ranks_that_share_a_model_train_as_one_process_does(found: dict[str, str], name: str) -> None:
    assert found[name] == ""


def test_every_check_is_looked_at(found: dict[str, str]) -> None:
    assert set(found) == set(CHECKS)
