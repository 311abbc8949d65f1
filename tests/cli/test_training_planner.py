"""``train.py plan``: the 8B recipe fits where its header says, and errors are one line."""

import json
from pathlib import Path

import pytest

from benchmarks.ablations import configs_of
from benchmarks.planned_shapes import EIGHTH, shape
from sparsekv_pl.cli import training_planner
from sparsekv_pl.cli.training_planner import main, planned
from sparsekv_pl.models.native_precision import Decision
from sparsekv_pl.training.measured_step import MeasuredStep
from tests.processes import Started

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


def test_plan_is_a_command_of_train(folders: dict[str, Path], tmp_path: Path) -> None:
    command = ["train.py", "plan", *recipe(folders["qwen3"]), "--memory", "24GB", "--tflops", "100"]
    started = Started(command, tmp_path / "log")
    assert started.wait() == 0, started.printed
    assert "8.19 B parameters, 61.3 M trained" in started.printed
    assert "at 100 TFLOP/s a device (given)" in started.printed
    assert started.printed.splitlines()[-1].startswith("DOES NOT FIT: ")
    assert "Warning" not in started.printed and "args parameter" not in started.printed


REFUSED = {"gate": "only EITModule's steps can be planned"}
PARTS = {"fsdp", "qlora", "robust_8b", "robust_keydiff", "robust_long", "small"}
"""Files that go over others."""


def test_every_training_of_the_repository_has_a_plan_or_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also ablations with losses of their own. Models have Llama's shape, two layers deep."""
    monkeypatch.setattr(training_planner, "read_config", lambda *_: shape("llama", 2, **EIGHTH))
    runs = {path.stem: [path] for path in sorted(TRAIN.glob("*.yaml")) if path.stem not in PARTS}
    runs |= {name: configs_of(name) for name in ("base", "loss_layerwise", "loss_reconstruction", "dropout_sparse_reg")}
    refused, made = {}, {}
    for name, files in runs.items():
        try:
            made[name] = planned([f"--config={path}" for path in files], on_cpu=True).plan
        except ValueError as error:
            refused[name] = str(error)
    assert refused.keys() == REFUSED.keys() and all(REFUSED[name] in why for name, why in refused.items()), refused
    step = made["turns"].step
    assert (step.context_tokens, step.continuation_tokens, len(step.evicted_after)) == (128, 640, 4)
    assert len(made["decoding"].step.evicted_after) == 4 and made["decoding"].step.scores
    assert made["mixed_8b"].step.read_again > 40 and made["mixed_8b"].step.losing
    assert made["loss_layerwise"].step.compared_layers == 1
    assert made["kv_dropout"].step.dropout


def test_the_rate_of_this_machine_is_measured_where_the_plan_fits_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(shape("qwen3", 3, **EIGHTH).to_dict()))
    monkeypatch.setattr(MeasuredStep, "tflops", lambda *_: 0.125)
    arguments = [*recipe(tmp_path), "--device", "cpu"]
    monkeypatch.setattr(
        training_planner, "decide", lambda accelerator: Decision("16-mixed", "float16", "", accelerator)
    )
    main(arguments)
    said = capsys.readouterr().out
    assert "at 0.125 TFLOP/s a device (measured in steps of a few random layers here)" in said
    assert "numbers, float16" in said, "the precision is this machine's too"
    for memory in ("80GB", "1GB"):
        main([*arguments, "--memory", memory])
        assert "at 200 TFLOP/s a device (assumed; --tflops sets it)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--memory", "80GB", "--tflops", "0"], "--tflops is 0: give a number above 0, or measure"),
        (["--memory", "much"], "memory"),
        (["--memory", "80GB", "--model.backbone.lora=null"], "backbone.lora is null, which trains every weight"),
        (
            ["--memory", "80GB", "--model.objective=sparsekv_pl.objectives.Chunks"],
            "model.objective has Chunks, whose losses are not planned",
        ),
        (["--memory", "80GB", "--model.eviction.quantisation={bits: 4}"], "rounded pairs are not planned"),
        (
            ["--memory", "80GB", "--model.eviction.decoding={interval: 64}", "--model.eviction.checkpoint=true"],
            "decoding and checkpoint, which are planned one at a time",
        ),
        (["--memory", "80GB", "--trainer.max_steps=-1"], "trainer.max_steps is -1: give the number of steps"),
        (["--memory", "80GB", "--trainer.devices=two"], "trainer.devices is 'two': give a number"),
        (["--memory", "80GB", "--config", str(TRAIN / "fsdp.yaml")], "set data.shortest_context=null"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], said: str, folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=said) as raised:
        main([*recipe(folders["llama"]), *arguments])
    assert "\n" not in str(raised.value)


def test_a_cpu_keeps_its_own_tensors_and_a_schedule_its_least_ratio(folders: dict[str, Path]) -> None:
    gpu, cpu = (planned(recipe(folders["qwen3"]), on_cpu).plan for on_cpu in (False, True))
    assert gpu.step.compression_ratio == pytest.approx(0.3, abs=0.01)  # of Spread
    assert (str(gpu.step.dtype), str(cpu.step.dtype)) == ("torch.bfloat16", "torch.float32")
    assert not cpu.allowances and len(gpu.allowances) == 2


@pytest.mark.parametrize(
    ("given", "here", "counted"),
    [
        ("1", False, 1),
        ("2", False, 2),
        ("0,1", False, 2),
        ("0, 1, 2, 3", False, 4),
        ("3,", False, 1),
        ("[0, 1, 5]", False, 3),
        ("10", False, 10),
        ("auto", False, 1),
        ("-1", False, 1),
        ("auto", True, 4),
        ("-1", True, 4),
        ("2", True, 2),
    ],
)
def test_devices_are_counted_as_lightning_reads_them(
    given: str, here: bool, counted: int, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    arguments = [*recipe(folders["qwen3"]), "--model.backbone.dtype=bfloat16", f"--trainer.devices={given}"]
    assert planned(arguments, here=here).plan.step.devices == counted
    assert planned([*arguments, "--trainer.num_nodes=3"], here=here).plan.step.devices == 3 * counted
