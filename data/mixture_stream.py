"""The endless stream of training batches: text and questions in a given ratio, resumable exactly."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

from torch.utils.data import IterableDataset, get_worker_info

from data.asked_rows import AskedRows
from data.cases import TrainingCase, read_after
from data.collate import needle_batch, pad_id, text_batch
from data.conversation import turn_lengths
from data.conversation_cases import ConversationCases
from data.facts import Split
from data.mixed_windows import MixedWindows
from data.needles import NeedleTask
from data.packing import DocumentStream, WindowStream, window_at
from data.question_cases import QuestionCases
from data.resumable import flat_settings, tokenizer_settings
from sparsekv_pl.models.batch import Batch
from sparsekv_pl.models.seeding import random_for

if TYPE_CHECKING:
    from data.mixture import EvictionData

CONTINUATIONS = 4
"""All questions of a row together have at most the tokens of so many text continuations, except for the first one."""
STREAM_SETTINGS = (
    "text",
    "splits",
    "seed",
    "context_tokens",
    "continuation_tokens",
    "batch_size",
    "retrieval_share",
    "needles",
    "shortest_context",
    "questions",
    "windows_per_document",
    "read_tokens",
    "turns",
)
"""Settings that determine the training stream, besides the tokenizer and the numbers of ranks and workers."""


class MixtureStream(IterableDataset[Batch]):
    """Endless training batches. A draw from (seed, s) decides for all ranks whether step s is text or retrieval."""

    def __init__(self, data: "EvictionData", rank: int, ranks: int) -> None:
        self.data, self.rank, self.ranks = data, rank, ranks

    def settings(self) -> dict[str, Any]:
        """Return all settings that determine the batches, by name."""
        found: dict[str, Any] = {"ranks": self.ranks}
        for name in STREAM_SETTINGS:
            found |= flat_settings(name, getattr(self.data, name))
        for name in ("windows_per_document", "read_tokens", "turns"):
            if getattr(self.data, name) is None:  # older checkpoints do not have it
                del found[name]
        return found | tokenizer_settings(self.data.tokenizer)

    def __iter__(self) -> "MixtureIterator":
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        return MixtureIterator(self.data, self.rank, self.ranks, worker, workers)


class MixtureIterator(Iterator[Batch]):
    """One worker's batches: steps worker, worker + workers, ... of its rank, from its own share of the documents."""

    def __init__(self, data: "EvictionData", rank: int, ranks: int, worker: int, workers: int) -> None:
        self.data, self.rank, self.ranks, self.workers = data, rank, ranks, workers
        self.step = worker
        self.windows = training_windows(data, rank * workers + worker, ranks * workers)
        self.pad = pad_id(data.tokenizer)
        self.needles = training_needles(data)
        self.talks = conversation_cases(data, "train")
        asks = data.questions and not data.turns
        self.asked = AskedRows(question_cases(data, "train"), self.windows) if asks else None

    def __next__(self) -> Batch:
        data = self.data
        windows = [next(self.windows) for _ in range(data.batch_size)]
        retrieval = random_for("kind", data.seed, self.step).random() < data.retrieval_share
        first = (self.step * self.ranks + self.rank) * data.batch_size
        rows = range(first, first + data.batch_size)
        lengths = [random_for("length", data.seed, row).choice(data.context_lengths) for row in rows]
        read = 0 if data.read_tokens is None else random_for("read", data.seed, self.step).randint(*data.read_tokens)
        turns = [] if data.turns is None else _turns(data.turns, data.context_tokens, data.seed, self.step)
        self.step += self.workers
        if retrieval and turns:
            talks = [self.talks.case(row, text, turns) for row, text in zip(rows, windows, strict=True)]
            return needle_batch(talks, self.pad) | self._counted()
        if retrieval:
            drawn = zip(rows, windows, lengths, strict=True)
            cases: list[TrainingCase]
            if self.asked is not None:
                cases = [self.asked.case(*case) for case in drawn]
            else:
                cases = [self.needles.case(row, text, context_tokens=length) for row, text, length in drawn]
            return needle_batch([read_after(case, read) for case in cases], self.pad) | self._counted()
        tokens = data.continuation_tokens
        encoder, spans = self.windows.encoder, [length + tokens for length in lengths]
        cut = [window_at(window, 0, span, tokens, encoder) for window, span in zip(windows, spans, strict=True)]
        return text_batch(cut, tokens, self.pad) | self._counted()

    def _counted(self) -> Batch:
        """Return the counts that a batch carries."""
        counted: dict[str, Any] = {"skipped_documents": self.windows.skipped}
        if self.asked is not None:
            counted["left_out_questions"] = dict(self.asked.left_out)
        return cast(Batch, counted)

    def state_dict(self) -> dict[str, Any]:
        """Return the next step, the text's state and the counts; everything else is a function of the step."""
        state: dict[str, Any] = {"step": self.step, "windows": self.windows.state_dict()}
        return state if self.asked is None else state | {"left_out": dict(self.asked.left_out)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self.step = state["step"]
        self.windows.load_state_dict(state["windows"])
        if self.asked is not None:
            self.asked.left_out = dict(state["left_out"])


def training_windows(data: "EvictionData", number: int, total: int) -> WindowStream | MixedWindows:
    """Make the windows of share ``number`` of ``total`` of the training split's text."""
    tokens = data.context_tokens + data.continuation_tokens
    streams = []
    for source, share in data.text.parts():
        documents = DocumentStream(source, data.splits, "train", data.seed, number, total)
        streams.append((WindowStream(documents, data.tokenizer, tokens, data.windows_per_document), share))
    if len(streams) == 1:
        return streams[0][0]
    return MixedWindows(streams, data.seed, f"{number} of {total}")


def training_needles(data: "EvictionData") -> NeedleTask:
    """Make the task of the training stream's needle cases."""
    return NeedleTask(
        data.tokenizer, data.context_tokens, data.seed, "train", data.needles, "value_and_stop", ask="all"
    )


def question_cases(data: "EvictionData", split: Split) -> QuestionCases:
    """Make the cases of several kinds of questions: training asks several per row, validation one."""
    train = split == "train"
    return QuestionCases(
        data.tokenizer,
        data.context_tokens,
        data.questions,
        data.needles if train else (1, 1),
        CONTINUATIONS * data.continuation_tokens,
        data.seed,
        split,
        supervise_stop=train,
    )


def conversation_cases(data: "EvictionData", split: Split) -> ConversationCases:
    """Make the conversations of several turns."""
    return ConversationCases(data.tokenizer, data.questions, data.seed, split)


def _turns(turns: tuple[int, int], tokens: int, seed: int, step: int) -> list[int]:
    """Draw the lengths of a batch's turns."""
    rng = random_for("turns", seed, step)
    return turn_lengths(tokens, rng.randint(*turns), rng)
