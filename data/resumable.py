"""The training loader: each rank's position in its stream, saved in Lightning's checkpoints and checked at resume."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from hashlib import blake2b
from typing import Any, Protocol, cast

import torch
from lightning.pytorch import Trainer
from torch.utils.data import IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from sparsekv_pl.models.batch import Batch
from sparsekv_pl.storage.given_paths import existing

SHOWN = 5
"""Number of settings that an error names; it counts the others."""
SAMPLE = "Größe of 3.14 € def f(x):\n\treturn {'naïve': x**2}  # 漢字 ünd 1234567890 KV\n\n"
"""Text whose tokens differ between tokenizers."""


class ResumableStream(Protocol):
    """A dataset of batches whose iterator has ``state_dict`` and ``load_state_dict``."""

    def settings(self) -> dict[str, Any]:
        """Return all settings that determine the batches, as made by ``flat_settings``."""


class RankStatefulLoader(StatefulDataLoader):
    """A loader that saves and restores every rank's state; Lightning would give rank 0's state to all ranks.

    The saved position matches the parameters: a checkpoint in the middle of gradient accumulation (Ctrl-C, a signal, an
    exception) has no gradients, so it has the position at which the accumulation began, and the resumed run repeats all
    its micro-batches.

    The length belongs to the loader, not to the stream: torch would store the stream's length and warn if a resumed run
    exceeds it.
    """

    def __init__(self, stream: ResumableStream, batches: int, num_workers: int, trainer: Trainer | None = None) -> None:
        pin_memory = torch.cuda.is_available()
        dataset = cast(IterableDataset[Batch], stream)
        super().__init__(dataset, batch_size=None, num_workers=num_workers, pin_memory=pin_memory)
        self.stream, self.batches, self.trainer = stream, batches, trainer
        self.taken = 0
        self.step_began: tuple[int, dict[str, Any]] | None = None
        """Batches taken before the first one of the present optimizer step, and the position at that time."""

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Batch]:
        batches = super().__iter__()
        while True:
            if self.taken % self._accumulated == 0:
                self.step_began = self.taken, super().state_dict()
            batch = next(batches)  # the stream is endless
            self.taken += 1
            yield batch

    def settings(self) -> dict[str, Any]:
        """Return all settings that must be the same at resume."""
        return self.stream.settings() | {"num_workers": self.num_workers, "accumulate_grad_batches": self._accumulated}

    def state_dict(self) -> dict[str, Any]:
        """Return "settings", "batches" (taken per rank) and "ranks" (a state each). Collective: all ranks call it."""
        taken, own = self.taken, super().state_dict()
        done = taken if self.trainer is None else self.trainer.global_step * self._accumulated
        if self.step_began and (done < taken or taken == self.step_began[0]):  # the second: its first batch failed
            taken, own = self.step_began
        states = [own]
        if _distributed():
            states = states * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(states, own)
        return {"settings": self.settings(), "batches": taken, "ranks": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore this rank's state; ``ValueError`` names settings that differ from the checkpoint's."""
        check_settings(state_dict.get("settings", {}), self.settings())
        self.taken = state_dict["batches"]
        if self.trainer is not None:
            _count_from(self.trainer, self.taken)
        super().load_state_dict(state_dict["ranks"][torch.distributed.get_rank() if _distributed() else 0])

    @property
    def _accumulated(self) -> int:
        """Batches per optimizer step."""
        return 1 if self.trainer is None else self.trainer.accumulate_grad_batches


def _count_from(trainer: Trainer, batches: int) -> None:
    """Set Lightning's loop to continue after ``batches`` batches, if its checkpoint was saved inside a step."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    total: Any = progress.total
    if total.ready == total.processed == batches:
        return
    beyond = total.ready - batches
    for tracker in (total, progress.current):
        count = tracker.ready - beyond
        tracker.load_state_dict(dict.fromkeys(("ready", "started", "processed", "completed"), count))


def check_settings(saved: Mapping[str, Any], present: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` that names the data settings in which the checkpoint and this run differ."""
    different = [
        f"{name} was {_shown(name, saved)}, is {_shown(name, present)}"
        for name in dict.fromkeys([*present, *saved])
        if name not in saved or name not in present or saved[name] != present[name]
    ]
    if not different:
        return
    more = f"; {len(different) - SHOWN} more" if len(different) > SHOWN else ""
    raise ValueError(
        f"this run's training data is not the checkpoint's: {'; '.join(different[:SHOWN])}{more}. A run resumes "
        "exactly or not at all: go back to the saved values, or start a new run from what was exported "
        "(model.backbone.adapter) without ckpt_path"
    )


def flat_settings(name: str, value: Any) -> dict[str, Any]:
    """Flatten ``value`` to plain numbers and strings by dotted names; file names are given with the file's size.

    Fields of dataclasses are included if they are constructor arguments and take part in comparisons.

    >>> flat_settings("needles", (1, 3))
    {'needles[0]': 1, 'needles[1]': 3}
    """
    if is_dataclass(value):
        found: dict[str, Any] = {name: type(value).__name__}
        for part in fields(value):
            if part.init and part.compare:
                found |= flat_settings(f"{name}.{part.name}", getattr(value, part.name))
        return found
    if isinstance(value, dict):
        return {key: part for own, one in value.items() for key, part in flat_settings(f"{name}.{own}", one).items()}
    if isinstance(value, list | tuple):
        return {key: part for i, one in enumerate(value) for key, part in flat_settings(f"{name}[{i}]", one).items()}
    if isinstance(value, str) and (path := existing(value, home=False)) is not None and path.is_file():
        return {name: f"{value} ({path.stat().st_size:,} bytes)"}
    plain = value is None or isinstance(value, bool | int | float | str)
    return {name: value if plain else type(value).__name__}


def tokenizer_settings(tokenizer: Any) -> dict[str, Any]:
    """Return the tokenizer's number of tokens, and fingerprints of a sample's tokens and of its chat template."""
    template = getattr(tokenizer, "chat_template", None)
    return {
        "tokenizer": f"{len(tokenizer)} tokens",
        "tokenizer.sample": _fingerprint(tokenizer.encode(SAMPLE, add_special_tokens=False)),
        "tokenizer.chat_template": None if template is None else _fingerprint(template),
    }


def _fingerprint(value: object) -> str:
    return blake2b(repr(value).encode(), digest_size=6).hexdigest()


def _shown(name: str, settings: Mapping[str, Any]) -> str:
    return repr(settings[name]) if name in settings else "not there"


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
