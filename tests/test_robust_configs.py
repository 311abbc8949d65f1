"""The robust recipe's overlays, of trainings and of evaluations, on a tiny model."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from data.mixed_text import MixedText
from tests.config_cases import CONFIGS, OVER, ROBUST, check_training, instantiate, make_text_files

TRAIN = CONFIGS / "train"
ROBUST_8B = TRAIN / "robust_8b.yaml"


@pytest.fixture(scope="module")
def adapter(tiny_adapter: Callable[..., str]) -> str:
    return tiny_adapter(0)


@pytest.mark.parametrize("path", [path for path in OVER if path.parent != TRAIN], ids=lambda path: path.stem)
@pytest.mark.usefixtures("elsewhere")
def test_every_overlay_of_an_evaluation_changes_what_it_goes_over(
    path: Path, tiny_models: dict[str, str], adapter: str
) -> None:
    arguments = [f"--model.backbone.pretrained={tiny_models['llama']}", f"--model.backbone.adapter={adapter}"]
    made = instantiate(OVER[path], *arguments, over=[path])
    assert made.model.output == Path("output", "robust", yaml.safe_load(path.read_text())["report"])
    assert not getattr(made.model, "card", False), "the card keeps the table of robust.yaml"
    if path.stem == "robust_64k":
        assert (made.model.budget, made.datamodule.lengths, len(made.datamodule.depths)) == (2048, [64_000], 10)
        return
    asked = made.datamodule.cases_per_cell * len(made.datamodule.depths)
    assert asked == (20 if path.stem == "robust_ceiling" else 100)
    assert made.datamodule.cases_without_depth == {"robust_ruler": 100, "robust_ceiling": 2}.get(path.stem, 10)


@pytest.mark.usefixtures("elsewhere")
def test_the_recipe_holds_the_base_in_text_that_it_samples(tiny_models: dict[str, str]) -> None:
    make_text_files(ROBUST)
    made = instantiate(ROBUST, f"--model.backbone.pretrained={tiny_models['llama']}")
    objective = made.model.objective
    assert objective.request.first_chunk and not objective.request.full_cache
    assert (objective.weights, objective.objectives[2].objective.kl_weight) == ([1, 10, 0.1], 100)
    texts = ("moby-dick", "factbook", "sampled")
    assert made.datamodule.text.sources[1].paths == [f"output/{text}.jsonl" for text in texts]
    assert (made.model.backbone.lora.r, made.trainer.max_steps) == (32, 300)


@pytest.mark.usefixtures("elsewhere")
def test_the_headline_is_trained_with_keydiff_alone(tiny_models: dict[str, str]) -> None:
    alone = TRAIN / "robust_keydiff.yaml"
    make_text_files(OVER[alone])
    made = instantiate(OVER[alone], f"--model.backbone.pretrained={tiny_models['llama']}", over=[alone])
    assert [type(press).__name__ for press in made.model.press.presses] == ["KeyDiffPress"]
    assert (made.datamodule.context_tokens, made.trainer.max_steps) == (512, 100)


@pytest.mark.usefixtures("elsewhere")
def test_longer_contexts_go_on_from_the_adapter(tiny_models: dict[str, str], adapter: str) -> None:
    longer = TRAIN / "robust_long.yaml"
    make_text_files(OVER[longer])
    tiny = [f"--model.backbone.pretrained={tiny_models['llama']}", f"--model.backbone.adapter={adapter}"]
    made = instantiate(OVER[longer], *tiny, over=[longer])
    check_training(made)
    assert made.model.backbone.lora is None
    assert (made.datamodule.shortest_context, made.datamodule.context_tokens) == (1024, 4096)
    named = yaml.safe_load(longer.read_text())["model"]["init_args"]["backbone"]["adapter"]
    assert (CONFIGS.parent / named / "adapter_config.json").is_file()


@pytest.mark.parametrize(
    ("over", "extra"),
    [
        ([], []),
        (
            ["qlora.yaml"],
            [
                *("--data.context_tokens=2048", "--model.backbone.load_in_4bit=false"),
                *("--model.eviction.chunk_tokens=512", "--model.eviction.checkpoint=true"),
            ],
        ),
        (
            ["fsdp.yaml"],
            ["--trainer.accelerator=cpu", "--trainer.accumulate_grad_batches=1", "--data.shortest_context=null"],
        ),
    ],
)
@pytest.mark.usefixtures("elsewhere")
def test_the_8b_recipe_has_the_presses_of_the_robust_one_on_one_gpu_in_4_bits_and_sharded(
    over: list[str], extra: list[str], tiny_models: dict[str, str]
) -> None:
    pretrained = f"--model.backbone.pretrained={tiny_models['llama']}"
    made = instantiate(OVER[ROBUST_8B], pretrained, *extra, over=[ROBUST_8B, *(TRAIN / name for name in over)])
    make_text_files(OVER[ROBUST_8B])
    small = instantiate(OVER[ROBUST_8B], pretrained)
    check_training(made)
    assert made.model.eviction.press.presses == small.model.eviction.press.presses
    assert made.model.objective == small.model.objective
    assert isinstance(made.datamodule.text, MixedText)
    assert made.trainer.world_size * made.trainer.accumulate_grad_batches * made.datamodule.batch_size == 8
