"""``train.py plan``: the 8B recipe fits where its header says, and errors are one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.planned_shapes import shape
from sparsekv_pl.cli.training_planner import main, planned

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "configs" / "train"
RECIPE = TRAIN / "robust_8b.yaml"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with the configurations of Qwen3-8B and Llama-3.1-8B, and nothing else."""
    made = {}
    for kind in ("qwen3", "llama"):
        made[kind] = tmp_path_factory.mktemp(kind)
        (made[kind] / "config.json").write_text(json.dumps(shape(kind).to_dict()))
    return made


def commands() -> dict[str, list[str]]:
    """Device -> the arguments in the recipe's header."""
    lines = [line.removeprefix("#").strip() for line in RECIPE.read_text().splitlines() if line.startswith("#")]
    found = {}
    for line in lines:
        size, _, command = line.partition(": ... ")
        if command and not size.startswith("Llama"):
            found[size] = [str(ROOT / word) if word.startswith("configs/") else word for word in command.split()]
    return found


def recipe(folder: Path, *more: str) -> list[str]:
    return [
        "--config",
        str(TRAIN / "robust.yaml"),
        "--config",
        str(RECIPE),
        *more,
        f"--model.backbone.pretrained={folder}",
    ]


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
@pytest.mark.parametrize(("size", "memory"), [("80 GB", "80GB"), ("24 GB", "24GB"), ("8 of 80 GB, sharded", "80GB")])
def test_the_8b_recipe_fits_where_its_header_says(
    kind: str, size: str, memory: str, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    main([*recipe(folders[kind], *commands().get(size, [])), "--memory", memory])
    said = capsys.readouterr().out
    assert "\nfits: " in said
    assert "600 steps of 8 rows" in said
    assert ("sharded" in said) is (size.startswith("8 of"))


def test_plan_is_a_command_of_train(folders: dict[str, Path]) -> None:
    command = [sys.executable, "train.py", "plan", *recipe(folders["qwen3"]), "--memory", "24GB", "--tflops", "100"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "8.19 B parameters, 61.3 M trained" in ran.stdout
    assert "at 100 TFLOP/s a device (given)" in ran.stdout
    assert ran.stdout.splitlines()[-1].startswith("DOES NOT FIT: ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--memory", "80GB", "--tflops", "0"], "--tflops is 0: give a number above 0, or measure"),
        (["--memory", "much"], "memory"),
        (["--memory", "80GB", "--model.backbone.lora=null"], "backbone.lora is null, which trains every weight"),
        (
            ["--memory", "80GB", "--model.eviction=sparsekv_pl.eviction.dropout.KVDropout"],
            "model.eviction is KVDropout: only RealEviction's",
        ),
        (
            ["--memory", "80GB", "--model.eviction.decoding={interval: 64}"],
            "model.eviction.decoding is set: evictions in the continuation are not planned",
        ),
        (
            ["--memory", "80GB", "--model.objective=sparsekv_pl.objectives.Layerwise"],
            "model.objective asks for layers, which is not planned",
        ),
        (["--memory", "80GB", "--trainer.max_steps=-1"], "trainer.max_steps is -1: give the number of steps"),
        (["--memory", "80GB", "--config", str(TRAIN / "fsdp.yaml")], "set data.shortest_context=null"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], said: str, folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=said) as raised:
        main([*recipe(folders["llama"]), *arguments])
    assert "\n" not in str(raised.value)


def test_a_cpu_keeps_its_own_tensors_and_a_schedule_its_least_ratio(folders: dict[str, Path]) -> None:
    gpu, cpu = planned(recipe(folders["qwen3"])), planned(recipe(folders["qwen3"]), on_cpu=True)
    assert gpu.step.compression_ratio == pytest.approx(0.3, abs=0.01)  # of Spread
    assert (str(gpu.step.dtype), str(cpu.step.dtype)) == ("torch.bfloat16", "torch.float32")
    assert not cpu.allowances and len(gpu.allowances) == 2
