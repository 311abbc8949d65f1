"""The LightningDataModule of training: plain text and retrieval cases in a given ratio, resumable exactly."""

from collections.abc import Sequence
from itertools import islice
from typing import Any, cast

from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader

from data.asked_rows import check_room, validation_questions
from data.cases import TrainingCase, read_after
from data.collate import needle_batch, pad_id, text_batch
from data.conversation import turn_lengths
from data.conversation_cases import checked_turns
from data.mixture_stream import MixtureStream, conversation_cases, question_cases, training_needles
from data.needles import NeedleTask
from data.packing import split_tokens, spread_windows
from data.question_kinds import checked_weights
from data.resumable import RankStatefulLoader
from data.text import EmbeddedText, Splits, TextSource
from data.tokenized import TokenizedData
from data.without_epochs import batches_to_train, without_epochs
from sparsekv_pl.models.batch import Batch
from sparsekv_pl.models.encoding import Encoder

DEPTHS = 10
"""Number of depths, evenly from 0 to 1, over which validation's needles cycle."""
TRIED_CASES, SPARE = 256, 1.25
"""The shortest context must have room for a quarter more than the largest of 256 facts; none of 20,000 took more."""


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
    windows_per_document
        Most windows (a context and a continuation) that training takes of one document and epoch, from a place that is
        drawn; null takes all. A book has hundreds, which would follow each other.
    read_tokens
        Fewest and most tokens at the end of a question's context that are read after the eviction, unsupervised, before
        the question; drawn for every batch, null for none. With ``RealEviction.decoding`` they are evicted from while
        they are read, so what is asked for must be carried over them. ``context_tokens`` counts them.
    turns
        Fewest and most turns of a conversation, drawn for every batch; null asks single questions. The retrieval
        batches are then conversations of ``context_tokens`` tokens: facts are told in one turn and asked for in a later
        one, a third are corrected in between, and every answer is supervised in its turn. The first turn is the
        context. Turns have drawn lengths, the same in all rows of a batch; ``RealEviction.decoding`` with the interval
        "turn" evicts at their ends. ``questions`` then weights facts and told, and ``needles`` says nothing.

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
        questions: dict[str, Any] | None = None,
        windows_per_document: int | None = None,
        read_tokens: tuple[int, int] | None = None,
        turns: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.questions = checked_weights(questions)
        checked_turns(turns, self.questions, {"shortest_context": shortest_context, "read_tokens": read_tokens})
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
        if windows_per_document is not None and windows_per_document < 1:
            raise ValueError(f"windows_per_document is {windows_per_document}: give at least 1, or null for all")
        shortest = context_tokens if shortest_context is None else shortest_context
        if read_tokens is not None and not 0 <= read_tokens[0] <= read_tokens[1] < shortest:
            raise ValueError(
                f"read_tokens is {read_tokens}: give (fewest, most) with 0 <= fewest <= most, below the shortest "
                f"context's {shortest} tokens, or null"
            )
        self.windows_per_document, self.read_tokens, self.turns = windows_per_document, read_tokens, turns
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

    @property
    def evicted_lengths(self) -> range:
        """All possible numbers of context tokens before the first eviction."""
        shortest = self.context_lengths[0]
        if self.retrieval_share:
            shortest -= self.read_tokens[1] if self.read_tokens else 0
            shortest = self._shortest_turn if self.turns else shortest
        return range(shortest, self.context_tokens + 1)

    @property
    def _shortest_turn(self) -> int:
        assert self.turns is not None
        return 3 * self.context_tokens // (4 * self.turns[1])

    def setup(self, stage: str | None = None) -> None:
        """Take the tokenizer. Raises ``ValueError`` if the trainer cannot train on a stream, or a fact has no room."""
        super().setup(stage)
        if stage == TrainerFn.FITTING and self.trainer is not None:
            without_epochs(self.trainer)
        if self.retrieval_share and self.turns:
            conversation_cases(self, "train").check_room([self._shortest_turn] * self.turns[1])
            return
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
        if self.turns:
            lengths, before = turn_lengths(self.context_tokens, self.turns[1]), self.turns[1] - 2
            maker = conversation_cases(self, "validation")
            cases = [maker.case(i, text, lengths, (round(depth * before),)) for i, depth in enumerate(depths)]
        elif self.questions:
            cases = validation_questions(question_cases(self, "validation"), text, depths)
        else:
            task = NeedleTask(self.tokenizer, self.context_tokens, self.seed, "validation")
            cases = [task.case(i, text, depth=depth) for i, depth in enumerate(depths)]
        cases = [read_after(case, self.read_tokens[1] if self.read_tokens else 0) for case in cases]
        pad, size = pad_id(self.tokenizer), self.batch_size
        batches = [text_batch(rows, self.continuation_tokens, pad) for rows in _groups(windows, size)]
        return batches + [needle_batch(rows, pad) for rows in _groups(cases, size)]


def _in_order(batches: list[Batch]) -> DataLoader[Batch]:
    return DataLoader(cast(Any, batches), batch_size=None, shuffle=False)


def _groups(rows: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]
