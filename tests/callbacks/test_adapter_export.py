"""What training leaves behind: the folders, and that others load them and compute the same."""

import json
import re
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import yaml
from kvpress import KnormPress, KVPressTextGenerationPipeline, SnapKVPress
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from callbacks.adapter_export import AdapterExport
from callbacks.curriculum import Curriculum
from data.collate import needle_batch
from data.mixture import EvictionData
from data.needles import NeedleCase
from sparsekv_pl.eviction.real import RealEviction
from sparsekv_pl.models.backbone import Backbone, causal_lm
from sparsekv_pl.models.batch import tokens_given
from sparsekv_pl.models.lora import Lora
from sparsekv_pl.schedules import Linear
from sparsekv_pl.training.eit_module import EITModule
from tests.callbacks.checkpoint_cases import names
from tests.processes import Started
from tests.tiny_training import MakeBackbone, MakeData, MakeTrainer

ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}
ALWAYS = {
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    *("curriculum.json", "training.json", "README.md"),
}

RELOAD = """
import sys, torch
from kvpress import KVPressTextGenerationPipeline, KnormPress
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, folder, ids, out = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
pipeline = KVPressTextGenerationPipeline(model=model.get_base_model(), tokenizer=tokenizer)
answer = pipeline("A long text. " * 20, question="What?", press=KnormPress(0.5), max_new_tokens=3)["answer"]
with torch.no_grad():
    torch.save((model(torch.load(ids)).logits, tokenizer.encode("Naive <s> text\\n"), answer), out)
"""


def ids() -> Tensor:
    return torch.randint(2, 1024, (2, 24), generator=torch.Generator().manual_seed(0))


def logits(model: Any) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(ids()).logits


def untrained(backbone: Backbone) -> EITModule:
    """Learns at a rate that changes the model clearly in a few steps."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        eviction = RealEviction(SnapKVPress(window_size=8))
        return EITModule(backbone, eviction, optimizer=lambda p: torch.optim.SGD(p, lr=3.0))


def train(folder: Path, backbone: Backbone, data: EvictionData, make: MakeTrainer, merge: bool = False) -> EITModule:
    """Five steps, with a checkpoint every second one."""
    callbacks = (
        Curriculum(Linear(0.2, 0.6, steps=4)),
        ModelCheckpoint(folder / "checkpoints", every_n_train_steps=2, save_top_k=-1, save_last=True),
        AdapterExport(str(folder), merge=merge),
    )
    module = untrained(backbone)
    make(*callbacks, enable_checkpointing=True, max_steps=5).fit(module, data)
    return module


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_backbone: MakeBackbone,
    tiny_data: MakeData,
    tiny_trainer: MakeTrainer,
) -> tuple[Path, EITModule]:
    """A finished run's folder and its module."""
    folder = tmp_path_factory.mktemp("run")
    return folder, train(folder, tiny_backbone(), tiny_data(), tiny_trainer)


def test_every_checkpoint_and_the_end_are_exported_whole(run: tuple[Path, EITModule]) -> None:
    folder, _ = run
    assert names(folder) == {"checkpoints", "checkpoint-2", "checkpoint-4", "final"}
    for name in ("checkpoint-2", "checkpoint-4", "final"):
        assert names(folder / name) >= ADAPTER | ALWAYS


def test_an_export_says_how_it_was_trained(run: tuple[Path, EITModule], tiny_models: dict[str, str]) -> None:
    folder, module = run
    states = [
        json.loads((folder / name / "curriculum.json").read_text())
        for name in ("checkpoint-2", "checkpoint-4", "final")
    ]
    assert [state["step"] for state in states] == [2, 4, 5]
    assert [state["compression_ratio"] for state in states] == pytest.approx([0.4, 0.6, 0.6])
    training = json.loads((folder / "final" / "training.json").read_text())
    assert training["steps"] == 5
    assert training["base"] == Path(tiny_models["llama"]).name
    assert training["data"]["context_tokens"] == 96 and training["schedule"]["init_args"]["end"] == 0.6
    assert (training["eviction"], training["presses"], training["objective"]) == ("RealEviction", ["SnapKV"], "EIT")
    assert training["trainable_parameters"] == sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert training["seconds"] > 0
    assert training["tokens"] >= 5 * 2 * (96 + 16)
    assert "train/loss" in training["last_metrics"]


def test_a_fresh_process_computes_the_same_logits(
    run: tuple[Path, EITModule], tiny_models: dict[str, str], tmp_path: Path
) -> None:
    folder, module = run
    torch.save(ids(), tmp_path / "ids")
    (tmp_path / "reload.py").write_text(RELOAD)
    arguments = [tmp_path / "reload.py", tiny_models["llama"], folder / "final", tmp_path / "ids", tmp_path / "out"]
    process = Started([*map(str, arguments)], tmp_path / "log")
    assert process.wait() == 0, process.printed
    reloaded, encoded, answer = torch.load(tmp_path / "out")
    assert torch.equal(reloaded, logits(module.model))
    assert encoded == module.tokenizer.encode("Naive <s> text\n")
    assert isinstance(answer, str)
    base = AutoModelForCausalLM.from_pretrained(tiny_models["llama"], dtype=torch.float32)
    assert not torch.allclose(reloaded, logits(base), atol=1e-2)


def test_a_continued_training_knows_what_it_continues(run: tuple[Path, EITModule], tiny_backbone: MakeBackbone) -> None:
    folder, module = run
    earlier = json.loads((folder / "final" / "training.json").read_text())
    assert earlier["presses"]
    continued = EITModule(tiny_backbone(adapter=str(folder / "final")), eviction=RealEviction(KnormPress()))
    described = continued.describe_training()
    assert described["continued_from"] == earlier
    assert described["presses"] == ["Knorm"]
    assert "continued_from" not in module.describe_training()


def test_kvpresss_pipeline_takes_what_the_card_loads(
    run: tuple[Path, EITModule], tiny_backbone: MakeBackbone, recwarn: pytest.WarningsRecorder
) -> None:
    folder, module = run
    model = causal_lm(tiny_backbone(adapter=str(folder / "final")).load(trainable=False)[0])
    assert not [warned for warned in recwarn if "renamed" in str(warned.message)]
    torch.testing.assert_close(logits(model), logits(module.model))
    pipeline = KVPressTextGenerationPipeline(model=model, tokenizer=AutoTokenizer.from_pretrained(folder / "final"))
    press = SnapKVPress(0.5, window_size=8)
    result = pipeline("A long text. " * 20, question="What?", press=press, max_new_tokens=4)
    assert isinstance(result["answer"], str)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_merge_writes_a_plain_model_with_the_same_logits(
    lora: bool,
    run: tuple[Path, EITModule],
    tiny_backbone: MakeBackbone,
    tiny_data: MakeData,
    tiny_trainer: MakeTrainer,
    tmp_path: Path,
) -> None:
    module = train(tmp_path, tiny_backbone(**({} if lora else {"lora": None})), tiny_data(), tiny_trainer, merge=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    unmerged = deepcopy(run[1].model if lora else module.model)  # merging changed the module of its own run
    # In float64: in float32 the logits differed by up to 5e-4 once attention had a mask. Why was not looked into.
    torch.testing.assert_close(logits(merged.double()), logits(unmerged.double()), rtol=1e-4, atol=1e-4)
    assert not names(tmp_path / "merged") & ADAPTER
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "library_name: transformers" in card and 'model="PATH/TO/THIS/FOLDER"' in card and "PeftModel" not in card
    assert not any("lora" in name for name, _ in merged.named_parameters())
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").encode("Hi there") == module.tokenizer.encode("Hi there")


def test_merging_into_embeddings_that_the_head_shares_leaves_the_head_alone(
    tiny_backbone: MakeBackbone, tiny_data: MakeData, tiny_trainer: MakeTrainer, tmp_path: Path
) -> None:
    backbone = tiny_backbone(lora=Lora(r=4, targets=("embed_tokens", "q_proj")), revision="main")
    train(tmp_path, backbone, tiny_data(), tiny_trainer, merge=True)
    adapted = PeftModel.from_pretrained(backbone.load(trainable=False)[0], tmp_path / "final")
    assert adapted.config.tie_word_embeddings
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=1e-4, atol=1e-4)
    for name in ("final", "checkpoint-2"):
        assert json.loads((tmp_path / name / "adapter_config.json").read_text())["revision"] == "main"


@pytest.mark.parametrize("merge", [True, False], ids=["merge", "full"])
def test_a_generation_config_that_cannot_be_saved_stops_before_the_first_step(
    merge: bool, tiny_backbone: MakeBackbone, tiny_data: MakeData, tiny_trainer: MakeTrainer, tmp_path: Path
) -> None:
    module = untrained(tiny_backbone(**({} if merge else {"lora": None})))
    config = causal_lm(module.model).generation_config
    assert config is not None
    config.do_sample, config.temperature = False, 0.6  # as many models on the hub have it
    callbacks = (Curriculum(Linear()), AdapterExport(str(tmp_path), merge=merge))
    with pytest.raises(ValueError, match=r"generation_config\.json cannot be saved.*temperature") as refused:
        tiny_trainer(*callbacks).fit(module, tiny_data())
    assert "\n" not in str(refused.value)
    assert module.global_step == 0


def test_tokens_are_counted_without_padding() -> None:
    case = NeedleCase([1, 2, 3], [4, 5], [4, 5], [], "needle", fact=cast(Any, None), depth=0.0, position=0)
    batch = needle_batch([case, replace(case, context_ids=[1], continuation_ids=[4, 5, 6, 7])], pad=0)
    assert (batch["context_ids"].shape, batch["continuation_ids"].shape) == ((2, 3), (2, 4))
    assert tokens_given(batch) == 3 + 2 + 1 + 4
    export = AdapterExport()
    export.on_train_batch_end(cast(Any, None), cast(Any, None), None, batch, 0)
    assert export.state_dict()["tokens"] == 10


def test_no_file_of_an_export_names_a_folder_of_this_machine(run: tuple[Path, EITModule]) -> None:
    folder, module = run
    base = json.loads((folder / "final" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert re.fullmatch(rf"{Path(module.backbone.pretrained).name}@[0-9a-f]{{12}}", base)
    texts = [path for path in (folder / "final").iterdir() if path.suffix != ".safetensors"]
    assert len(texts) > 5
    for path in texts:
        assert not re.search(r"(?<![\w.:/])/(tmp|home|root|work|private)\b", path.read_text()), path.name


def test_the_card_says_what_the_adapter_is_and_how_to_load_it(run: tuple[Path, EITModule]) -> None:
    card = (run[0] / "final" / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["library_name"] == "peft" and header["license"] == "unknown" and "lora" in header["tags"]
    assert "base_model" not in header, "a local folder is not on the Hub"
    for said in (
        *("| licence | unknown: the base's files name none |", "| LoRA | rank 4, alpha 32, on "),
        *("| presses that evicted | SnapKV |", "SnapKVPress(window_size=8", "Linear(start=0.2, end=0.6"),
        *("text=EmbeddedText", "context_tokens=96", "| optimizer steps | 5 |", "kvpress 0."),
        *("a program of its own started this training", "Not measured yet", "Query-agnostic", "Contexts of 96 tokens"),
        'Backbone(pretrained="PATH/TO/',
    ):
        assert said in card, said
    assert "More Information Needed" not in card, "peft's template"


def test_the_commit_is_that_at_the_start_of_the_run(
    tmp_path: Path,
    tiny_backbone: MakeBackbone,
    tiny_data: MakeData,
    tiny_trainer: MakeTrainer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    commits = iter(["at the start", "while it ran"])
    monkeypatch.setattr("callbacks.adapter_export.commit", lambda _: next(commits))
    train(tmp_path, tiny_backbone(), tiny_data(), tiny_trainer)
    said = {json.loads(file.read_text())["commit"] for file in tmp_path.glob("*/training.json")}
    assert said == {"at the start"}


def test_full_fine_tuning_exports_the_model(
    tiny_backbone: MakeBackbone, tiny_data: MakeData, tiny_trainer: MakeTrainer, tmp_path: Path
) -> None:
    module = train(tmp_path, tiny_backbone("qwen3", lora=None), tiny_data(), tiny_trainer)
    assert names(tmp_path / "final") >= ALWAYS | {"config.json", "model.safetensors"}
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final", dtype=torch.float32)
    assert torch.equal(logits(reloaded), logits(module.model))


def test_time_and_tokens_go_on_after_a_resume(
    run: tuple[Path, EITModule],
    tiny_backbone: MakeBackbone,
    tiny_data: MakeData,
    tiny_trainer: MakeTrainer,
    tmp_path: Path,
) -> None:
    callbacks = (Curriculum(Linear(0.2, 0.6, steps=4)), AdapterExport(str(tmp_path)))
    checkpoint = next((run[0] / "checkpoints").glob("*step=4.ckpt"))
    tiny_trainer(*callbacks, max_steps=5).fit(untrained(tiny_backbone()), tiny_data(), ckpt_path=checkpoint)
    whole = json.loads((run[0] / "final" / "training.json").read_text())
    resumed = json.loads((tmp_path / "final" / "training.json").read_text())
    assert (resumed["steps"], resumed["tokens"]) == (whole["steps"], whole["tokens"])
    loaded = tiny_backbone(adapter=str(tmp_path / "final")).load(trainable=False)[0]
    torch.testing.assert_close(logits(loaded), logits(run[1].model))


def test_fast_dev_run_writes_nothing(
    tiny_backbone: MakeBackbone, tiny_data: MakeData, tiny_trainer: MakeTrainer, tmp_path: Path
) -> None:
    callbacks = (Curriculum(Linear()), AdapterExport(str(tmp_path)))
    trainer = tiny_trainer(*callbacks, max_steps=1, fast_dev_run=1)
    trainer.fit(untrained(tiny_backbone()), tiny_data())
    assert names(tmp_path) == set()
