"""The LightningDataModule of training: plain text and retrieval cases in a given ratio, resumable exactly."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, cast

from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from data.asked_rows import AskedRows, check_room, validation_questions
from data.cases import TrainingCase
from data.collate import needle_batch, pad_id, text_batch
from data.facts import Split
from data.needles import NeedleTask
from data.packing import (
    DocumentStream,
    WindowStream,
    split_tokens,
    spread_windows,
    window_at,
)
from data.question_cases import QuestionCases
from data.question_kinds import checked_weights
from data.resumable import RankStatefulLoader, flat_settings, tokenizer_settings
from data.text import EmbeddedText, Splits, TextSource
from data.tokenized import TokenizedData
from data.without_epochs import batches_to_train, without_epochs
from sparsekv_pl.models.batch import Batch
from sparsekv_pl.models.encoding import Encoder
from sparsekv_pl.models.seeding import random_for

CONTINUATIONS = 4
"""All questions of a row together have at most the tokens of so many text continuations, except for the first one."""
DEPTHS = 10
"""Number of depths, evenly from 0 to 1, over which validation's needles cycle."""
TRIED_CASES, SPARE = 256, 1.25
"""The shortest context must have room for a quarter more than the largest of 256 facts; none of 20,000 took more."""


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
)
"""Settings that determine the training stream, besides the tokenizer and the numbers of ranks and workers."""


class EvictionData(TokenizedData):
    """Batches of contexts and continuations: plain text and needle cases, one kind per batch.

    Needs a tokenizer: the trainer's ``lightning_module.tokenizer``, or set ``tokenizer`` before ``setup``.
    Training is an endless stream (set ``trainer.max_steps``) that resumes exactly from Lightning's checkpoints; with
    another number of ranks or workers, or changed data, resuming is an error.

    Parameters
    ----------
    text
        Source of the text; the default needs no download.
    context_tokens, continuation_tokens
        Length of contexts and of text continuations, in tokens. Needle continuations have the length of their
        questions and answers.
    batch_size
        Rows per batch and rank.
    retrieval_share
        Fraction of training batches that ask questions; the rest is plain text.
    needles
        Least and most questions of a training case, asked one after the other; validation asks one. With facts alone,
        this is the number of facts that are hidden.
    num_workers
        Processes that tokenise and pack; 0 does it in the training process.
    seed
        Seed of the documents' order, the kinds of batches, the facts and the lengths.
    validation_windows, validation_needles
        Number of validation cases (val_dataloader) of each kind. They depend only on the text, the tokenizer, the
        lengths and ``seed``. data/evaluation.py makes the held-out cases.
    splits
        Shares of the documents; the splits never share a text, and evaluation needs the same shares.
    shortest_context
        Draw every training row's context length evenly from ``shortest_context`` to ``context_tokens`` tokens; null
        makes all contexts ``context_tokens`` long. Validation stays at ``context_tokens``. Rows of equal length run
        together, other lengths one after the other, without padding: a batch computes only its own tokens, but in up
        to ``batch_size`` passes of few rows. If few rows have equal lengths, it costs as much as ``batch_size: 1`` with
        ``accumulate_grad_batches``. The text between a shorter row and the end of its window is skipped.
    questions
        Weights of the kinds of questions, for example {facts: 3, quotes: 2, cloze: 1}; null asks for facts alone. The
        kinds are those of data/question_kinds.py. Each question's kind is drawn; one that the text has nothing for is
        drawn again and counted. Validation asks the kinds in turn.

    Raises
    ------
    ValueError
        For a setting out of range.
    """

    def __init__(
        self,
        text: TextSource | None = None,
        context_tokens: int = 384,
        continuation_tokens: int = 64,
        batch_size: int = 4,
        retrieval_share: float = 0.6,
        needles: tuple[int, int] = (1, 3),
        num_workers: int = 0,
        seed: int = 0,
        validation_windows: int = 16,
        validation_needles: int = 16,
        splits: Splits | None = None,
        shortest_context: int | None = None,
        questions: dict[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.questions = checked_weights(questions)
        least = {"context_tokens": 1, "continuation_tokens": 2, "batch_size": 1, "num_workers": 0}
        least |= {"validation_windows": 0, "validation_needles": 0}
        given = locals()
        for name, bound in least.items():
            if given[name] < bound:
                raise ValueError(f"{name} is {given[name]}: give at least {bound}")
        if not 0 <= retrieval_share <= 1:
            raise ValueError(f"retrieval_share is {retrieval_share}: give a fraction between 0 and 1")
        if not 1 <= needles[0] <= needles[1]:
            raise ValueError(f"needles is {needles}: give (least, most) with 1 <= least <= most")
        if shortest_context is not None and not 1 <= shortest_context <= context_tokens:
            raise ValueError(
                f"shortest_context is {shortest_context}: give 1 to context_tokens ({context_tokens}), or null for "
                "contexts of one length"
            )
        self.text = text or EmbeddedText()
        self.splits = splits or Splits()
        self.context_tokens, self.continuation_tokens = context_tokens, continuation_tokens
        self.batch_size, self.retrieval_share, self.needles = batch_size, retrieval_share, needles
        self.num_workers, self.seed, self.shortest_context = num_workers, seed, shortest_context
        self.validation_windows, self.validation_needles = validation_windows, validation_needles

    @property
    def context_lengths(self) -> range:
        """All possible context lengths, in tokens."""
        longest = self.context_tokens
        return range(longest if self.shortest_context is None else self.shortest_context, longest + 1)

    def setup(self, stage: str | None = None) -> None:
        """Take the tokenizer. Raises ``ValueError`` if the trainer cannot train on a stream, or a fact has no room."""
        super().setup(stage)
        if stage == TrainerFn.FITTING and self.trainer is not None:
            without_epochs(self.trainer)
        if self.retrieval_share and self.questions:
            shortest = "context_tokens" if self.shortest_context is None else "shortest_context"
            check_room(question_cases(self, "train"), {shortest: self.context_lengths[0]})
        if self.shortest_context is None or self.retrieval_share == 0 or self.questions:
            return
        task = training_needles(self)
        least = int(task.most_beside_text(TRIED_CASES) * SPARE) + 1
        if self.shortest_context < least:
            raise ValueError(
                f"shortest_context is {self.shortest_context}: a fact and the beginning of the chat may take "
                f"{least - 1} tokens. Give at least {least}, or retrieval_share 0"
            )

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return the endless training stream; its nominal length is larger than ``trainer.max_steps`` needs.

        With ``trainer.overfit_batches``, only the first batches, the same in every epoch.
        """
        trainer = self.trainer
        if trainer is None:
            return RankStatefulLoader(MixtureStream(self, 0, 1), 10**9, self.num_workers)
        stream, batches = MixtureStream(self, trainer.global_rank, trainer.world_size), batches_to_train(trainer)
        if trainer.overfit_batches:  # type: ignore[attr-defined]
            return _in_order(list(islice(stream, batches)))
        # One more than is trained, so that the epoch never ends: loaders saved at an epoch's end lose their place.
        return RankStatefulLoader(stream, batches + 1, self.num_workers, trainer)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return text windows of the validation split, then questions in its wordings."""
        return _in_order(self._validation_batches())

    def _validation_batches(self) -> list[Batch]:
        length = self.context_tokens + self.continuation_tokens
        text = split_tokens(self.text, self.splits, "validation", self.tokenizer, length)
        encoder = Encoder(self.tokenizer)
        windows = spread_windows(text, self.validation_windows, length, self.continuation_tokens, encoder)
        depths = [i % DEPTHS / (DEPTHS - 1) for i in range(self.validation_needles)]
        cases: list[TrainingCase]
        if self.questions:
            cases = validation_questions(question_cases(self, "validation"), text, depths)
        else:
            task = NeedleTask(self.tokenizer, self.context_tokens, self.seed, "validation")
            cases = [task.case(i, text, depth=depth) for i, depth in enumerate(depths)]
        pad, size = pad_id(self.tokenizer), self.batch_size
        batches = [text_batch(rows, self.continuation_tokens, pad) for rows in _groups(windows, size)]
        return batches + [needle_batch(rows, pad) for rows in _groups(cases, size)]


class MixtureStream(IterableDataset[Batch]):
    """Endless training batches. A draw from (seed, s) decides for all ranks whether step s is text or retrieval."""

    def __init__(self, data: EvictionData, rank: int, ranks: int) -> None:
        self.data, self.rank, self.ranks = data, rank, ranks

    def settings(self) -> dict[str, Any]:
        """Return all settings that determine the batches, by name."""
        found: dict[str, Any] = {"ranks": self.ranks}
        for name in STREAM_SETTINGS:
            found |= flat_settings(name, getattr(self.data, name))
        return found | tokenizer_settings(self.data.tokenizer)

    def __iter__(self) -> "MixtureIterator":
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        return MixtureIterator(self.data, self.rank, self.ranks, worker, workers)


class MixtureIterator(Iterator[Batch]):
    """One worker's batches: steps worker, worker + workers, ... of its rank, from its own share of the documents."""

    def __init__(self, data: EvictionData, rank: int, ranks: int, worker: int, workers: int) -> None:
        self.data, self.rank, self.ranks, self.workers = data, rank, ranks, workers
        self.step = worker
        documents = DocumentStream(data.text, data.splits, "train", data.seed, rank * workers + worker, ranks * workers)
        self.windows = WindowStream(documents, data.tokenizer, data.context_tokens + data.continuation_tokens)
        self.pad = pad_id(data.tokenizer)
        self.needles = training_needles(data)
        self.asked = AskedRows(question_cases(data, "train"), self.windows) if data.questions else None

    def __next__(self) -> Batch:
        data = self.data
        windows = [next(self.windows) for _ in range(data.batch_size)]
        retrieval = random_for("kind", data.seed, self.step).random() < data.retrieval_share
        first = (self.step * self.ranks + self.rank) * data.batch_size
        rows = range(first, first + data.batch_size)
        lengths = [random_for("length", data.seed, row).choice(data.context_lengths) for row in rows]
        self.step += self.workers
        if retrieval:
            cases = zip(rows, windows, lengths, strict=True)
            if self.asked is not None:
                return needle_batch([self.asked.case(*case) for case in cases], self.pad) | self._counted()
            needles = [self.needles.case(row, text, context_tokens=length) for row, text, length in cases]
            return needle_batch(needles, self.pad) | self._counted()
        tokens = data.continuation_tokens
        encoder, spans = self.windows.encoder, [length + tokens for length in lengths]
        cut = [window_at(window, 0, span, tokens, encoder) for window, span in zip(windows, spans, strict=True)]
        return text_batch(cut, tokens, self.pad) | self._counted()

    def _counted(self) -> Batch:
        """Return the counts that a batch carries."""
        counted: dict[str, Any] = {"skipped_documents": self.windows.documents.blocks.skipped}
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


def training_needles(data: EvictionData) -> NeedleTask:
    """Make the task of the training stream's needle cases."""
    return NeedleTask(
        data.tokenizer, data.context_tokens, data.seed, "train", data.needles, "value_and_stop", ask="all"
    )


def question_cases(data: EvictionData, split: Split) -> QuestionCases:
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


def _in_order(batches: list[Batch]) -> DataLoader[Batch]:
    return DataLoader(cast(Any, batches), batch_size=None, shuffle=False)


def _groups(rows: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]
