"""Every file under configs/ is parsed and instantiated; the quickstart's two commands run on a tiny model."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.strategies import ModelParallelStrategy

from benchmarks.ablations import configs_of, names
from data.text import EmbeddedText
from evaluate import EvaluateCommandLine
from sparsekv_pl.models.native_precision import decide
from tests.config_cases import OVER, check_training, instantiate, make_text_files
from tests.processes import Started
from train import TrainCommandLine

ROOT = Path(__file__).parents[1]
TRAIN = ROOT / "configs" / "train"
SMALL = TRAIN / "small.yaml"
"""Goes over the configs that need a GPU and a hub, and makes each its small twin."""
FSDP = TRAIN / "fsdp.yaml"
"""Goes over a training config too, and shares its model out over eight GPUs."""
OVERLAYS = {SMALL, FSDP, TRAIN / "qlora.yaml", *OVER, *(TRAIN / "ablations").glob("*.yaml")}
CONFIGS = sorted(
    path for path in set((ROOT / "configs").rglob("*.yaml")) - OVERLAYS if path.parent.name != "lm_eval_tasks"
)
LARGE = [path for path in CONFIGS if "configs/train/small.yaml" in path.read_text()]


@pytest.fixture(scope="module")
def adapter(tiny_adapter: Callable[..., str]) -> str:
    return tiny_adapter(0)


def test_there_are_configs() -> None:
    assert {path.relative_to(ROOT / "configs").as_posix() for path in CONFIGS} >= {
        "quickstart.yaml",
        *(
            f"evaluate/{name}.yaml"
            for name in ("quickstart", "retention", "niah", "matrix", "million", "hosted", "lm_eval")
        ),
        *(f"analyze/{name}.yaml" for name in ("statistics", "oracle", "collect", "sketchwalk", "compare", "anchors")),
        *(f"train/{name}.yaml" for name in ("gate", "kv_dropout", "cross_transfer")),
        *(f"train/{name}_dropout_{size}.yaml" for name, size in (("block", "1b"), ("block", "8b"), ("adaptive", "8b"))),
        *(f"train/{name}_8b.yaml" for name in ("mixed", "eit_qwen3", "eit_llama31")),
    }
    assert len(LARGE) == 6
    assert {name.partition("_")[0] for name in names()} == {
        *("base", "loss", "lambda", "steps", "anchors", "ratio", "selection", "press", "dropout"),
    }


@pytest.mark.usefixtures("elsewhere")
def test_a_training_is_sharded_over_as_many_ranks_as_share_the_data(tiny_models: dict[str, str]) -> None:
    arguments = [f"--model.backbone.pretrained={tiny_models['llama']}", "--trainer.accelerator=cpu"]
    made = instantiate(TRAIN / "eit_qwen3_8b.yaml", *arguments, over=[SMALL, FSDP])
    check_training(made)
    strategy = made.trainer.strategy
    assert isinstance(strategy, ModelParallelStrategy)
    assert (strategy._data_parallel_size, strategy._tensor_parallel_size) == (made.trainer.world_size, 1)
    assert made.trainer.world_size == 8
    assert all(parameter.is_meta for parameter in made.model.parameters())


@pytest.mark.parametrize("path", LARGE, ids=lambda path: path.stem)
@pytest.mark.usefixtures("elsewhere")
def test_every_large_training_has_a_small_twin(path: Path, tiny_models: dict[str, str]) -> None:
    large = yaml.safe_load(path.read_text())["model"]["init_args"]
    made = instantiate(path, f"--model.backbone.pretrained={tiny_models['llama']}", over=[SMALL])
    check_training(made)
    assert made.trainer.max_steps == 40
    assert isinstance(made.datamodule.text, EmbeddedText)
    assert type(made.model.eviction).__name__ == large["eviction"]["class_path"].rpartition(".")[2]


@pytest.mark.parametrize("name", names())
@pytest.mark.usefixtures("elsewhere")
def test_every_ablation_changes_something(name: str, tiny_models: dict[str, str]) -> None:
    start, *over = configs_of(name)
    made = instantiate(start, f"--model.backbone.pretrained={tiny_models['llama']}", over=over)
    check_training(made)
    if name == "base":
        return
    changed = yaml.safe_load(over[-1].read_text())
    assert set(changed) <= {"model", "trainer"}
    if "trainer" not in changed:
        assert made.trainer.max_steps == 40


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.relative_to(ROOT / "configs").as_posix())
@pytest.mark.usefixtures("elsewhere")
def test_every_config_is_instantiated(path: Path, tiny_models: dict[str, str], adapter: str) -> None:
    config = yaml.safe_load(path.read_text())
    settings = config["model"]["init_args"]
    backbone = settings.get("backbone")
    overrides = []
    if backbone is not None or "tokenizer" in settings:
        overrides = [f"--model.{'tokenizer' if backbone is None else 'backbone.pretrained'}={tiny_models['llama']}"]
    if backbone is not None and backbone.get("adapter"):
        overrides.append(f"--model.backbone.adapter={adapter}")
    if backbone is not None and backbone.get("load_in_4bit"):
        overrides += ["--model.backbone.load_in_4bit=false", "--model.backbone.placement=null"]
    if settings.get("gates"):
        overrides.append("--model.gates=null")
    make_text_files(path)
    if settings.get("include_path"):  # from the checkout; the test stands elsewhere
        overrides.append(f"--model.include_path={ROOT / settings['include_path']}")
    made = instantiate(path, *overrides)
    if isinstance(made, EvaluateCommandLine):
        assert made.model.output == Path("output", config.get("name", ""), config.get("report", ""))
    else:
        check_training(made)
    if backbone is not None or "tokenizer" in settings:
        assert made.model.tokenizer.encode("text")


def start(log: Path, *command: str) -> str:
    """What the command printed."""
    process = Started([*command], log)
    assert process.wait() == 0, process.printed[-2000:]
    return process.printed


TINY_RUN = [
    "--model.backbone.dtype=float32",
    "--data.continuation_tokens=16",
    "--data.batch_size=2",
    "--trainer.accelerator=cpu",
]


@pytest.fixture(scope="module")
def quickstart(tiny_models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The output folder of train.py's quickstart, two steps long, and the arguments that it was started with."""
    folder = tmp_path_factory.mktemp("quickstart")
    arguments = ["fit", "--config", str(ROOT / "configs" / "quickstart.yaml"), *TINY_RUN, "--data.context_tokens=96"]
    arguments += [f"--model.backbone.pretrained={tiny_models['llama']}"]
    arguments += [f"--name={folder}", "--data.validation_windows=2", "--data.validation_needles=2"]
    arguments += ["--trainer.max_steps=2", "--trainer.val_check_interval=2", "--model.lr_scheduler.total_steps=9"]
    arguments += ["--trainer.callbacks.every_n_train_steps=1"]  # of the last callback, the ModelCheckpoint
    start(folder.with_suffix(".log"), "train.py", *arguments)
    return folder, arguments


def test_the_quickstart_exports_what_it_trained(
    quickstart: tuple[Path, list[str]], tiny_models: dict[str, str]
) -> None:
    folder, _ = quickstart
    final = {path.name for path in (folder / "final").iterdir()}
    assert final >= {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert final >= {"curriculum.json", "training.json", "config.yaml"}
    assert (folder / "checkpoint-2" / "adapter_model.safetensors").exists()
    assert list(folder.glob("events.out.tfevents.*"))
    resolved = yaml.safe_load((folder / "final" / "config.yaml").read_text())
    assert resolved["trainer"]["max_steps"] == 2
    summary = json.loads((folder / "final" / "training.json").read_text())
    assert resolved["trainer"]["precision"] == summary["precision"] == decide(accelerator="cpu").precision
    assert resolved["model"]["init_args"]["backbone"]["dtype"] == summary["dtype"] == "float32"
    assert resolved["model"]["init_args"]["backbone"]["pretrained"] == tiny_models["llama"]


def test_the_quickstart_ends_in_a_report(quickstart: tuple[Path, list[str]], tiny_models: dict[str, str]) -> None:
    arguments = ["--config", "configs/evaluate/quickstart.yaml", *TINY_RUN]
    arguments += [f"--model.backbone.pretrained={tiny_models['llama']}"]
    arguments += [f"--name={quickstart[0]}", "--report=table"]
    arguments += ["--data.lengths=[96]", "--data.windows=2", "--data.depths=[0.2, 0.8]", "--data.cases_per_cell=1"]
    said = start(quickstart[0].with_suffix(".log"), "evaluate.py", "test", *arguments)
    table = quickstart[0] / "table"
    assert all((table / f"report.{kind}").stat().st_size > 0 for kind in ("json", "csv", "md", "png"))
    assert list(table.glob("events.out.tfevents.*"))
    report = json.loads((table / "report.json").read_text())
    assert report["training"]["steps"] == 2
    seen = {row["press"]: row["seen_in_training"] for row in report["rows"]}
    assert all(press in said for press in seen)
    assert [press for press, was in seen.items() if not was and press != "full cache"] == ["TOVA"]
    assert any(seen.values())
    assert {row["metric"] for row in report["rows"]} == {"needle_accuracy", "perplexity"}
    assert all(row["trained"] is not None for row in report["rows"])


@pytest.mark.usefixtures("elsewhere")
def test_the_quickstart_resumes_from_last_and_merges(quickstart: tuple[Path, list[str]]) -> None:
    folder, arguments = quickstart
    more = ["--trainer.max_steps=3", "--ckpt_path=last", "--merge", "--trainer.enable_progress_bar=false"]
    resumed = TrainCommandLine(args=[*arguments, *more], save_config_kwargs={"overwrite": True})
    assert resumed.trainer.ckpt_path == str(folder / "checkpoints" / "step=2.ckpt")
    assert json.loads((folder / "final" / "training.json").read_text())["steps"] == 3
    assert (folder / "merged" / "model.safetensors").exists()
