"""Export trained weights as a peft adapter folder or a plain Hugging Face model."""

import shutil
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from safetensors import SafetensorError, safe_open
from torch import Tensor
from typing_extensions import override

from callbacks.checkpoint_files import bytes_of, saved_whole
from callbacks.curriculum import Curriculum
from callbacks.run_record import CHECKOUT, commit, run_record
from sparsekv_pl.models.backbone import causal_lm
from sparsekv_pl.models.base_model import base_reference
from sparsekv_pl.models.batch import tokens_given
from sparsekv_pl.models.training_summary import TRAINING_SUMMARY
from sparsekv_pl.reporting.model_card import write_card
from sparsekv_pl.storage.json_file import read_mapping, write_mapping
from sparsekv_pl.storage.whole_files import check_room
from sparsekv_pl.training.sharding import exported, gathered


class AdapterExport(pl.Callback):
    """Export at every checkpoint (``checkpoint-N/``, N the optimizer step) and at the end (``final/``).

    A folder holds the adapter (adapter_config.json, adapter_model.safetensors) or, if every weight trained, the model;
    the tokenizer; ``curriculum.json``, the curriculum's state; ``config.yaml``, the resolved configuration;
    ``training.json``, a summary of the training and its cost; and ``README.md``, a model card. An adapter names its
    base without this machine's folders. ``peft.PeftModel.from_pretrained(base, folder)`` loads it. A module that trains
    something other than its model has a method ``save_trained(folder)``, which writes that alone, without adapter,
    tokenizer, curriculum and card. Folders are written completely or not at all; a resumed run with no steps left
    writes exports that are missing.

    Parameters
    ----------
    directory
        Parent of the exported folders; the trainer's ``default_root_dir`` if not given.
    merge
        Also write ``merged/`` at the end: the base with the adapter merged in, a plain Hugging Face model.

    Raises
    ------
    ValueError
        At setup: for ``merge`` with a module without an adapter, and for a generation_config that cannot be saved.
    """

    def __init__(self, directory: str | None = None, merge: bool = False) -> None:
        self.directory = directory
        self.merge = merge
        self._seconds = 0.0
        self._tokens = 0  # of this rank, since the start or the resume
        self._tokens_before = 0  # of all ranks
        self._started = 0.0
        self._commit: str | None = None  # as training started: files may change while it runs
        self._exported = -1
        self._metrics: dict[str, float] = {}  # as of the checkpoint
        self._ended = False

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._ended = False
        if self.merge and _writes_itself(pl_module):
            raise ValueError(
                f"--merge folds an adapter into its base, but {type(pl_module).__name__} trains none: leave --merge out"
            )
        if (
            stage == "fit"
            and not _writes_itself(pl_module)
            and (self.merge or not hasattr(pl_module.model, "peft_config"))
        ):
            _check_generation_config(pl_module.model)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started = time.perf_counter()
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._commit = commit(CHECKOUT)
            folder, trained = self._folder(trainer), bytes_of(pl_module, trained=True)
            check_room(folder, trained, "an export takes")
            if self.merge:
                check_room(folder, trained + bytes_of(pl_module), "final and merged take")

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._tokens += tokens_given(batch)

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        finder = not self._started  # Lightning's finders save a state to restore before training starts
        if self._exported != trainer.global_step and not finder:
            self._exported = trainer.global_step
            self._export(trainer, pl_module, f"checkpoint-{trainer.global_step}")
        if (state := checkpoint.get("callbacks", {}).get(self.state_key)) is not None:
            state["metrics"] = self._metrics

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        folder = self._export(trainer, pl_module, "final")
        self._ended = True
        fast = trainer.fast_dev_run  # type: ignore[attr-defined]
        rank_zero_info("fast_dev_run: nothing exported" if fast else f"exported to {folder}")

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Merge, after the last checkpoint, because it changes the model; also for a run that had no steps left."""
        step = trainer.global_step
        if trainer.fast_dev_run or not step:  # type: ignore[attr-defined]
            return
        final = self._folder(trainer) / "final"
        if not self._ended and not trainer.strategy.broadcast(export_whole(final, step)):
            self._export(trainer, pl_module, "final")
            rank_zero_info(f"exported to {final}, which was not whole")
        if self.merge and trainer.is_global_zero and (self._ended or not export_whole(final.with_name("merged"), step)):
            _write_merged(pl_module, final)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self._elapsed(), "tokens": self._all_tokens()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._seconds, self._tokens_before = state_dict["seconds"], state_dict["tokens"]
        self._metrics = state_dict.get("metrics", {})

    def _folder(self, trainer: pl.Trainer) -> Path:
        return Path(self.directory or trainer.default_root_dir).expanduser()

    def _elapsed(self) -> float:
        return self._seconds + (time.perf_counter() - self._started if self._started else 0.0)

    def _all_tokens(self) -> int:
        """Sum the tokens of all ranks. Collective: every rank calls it."""
        ranks = [self._tokens]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            ranks = ranks * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(ranks, self._tokens)
        return self._tokens_before + sum(ranks)

    def _export(self, trainer: pl.Trainer, pl_module: pl.LightningModule, name: str) -> Path:
        folder = self._folder(trainer) / name
        self._metrics |= {name: float(value) for name, value in trainer.callback_metrics.items()}
        weights, tokens = gathered(pl_module), self._all_tokens()
        logged = trainer.log_dir or trainer.default_root_dir  # collective: rank 0's value is broadcast
        config = Path(logged) / "config.yaml"
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return folder
        with saved_whole(folder, weights) as partial:
            if _writes_itself(pl_module):
                pl_module.save_trained(partial)  # type: ignore[operator]
            else:
                _write_model(trainer, pl_module, partial, weights)
            write_mapping(partial, TRAINING_SUMMARY, self._summary(trainer, pl_module, tokens))
            if not _writes_itself(pl_module):
                write_card(partial)
            if config.exists():
                shutil.copy(config, partial / "config.yaml")
        return folder

    def _summary(self, trainer: pl.Trainer, pl_module: pl.LightningModule, tokens: int) -> dict[str, Any]:
        return {
            "steps": trainer.global_step,
            "seconds": round(self._elapsed(), 1),
            "tokens": tokens,
            "trainable_parameters": sum(p.numel() for p in pl_module.parameters() if p.requires_grad),
            "precision": str(trainer.precision),
            **pl_module.describe_training(),  # type: ignore[operator]
            **run_record(trainer),
            "commit": self._commit,
            "last_metrics": self._metrics,
        }


def export_whole(folder: Path, step: int) -> bool:
    """Return whether ``folder`` has an export of optimizer step ``step`` whose tensor files can be read."""
    tensors = list(folder.glob("*.safetensors"))
    try:
        for path in tensors:
            with safe_open(path, framework="pt"):  # checks the file's length against its header
                pass
        return bool(tensors) and read_mapping(folder / TRAINING_SUMMARY)["steps"] == step
    except (OSError, SafetensorError, ValueError, KeyError):
        return False


def _check_generation_config(model: Any) -> None:
    """Raise ``ValueError`` if transformers would refuse to save the model's generation_config."""
    config = getattr(causal_lm(model), "generation_config", None)
    if config is None:
        return
    try:
        config.validate(strict=True)
    except ValueError as error:
        raise ValueError(
            f"{causal_lm(model).name_or_path}: its generation_config.json cannot be saved with the trained model "
            f"({' '.join(str(error).split())}). Correct it in a local copy of the model, or delete it there"
        ) from error


def _writes_itself(pl_module: pl.LightningModule) -> bool:
    return hasattr(pl_module, "save_trained")


def _write_model(
    trainer: pl.Trainer, pl_module: pl.LightningModule, partial: Path, weights: dict[str, Tensor] | None
) -> None:
    """Write model, tokenizer and curriculum; ``weights`` are the trained ones, gathered from a sharded model."""
    pl_module.model.save_pretrained(partial, state_dict=weights)  # type: ignore[operator, union-attr]
    if (config := partial / "adapter_config.json").exists():  # peft writes the folder that the base was loaded from
        base = base_reference(pl_module.backbone)  # type: ignore[arg-type]
        write_mapping(partial, config.name, read_mapping(config) | {"base_model_name_or_path": base})
    pl_module.tokenizer.save_pretrained(partial)  # type: ignore[operator, union-attr]
    curricula = [callback for callback in trainer.callbacks if isinstance(callback, Curriculum)]  # type: ignore[attr-defined]
    state = curricula[0].export_state(trainer.global_step) if curricula else {}
    write_mapping(partial, "curriculum.json", state)


def _write_merged(pl_module: pl.LightningModule, final: Path) -> None:
    """Write ``merged/`` beside ``final``. A sharded model is loaded from ``final``, as no process holds all of it."""
    folder, backbone = final.with_name("merged"), pl_module.backbone
    model = exported(backbone, final) if backbone.sharded else pl_module.model  # type: ignore[arg-type, union-attr]
    _untie(model)
    merged = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model  # type: ignore[operator]
    with saved_whole(folder, None) as partial:
        merged.save_pretrained(partial)  # type: ignore[union-attr]
        pl_module.tokenizer.save_pretrained(partial)  # type: ignore[operator, union-attr]
        shutil.copy(final / TRAINING_SUMMARY, partial)
        write_card(partial)
    rank_zero_info(f"merged model in {folder}")


def _untie(model: Any) -> None:
    """Copy the head's weights if they are tied to input embeddings that an adapter changes."""
    base = causal_lm(model)
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    own = getattr(embedding, "base_layer", None)  # peft's wrapper
    if own is not None and own.weight is head.weight:
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        for config in {id(c): c for c in (base.config, base.config.get_text_config())}.values():
            config.tie_word_embeddings = False
