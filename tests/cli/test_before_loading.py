"""What needs no weights is refused before weights are read: paths, data, trainers, presses, tasks, gates."""

import re
from pathlib import Path

import pytest
import yaml

from evaluate import EvaluateCommandLine
from sparsekv_pl.models.backbone import Backbone
from tests.refusals import refusal
from train import TrainCommandLine

CONFIGS = Path(__file__).parents[2] / "configs"


def with_backbone() -> dict[str, Path]:
    """Model class -> the first config that runs it on a backbone."""
    found: dict[str, Path] = {}
    for path in sorted(CONFIGS.glob("*.yaml")) + sorted(CONFIGS.glob("*/*.yaml")):
        model = (yaml.safe_load(path.read_text()) or {}).get("model", {})
        if "class_path" in model and model["init_args"].get("backbone"):
            found.setdefault(model["class_path"].rpartition(".")[2], path)
    return found


MODELS = with_backbone()


@pytest.fixture(autouse=True)
def no_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("_model", "_skeleton"):
        monkeypatch.setattr(Backbone, name, lambda *_, **__: pytest.fail("the weights were read"))
    monkeypatch.setattr("sys.argv", ["pytest"])
    monkeypatch.chdir(tmp_path)


def refused(path: Path, *arguments: str) -> str:
    folder = path.relative_to(CONFIGS).parts[0]
    line = EvaluateCommandLine if folder in ("evaluate", "analyze") else TrainCommandLine
    command = {"evaluate": "test", "analyze": "predict"}.get(folder, "fit")
    return refusal(line, command, f"--config={path}", *arguments)


def test_every_model_is_among_them() -> None:
    assert MODELS.keys() == {
        *("EITModule", "GateDistillation", "EvaluationModule", "LMEvalModule", "LongContextModule", "EvictionViewer"),
        *("AnchorAnalysis", "AttentionStatisticsAnalysis", "BlockComparison", "OracleBlocks", "TensorCollection"),
    }


@pytest.mark.parametrize("model", MODELS)
def test_a_missing_adapter(model: str, tiny_models: dict[str, str]) -> None:
    config = yaml.safe_load(MODELS[model].read_text())["model"]["init_args"]
    given = [f"--model.backbone.pretrained={tiny_models['llama']}", "--model.backbone.adapter=nowhere"]
    given += ["--model.gates=null"] if config.get("gates") else []
    given += [f"--model.include_path={CONFIGS.parent / config['include_path']}"] if config.get("include_path") else []
    said = refused(MODELS[model], *given)
    assert "adapter='nowhere': there is no such folder; give one that a training run exported" in said


OWN_TEXT = "{class_path: data.text.LocalText, init_args: {paths: [nowhere.txt]}}"
OWN_QUESTION = "{class_path: data.own_question.OwnQuestion, init_args: {path: nowhere.txt, question: Who}}"
OBSERVED = "[{press: {class_path: kvpress.ObservedAttentionPress}, compression_ratios: [0.5]}]"
MISTAKES = {
    "a length": ("EvaluationModule", ["--data.lengths=[0]"], "lengths has 0"),
    "a text": ("EITModule", [f"--data.text={OWN_TEXT}"], "nowhere.txt: not readable .there is no such file"),
    "a question's text": ("EvictionViewer", [f"--data.source={OWN_QUESTION}"], "nowhere.txt: not readable"),
    "a strategy": ("EITModule", ["--trainer.strategy=nonsense"], "trainer: .*invalid strategy name"),
    "gates": ("BlockComparison", ["--model.gates=nowhere"], "gates=nowhere: there is no such folder"),
    "a press": ("EvaluationModule", [f"--model.settings={OBSERVED}"], "ObservedAttention reads attention weights"),
    "a press in chunks": (
        "LongContextModule",
        ["--model.press=kvpress.ObservedAttentionPress"],
        "ObservedAttention reads attention weights",
    ),
    "a press in training": (
        "EITModule",
        ["--model.eviction.press=kvpress.ObservedAttentionPress", "--model.objective=sparsekv_pl.objectives.EIT"],
        "ObservedAttention reads attention weights",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake(mistake: str) -> None:
    model, arguments, message = MISTAKES[mistake]
    assert re.search(message, refused(MODELS[model], *arguments))
