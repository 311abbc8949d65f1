"""Models, adapters and tokenizers that cannot be loaded: each is named, with what to do, before anything is loaded."""

import time
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from sparsekv_pl.models.backbone import EMBEDDED, Backbone, resolve
from sparsekv_pl.models.lora import Lora
from tests.models.backbone_cases import copy_without, edit_config
from tests.tiny_training import MakeBackbone


@pytest.mark.parametrize("path", ["/no/such/folder", "./nowhere", "../nowhere", "~/no-such-folder", "a/b/c"])
def test_a_path_that_does_not_exist_is_named(path: str) -> None:
    with pytest.raises(ValueError, match="there is no such folder or file") as error:
        Backbone(path).load()
    assert repr(path) in str(error.value)


def test_a_gguf_file_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.gguf'.*no such GGUF file"):
        Backbone(str(tmp_path / "model.gguf")).load()


def test_a_folder_without_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"folder without config\.json: give a Hugging Face model folder"):
        Backbone(str(tmp_path)).load()


def test_an_unknown_architecture_says_what_to_do(tiny_models: dict[str, str], tmp_path: Path) -> None:
    folder = copy_without(tiny_models["llama"], tmp_path / "model")
    edit_config(folder, model_type="nonsense", architectures=["NonsenseForCausalLM"])
    with pytest.raises(ValueError, match=r"nonsense(.|\n)*newer transformers or trust_remote_code=true") as error:
        Backbone(str(folder), lora=None).load()
    assert repr(str(folder)) in str(error.value)


@pytest.mark.parametrize(("settings", "message"), [({"r": 0}, "lora.r=0"), ({"dropout": 1.0}, "lora.dropout=1.0")])
def test_lora_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Lora(**settings)


def test_a_folder_without_an_adapter(tiny_backbone: MakeBackbone, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no adapter_config.json: give a folder that a training run exported"):
        tiny_backbone(adapter=str(tmp_path)).load()


def test_a_tokenizer_of_another_model(tiny_models: dict[str, str], tmp_path: Path) -> None:
    folder = copy_without(tiny_models["llama"], tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match="highest id is 1024 but the embedding has 1024 rows"):
        Backbone(str(folder), dtype="float32").load()


def test_a_repositorys_code_is_not_run_unless_asked(tiny_models: dict[str, str], tmp_path: Path) -> None:
    folder = copy_without(tiny_models["llama"], tmp_path / "model")
    (folder / "evil.py").write_text(
        f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
        "from transformers import LlamaConfig\nclass Evil(LlamaConfig):\n    model_type = 'evil'\n"
    )
    edit_config(folder, model_type="evil", auto_map={"AutoConfig": "evil.Evil"})
    with pytest.raises(ValueError, match="trust_remote_code"):
        Backbone(str(folder), lora=None).load()
    assert not (tmp_path / "ran").exists()


def test_a_hub_id_that_is_not_cached_fails_at_once_without_a_hub() -> None:
    started = time.perf_counter()
    with pytest.raises(ValueError, match="'nobody/no-such-model' could not be loaded") as error:
        Backbone("nobody/no-such-model").load()
    assert time.perf_counter() - started < 10
    assert EMBEDDED in str(error.value)


def test_a_hub_id_is_left_to_transformers() -> None:
    assert resolve("Qwen/Qwen3-8B") == "Qwen/Qwen3-8B"


def test_a_missing_pad_token_becomes_the_end_token(tiny_models: dict[str, str], tmp_path: Path) -> None:
    folder = copy_without(tiny_models["llama"], tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).pad_token is None
    assert Backbone(str(folder)).load_tokenizer().pad_token == "</s>"
