"""One function decides a run's precision, on every kind of machine and for every entry point; no config sets it."""

import json
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from kvpress import KnormPress
from lightning.pytorch.accelerators import CUDAAccelerator

from evaluate import EvaluateCommandLine
from sparsekv_pl.evaluation.evaluation_module import EvaluationModule
from sparsekv_pl.evaluation.points import Setting
from sparsekv_pl.eviction.real import RealEviction
from sparsekv_pl.models import native_precision
from sparsekv_pl.models.backbone import Backbone
from sparsekv_pl.models.memory_planner import plan
from sparsekv_pl.models.native_precision import Machine, decide, probe
from sparsekv_pl.training.eit_module import EITModule
from tests.tiny_training import MakeBackbone, MakeCases, MakeData, MakeTrainer
from train import TrainCommandLine

ROOT = Path(__file__).parents[2]
Pretend = Callable[[Machine], None]


def cpu(*instructions: str, onednn: bool) -> Machine:
    return Machine("cpu", "this CPU", instructions=frozenset(instructions), onednn=onednn)


T4 = Machine("cuda", "Tesla T4", (7, 5))
A100 = Machine("cuda", "NVIDIA A100", (8, 0))
ORDINARY = cpu("avx2", onednn=False)
NATIVE = cpu("avx512_f", "avx512_bf16", onednn=True)
MACHINES: dict[str, tuple[Machine, str, str]] = {
    "GPU of 7.5": (T4, "16-mixed", "float16"),
    "GPU of 8.0": (A100, "bf16-mixed", "bfloat16"),
    "GPU of 10.0": (Machine("cuda", "NVIDIA B200", (10, 0)), "bf16-mixed", "bfloat16"),
    "Apple's GPU": (Machine("mps", "mps"), "32-true", "float32"),
    "AVX2": (ORDINARY, "32-true", "float32"),
    "AVX-512 that oneDNN converts for": (cpu("avx512_f", onednn=True), "32-true", "float32"),
    "AVX512-BF16": (NATIVE, "bf16-mixed", "bfloat16"),
    "AVX512-BF16 kept from oneDNN": (cpu("avx512_bf16", onednn=False), "32-true", "float32"),
    "AMX": (cpu("amx_tile", "amx_bf16", onednn=True), "bf16-mixed", "bfloat16"),
    "Arm with bf16": (cpu("neon", "bf16", onednn=True), "bf16-mixed", "bfloat16"),
    "Arm without": (cpu("neon", onednn=False), "32-true", "float32"),
    "Arm whose torch has no oneDNN": (cpu("neon", "bf16", onednn=False), "32-true", "float32"),
}
"""Each kind of machine, its precision and its dtype."""


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pretend]:
    """Simulate other machines."""
    native_precision._warn_of_emulation.cache_clear()
    yield lambda machine: monkeypatch.setattr(native_precision, "probe", lambda *_, **__: machine)
    native_precision._warn_of_emulation.cache_clear()


@pytest.mark.parametrize(("machine", "precision", "dtype"), MACHINES.values(), ids=MACHINES)
def test_the_default_is_what_the_machine_computes_natively(
    machine: Machine, precision: str, dtype: str, pretend: Pretend, recwarn: pytest.WarningsRecorder
) -> None:
    pretend(machine)
    made = decide()
    assert (made.precision, made.dtype) == (precision, dtype)
    assert str(made) == f"precision: {precision} over {dtype} weights ({machine})"
    assert plan("smollm2-135m-instruct", 10).dtype == dtype
    assert not recwarn.list


def test_weights_that_all_train_stay_float32_beside_a_scaler_and_shards_have_none(pretend: Pretend) -> None:
    pretend(T4)
    assert decide(every_weight=True).dtype == "float32"
    assert decide(sharded=True).precision == "32-true"
    pretend(A100)
    assert decide(every_weight=True, sharded=True).dtype == "bfloat16"


@pytest.mark.parametrize(
    ("given", "precision", "dtype"),
    [
        ({"precision": "32-true"}, "32-true", "float32"),
        ({"precision": 16}, "16", "float16"),
        ({"precision": "bf16-true"}, "bf16-true", "bfloat16"),
        ({"dtype": "float32"}, "bf16-mixed", "float32"),
        ({"precision": "32-true", "dtype": "bfloat16"}, "32-true", "bfloat16"),
    ],
)
def test_what_was_given_wins(given: dict[str, Any], precision: str, dtype: str, pretend: Pretend) -> None:
    pretend(NATIVE)
    made = decide(**given)
    assert (made.precision, made.dtype) == (precision, dtype)
    assert ("given" in str(made)) == ("precision" in given)


def test_torch_is_asked_and_the_oldest_gpu_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    here = probe("cpu")
    assert here.device == "cpu"
    assert here.instructions
    onednn = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert here.onednn == onednn
    gpus = {0: ("NVIDIA A100", (8, 0)), 1: ("Tesla T4", (7, 5))}
    monkeypatch.setattr(CUDAAccelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda gpu: gpus[gpu][0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: gpus[gpu][1])
    assert [probe(name) for name in ("auto", "gpu", "cuda", "cpu")] == [T4, T4, T4, here]


ENTRIES: dict[str, tuple[Any, str, str]] = {
    "train": (TrainCommandLine, "fit", "quickstart"),
    "validate": (TrainCommandLine, "validate", "quickstart"),
    "gate": (TrainCommandLine, "fit", "train/gate"),
    "evaluate": (EvaluateCommandLine, "test", "evaluate/quickstart"),
    "lm-eval": (EvaluateCommandLine, "test", "evaluate/lm_eval"),
    "long context": (EvaluateCommandLine, "test", "evaluate/million"),
    "predict": (EvaluateCommandLine, "predict", "analyze/statistics"),
}


@pytest.fixture
def settings_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Return a function (entry, arguments) -> its settings as they are saved, without running, and its output."""

    def nothing(*_: Any) -> None:
        pass

    def made(entry: str, *arguments: str) -> tuple[Any, list[str]]:
        command_line, command, config = ENTRIES[entry]
        said: list[str] = []
        with monkeypatch.context() as patch:
            patch.setattr("sys.argv", [command])
            patch.setattr(command_line, "instantiate_classes", nothing)
            patch.setattr(command_line, "_run_subcommand", nothing)
            patch.setattr("sparsekv_pl.training.precision.rank_zero_info", said.append)
            cli = command_line(args=[command, "--config", str(ROOT / "configs" / f"{config}.yaml"), *arguments])
        return cli.config[command], said

    return made


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_asks_the_one_function_saves_its_answer_and_says_it(
    entry: str, settings_of: Callable[..., Any], pretend: Pretend
) -> None:
    for machine, precision, dtype in [MACHINES["AVX2"], MACHINES["GPU of 7.5"]]:
        pretend(machine)
        settings, said = settings_of(entry)
        assert (settings.trainer.precision, settings.model.init_args.backbone.dtype) == (precision, dtype)
        assert said == [f"precision: {precision} over {dtype} weights ({machine})"]


def test_the_command_line_wins_and_a_plugin_too(settings_of: Callable[..., Any], pretend: Pretend) -> None:
    pretend(NATIVE)
    settings, said = settings_of("train", "--trainer.precision=32-true")
    assert (settings.trainer.precision, settings.model.init_args.backbone.dtype) == ("32-true", "float32")
    assert said == ["precision: 32-true over float32 weights (given)"]
    settings, _ = settings_of("train", "--model.backbone.dtype=float32")
    assert (settings.trainer.precision, settings.model.init_args.backbone.dtype) == ("bf16-mixed", "float32")
    plugin = [
        "--trainer.plugins=MixedPrecision",
        "--trainer.plugins.precision=16-mixed",
        "--trainer.plugins.device=cpu",
    ]
    settings, _ = settings_of("train", *plugin, "--model.backbone.lora=null")
    assert (settings.trainer.precision, settings.model.init_args.backbone.dtype) == (None, "float32")


def test_bfloat16_where_it_is_emulated_warns_once_wherever_it_was_asked_for(
    pretend: Pretend,
    tiny_backbone: MakeBackbone,
    tiny_data: MakeData,
    tiny_cases: MakeCases,
    tiny_trainer: MakeTrainer,
    settings_of: Callable[..., Any],
    tmp_path: Path,
) -> None:
    def fit() -> None:
        module = EITModule(tiny_backbone(), RealEviction(KnormPress()))
        module.compression_ratio = 0.5
        tiny_trainer(precision="bf16-mixed", max_steps=1).fit(module, tiny_data())

    def test() -> None:
        module = EvaluationModule(tiny_backbone(), [], str(tmp_path))
        tiny_trainer(precision="bf16-mixed").test(module, tiny_cases(windows=0), verbose=False)

    asking: list[Callable[[], object]] = [
        lambda: settings_of("evaluate", "--trainer.precision=bf16-true"),
        lambda: settings_of("predict", "--model.backbone.dtype=bfloat16"),
        lambda: tiny_backbone(dtype="bfloat16").load(),
        fit,
        test,
    ]
    for ask in asking:
        pretend(ORDINARY)
        native_precision._warn_of_emulation.cache_clear()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ask()
            decide(dtype="bfloat16")
        emulated = [str(warning.message) for warning in caught if "emulates" in str(warning.message)]
        assert len(emulated) == 1, ask
        assert re.search(r"this CPU emulates: .* \d+ to \d+ times .*Leave precision and dtype out", emulated[0])
    pretend(T4)
    with pytest.warns(UserWarning, match=r"Tesla T4 emulates\. .*give precision 16-mixed"):
        decide("bf16-mixed")


def test_reports_keys_and_exports_hold_what_was_decided(
    pretend: Pretend, tiny_backbone: MakeBackbone, tiny_cases: MakeCases, tiny_trainer: MakeTrainer, tmp_path: Path
) -> None:
    """Results of one machine are not reused on another."""
    for count, (machine, precision, dtype) in enumerate([MACHINES["AVX512-BF16"], MACHINES["AVX2"]], start=1):
        pretend(machine)
        module = EvaluationModule(tiny_backbone(dtype="auto"), [Setting(KnormPress(), [0.5])], str(tmp_path))
        assert module.model.dtype == getattr(torch, dtype)
        data = tiny_cases(windows=0, depths=[0.0], cases_per_cell=1)
        tiny_trainer(precision=decide().precision).test(module, data, verbose=False)
        environment = json.loads((tmp_path / "report.json").read_text())["environment"]
        assert (environment["precision"], environment["dtype"]) == (precision, dtype)
        lines = [line for file in (tmp_path / "results").iterdir() for line in file.read_text().splitlines()]
        assert len({json.loads(line)["key"] for line in lines}) == 3 * count  # full cache, Knorm, and the view
        trains = EITModule(tiny_backbone(dtype="auto"), RealEviction(KnormPress(0.5)))
        assert trains.describe_training()["dtype"] == dtype


def test_a_backbone_alone_follows_the_machine(pretend: Pretend, tiny_models: dict[str, str]) -> None:
    pretend(T4)
    assert Backbone(tiny_models["llama"]).load()[0].dtype == torch.float16
    assert Backbone(tiny_models["llama"], lora=None).load(trainable=False)[0].dtype == torch.float16
    assert Backbone(tiny_models["llama"], lora=None).load()[0].dtype == torch.float32


def fixed(node: Any, path: str = "") -> Iterator[str]:
    """Where a config sets a precision or a dtype."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        if key in ("precision", "dtype"):
            yield f"{path}{key}={value}"
        yield from fixed(value, f"{path}{key}.")


COMPARED = {
    "benchmarks/bfloat16.py": "bfloat16 over float32",
    "benchmarks/block_sparse.py": "both, side by side",
    "benchmarks/chunked_loss.py": "both, side by side",
    "benchmarks/kv_dropout.py": "both, side by side",
    "benchmarks/kvpress_pipeline.py": "one for both sides, asked for; float32 otherwise",
    "benchmarks/quickstart_profile.py": "each, over its own products",
    "benchmarks/gpu_attention.py": "the reference in float32, the time in what GPUs of today train in",
    "benchmarks/gpu_models.py": "what GPUs of today train in",
    "benchmarks/gpu_parts.py": "what GPUs of today train in",
    "benchmarks/fsdp_checks.py": "each precision against one process",
    "benchmarks/fsdp_runs.py": "each precision's tolerance",
}
"""What names a precision, and why."""


def test_nothing_shipped_fixes_a_precision_without_a_reason() -> None:
    configs = [path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "lm_eval_tasks"]
    assert len(configs) > 40
    found = {path.name: list(fixed(yaml.safe_load(path.read_text()))) for path in configs}
    assert not {name: keys for name, keys in found.items() if keys}
    code = [*(ROOT / "notebooks").glob("*.ipynb"), *(ROOT / "benchmarks").glob("*.py")]
    naming = {path.relative_to(ROOT).as_posix() for path in code if re.search(r"bfloat16|bf16-", "".join(_code(path)))}
    assert naming == set(COMPARED)


def _code(path: Path) -> Iterator[str]:
    if path.suffix == ".py":
        yield path.read_text()
        return
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            yield "".join(cell["source"])
