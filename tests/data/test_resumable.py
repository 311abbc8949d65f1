"""The loader's position in the stream: it matches the parameters, and another stream's position is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from data.mixture import EvictionData
from data.resumable import check_settings, flat_settings
from data.text import LocalText, Splits
from tests.data.conftest import Numbered, byte_tokenizer

STEPS, ACCUMULATED = 5, 3


class Learner(LightningModule):
    """Its gradient and so its weight depend on every token of every micro-batch, in order of the steps."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.weight = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
        self.read: list[list[str]] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        assert batch_idx == len(self.read) + self.began
        self.read.append(batch["document_ids"])
        return (self.weight * batch["context_ids"].double().std()).cos()

    def on_train_start(self) -> None:
        self.began = self.trainer.global_step * ACCUMULATED

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.1)


class Stop(Callback):
    """Stops a run as Ctrl-C or a crash does, in micro-batch ``batch``: before its forward, or after its backward."""

    def __init__(self, batch: int, hook: str) -> None:
        self.batch, self.hook = batch, hook

    def _at(self, hook: str, batch_idx: int) -> None:
        if (hook, batch_idx) == (self.hook, self.batch):
            raise RuntimeError("stopped")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        self._at("start", batch_idx)

    def on_after_backward(self, trainer: Trainer, pl_module: Any) -> None:  # noqa: ARG002
        self._at("backward", len(pl_module.read) - 1 + pl_module.began)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        self._at("end", batch_idx)


@pytest.fixture
def new_data(numbered: Numbered) -> Callable[..., EvictionData]:
    def make(text: Any = None, **settings: Any) -> EvictionData:
        small: dict[str, Any] = {"context_tokens": 300, "continuation_tokens": 20, "batch_size": 2}
        small |= {"splits": Splits(0.6, 0.2, 0.2), "validation_windows": 2, "validation_needles": 1}
        return EvictionData(text or numbered, **(small | settings))

    return make


Fit = Callable[..., Learner]


@pytest.fixture
def fit(new_data: Callable[..., EvictionData], tokenizer: Any, tmp_path: Path) -> Fit:
    def run(*callbacks: Callback, resume: bool = False, workers: int = 0) -> Learner:
        folder = tmp_path / "checkpoints"
        keeper = ModelCheckpoint(
            folder,
            every_n_train_steps=STEPS + 1,
            save_on_exception=True,
            filename="{step}",
            enable_version_counter=False,
        )
        trainer = Trainer(
            accelerator="cpu",
            logger=False,
            callbacks=[*callbacks, keeper],
            enable_progress_bar=False,
            enable_model_summary=False,
            accumulate_grad_batches=ACCUMULATED,
            max_steps=STEPS,
            limit_val_batches=0,
        )
        learner = Learner(tokenizer)
        saved = next(folder.glob("*.ckpt")) if resume else None
        try:
            trainer.fit(learner, new_data(num_workers=workers), ckpt_path=saved)
        except RuntimeError as error:
            assert str(error) == "stopped"
        return learner

    return run


@pytest.mark.parametrize(
    ("batch", "hook", "workers"),
    [
        (3, "start", 0),
        (3, "end", 0),
        (7, "start", 0),
        (7, "end", 2),
        (8, "start", 2),
        (8, "backward", 0),
        (8, "end", 0),
    ],
)
def test_a_step_that_was_stopped_is_done_again_whole(fit: Fit, batch: int, hook: str, workers: int) -> None:
    """Batches 3, 7 and 8 are the first of a step, one in the middle and the last."""
    whole = fit(workers=workers)
    stopped = fit(Stop(batch, hook), workers=workers)
    resumed = fit(resume=True, workers=workers)
    done = ACCUMULATED * ((batch + (hook == "end")) // ACCUMULATED)
    assert len(stopped.read) == batch + (hook != "start")
    assert stopped.read[:done] + resumed.read == whole.read
    assert len(whole.read) == STEPS * ACCUMULATED
    assert torch.equal(resumed.weight, whole.weight)


# --- what does not match ---


def test_every_setting_that_decides_the_stream_is_compared(
    new_data: Callable[..., EvictionData], tokenizer: Any
) -> None:
    def loader(**settings: Any) -> Any:
        data = new_data(**settings)
        data.tokenizer = tokenizer
        return data.train_dataloader()

    saved = loader().state_dict()
    loader(validation_windows=3).load_state_dict(saved)  # validation is no part of the stream
    for name, value, said in (
        ("context_tokens", 301, "context_tokens was 300, is 301"),
        ("continuation_tokens", 21, "continuation_tokens was 20, is 21"),
        ("batch_size", 1, "batch_size was 2, is 1"),
        ("seed", 1, "seed was 0, is 1"),
        ("retrieval_share", 0.5, "retrieval_share was 0.6, is 0.5"),
        ("needles", (1, 4), "needles[1] was 3, is 4"),
        ("num_workers", 2, "num_workers was 0, is 2"),
        ("shortest_context", 299, "shortest_context was None, is 299"),
        ("splits", Splits(0.6, 0.3, 0.1), "splits.validation was 0.2, is 0.3; splits.held_out was 0.2, is 0.1"),
        ("text", Numbered(41), "text.count was 40, is 41"),
    ):
        with pytest.raises(ValueError, match="training data is not the checkpoint's") as refused:
            loader(**{name: value}).load_state_dict(saved)
        assert f"checkpoint's: {said}. A run resumes exactly or not at all" in str(refused.value)


def test_another_tokenizer_is_refused(new_data: Callable[..., EvictionData]) -> None:
    def loader(tokenizer: Any) -> Any:
        data = new_data()
        data.tokenizer = tokenizer
        return data.train_dataloader()

    saved = loader(byte_tokenizer(chat=True)).state_dict()
    with pytest.raises(ValueError, match=r"tokenizer\.chat_template was '[0-9a-f]{12}', is None\. A run"):
        loader(byte_tokenizer(chat=False)).load_state_dict(saved)
    larger = byte_tokenizer(chat=True)
    larger.add_tokens(["document"])
    with pytest.raises(ValueError, match="tokenizer was '258 tokens', is '259 tokens'"):
        loader(larger).load_state_dict(saved)
    other = byte_tokenizer(chat=True)
    other.backend_tokenizer.pre_tokenizer.add_prefix_space = True
    with pytest.raises(ValueError, match=r"checkpoint's: tokenizer\.sample was"):
        loader(other).load_state_dict(saved)


def test_other_files_are_refused_by_name_and_size(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("words")
    saved = flat_settings("text", LocalText([str(path)]))
    check_settings(saved, flat_settings("text", LocalText([str(path)])))
    path.write_text("more words")
    with pytest.raises(ValueError, match=r"text\.paths\[0\] was '.*a\.txt \(5 bytes\)', is '.*a\.txt \(10 bytes\)'"):
        check_settings(saved, flat_settings("text", LocalText([str(path)])))
    with pytest.raises(ValueError, match=r"text\.paths\[1\] was not there, is '.*a\.txt \(10 bytes\)'"):
        check_settings(flat_settings("text", LocalText([str(path)])), flat_settings("text", LocalText([str(path)] * 2)))


@pytest.mark.parametrize("text", ["a long instruction " * 20, "a" * 5000, "a\0b"])
def test_a_text_that_can_be_no_path_is_a_setting_like_any_other(text: str) -> None:
    assert flat_settings("instruction", [text]) == {"instruction[0]": text}


def test_a_refusal_counts_what_it_does_not_name() -> None:
    with pytest.raises(ValueError, match=r"text\[4\] was 4, is 5; 3 more\. A run"):
        check_settings(flat_settings("text", list(range(8))), flat_settings("text", list(range(1, 9))))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_edited_in_place_is_noticed(tmp_path: Path, tokenizer: Any, workers: int) -> None:
    """Of the same length, so that only its text differs."""
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"text": "line {i} {"word " * 90}"}}\n' for i in range(9)))

    def loader() -> Any:
        data = EvictionData(LocalText([str(path)]), splits=Splits(1, 0, 0), num_workers=workers)
        data.tokenizer = tokenizer
        return data.train_dataloader()

    first = loader()
    batches = iter(first)
    next(batches), next(batches)
    state = first.state_dict()
    path.write_text(path.read_text().replace("line 7", "lime 7"))
    second = loader()
    second.load_state_dict(state)
    with pytest.raises(ValueError, match=r"train share \d of .* has other documents than the checkpoint read"):
        next(iter(second))
