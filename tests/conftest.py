"""Settings that every test needs (no hub, quiet tokenizers), and tiny models, data and trainers to share."""

import json
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests import processes  # noqa: F401, whose libraries every forkserver of a test has
from tests.termination import pytest_configure, pytest_runtest_setup  # noqa: F401, the hooks of this plugin

if TYPE_CHECKING:
    from lightning.pytorch import Callback, Trainer
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from data.evaluation import EvaluationData
    from data.mixture import EvictionData
    from sparsekv_pl.models.backbone import Backbone

VOCABULARY = 1024
TEMPLATE = (
    "{% for message in messages %}<s>{{ message.role }}\n{{ message.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def _tokenizer() -> "PreTrainedTokenizerFast":
    """Byte-level BPE trained on the interpreter's own documentation, so that a needle takes few tokens."""
    from pydoc_data.topics import topics

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator((topics[name] for name in sorted(topics)[::8]), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """What a test leaves in the environment ends with it: Lightning's MASTER_PORT would be the next runs' too."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """{"llama": folder, "qwen3": folder}: random two-layer models in float32 with a tokenizer beside them."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    kinds: dict[str, Any] = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}
    tokenizer, folders = _tokenizer(), {}
    for name, (config_class, model_class) in kinds.items():
        config = config_class(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            initializer_range=0.1,
            max_position_embeddings=1024,
            tie_word_embeddings=name == "llama",
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = model_class(config)
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        folders[name] = str(folder)
    return folders


@pytest.fixture(scope="session")
def tiny_backbone(tiny_models: dict[str, str]) -> Callable[..., "Backbone"]:
    """Backbone(**settings) of the tiny Llama in float32 with LoRA r 4, unless the settings say otherwise."""
    from sparsekv_pl.models.backbone import Backbone
    from sparsekv_pl.models.lora import Lora

    def make(kind: str = "llama", **settings: Any) -> Backbone:
        defaults: dict[str, Any] = {"pretrained": tiny_models[kind], "dtype": "float32", "lora": Lora(r=4)}
        return Backbone(**(defaults | settings))

    return make


@pytest.fixture(scope="session")
def tiny_adapter(
    tiny_backbone: Callable[..., "Backbone"], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., str]:
    """tiny_adapter(std, folder, training): an adapter of the tiny Llama with its tokenizer and training.json.

    ``std`` is the deviation of the factors that begin at 0; with 0 the adapter changes nothing.
    """

    def make(std: float = 0.5, folder: Path | None = None, training: dict[str, Any] | None = None) -> str:
        import torch

        model, tokenizer = tiny_backbone().load()
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            if std and "lora_B" in name:
                parameter.data.normal_(std=std, generator=generator)
        folder = folder or tmp_path_factory.mktemp("adapter")
        for part in (model, tokenizer):
            part.save_pretrained(folder)
        if training is not None:
            (folder / "training.json").write_text(json.dumps(training))
        return str(folder)

    return make


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a command writes by mistake lands outside the checkout, and pytest's arguments are not the command's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pytest"])


@pytest.fixture(scope="session")
def tiny_data() -> Callable[..., "EvictionData"]:
    """EvictionData(**settings): contexts of 96 tokens, continuations of 16, two rows a batch, embedded text."""
    from data.mixture import EvictionData

    def make(**settings: Any) -> EvictionData:
        defaults: dict[str, Any] = {
            "context_tokens": 96,
            "continuation_tokens": 16,
            "batch_size": 2,
            "validation_windows": 2,
            "validation_needles": 2,
        }
        return EvictionData(**(defaults | settings))

    return make


@pytest.fixture(scope="session")
def tiny_cases() -> Callable[..., "EvaluationData"]:
    """EvaluationData(**settings): four windows of 96 + 16 tokens, a fact at depths 0 and 1, two rows a batch."""
    from data.evaluation import EvaluationData

    def make(**settings: Any) -> EvaluationData:
        defaults: dict[str, Any] = {
            "lengths": [96],
            "depths": [0.0, 1.0],
            "cases_per_cell": 2,
            "windows": 4,
            "continuation_tokens": 16,
            "batch_size": 2,
        }
        return EvaluationData(**(defaults | settings))

    return make


@pytest.fixture(scope="session")
def tiny_trainer(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., "Trainer"]:
    """Trainer(*callbacks, **settings): four steps on the CPU, silent, saving nothing, in a folder of its own."""
    from lightning.pytorch import Trainer

    def make(*callbacks: "Callback", **settings: Any) -> Trainer:
        defaults: dict[str, Any] = {
            "max_steps": 4,
            "max_epochs": 1,
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "limit_val_batches": 0,
            "default_root_dir": tmp_path_factory.mktemp("trainer"),
        }
        return Trainer(callbacks=list(callbacks), **(defaults | settings))

    return make


@pytest.fixture(scope="module")
def datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What lm_eval loads through datasets is cached in a folder of the test file's own."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        patch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)  # asks pip and the CPU, for seconds
        yield


@pytest.fixture
def random_model(request: pytest.FixtureRequest) -> Callable[..., "PreTrainedModel"]:
    """Random models of Qwen3, whose queries and keys are normed, or of the architecture that ``indirect`` names."""
    from tests import random_models

    return partial(random_models.random_model, getattr(request, "param", "qwen3"))
