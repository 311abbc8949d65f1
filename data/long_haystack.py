"""Haystacks of any length: contexts of an exact length, a needle at every depth and a question for each needle."""

import logging
from array import array
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from data.cases import Case, Frame
from data.collate import MadeOnAccess, case_batch, pad_id
from data.fact_task import ANSWER_SLACK
from data.facts import Fact, draw_facts
from data.needles import filler_room, needle_ids
from data.packing import JOINT, DocumentStream
from data.python_source import PythonSource
from data.sweep import check_sweep, depth_text
from data.text import Document, Splits, TextSource
from data.tokenized import TokenizedData
from sparsekv_pl.models.batch import CaseBatch, CaseInfo
from sparsekv_pl.models.chat_frame import QUESTION_OPENING
from sparsekv_pl.models.seeding import random_for

log = logging.getLogger(__name__)

EVERYTHING = Splits(train=0.0, validation=0.0, held_out=1.0)
PIECE_CHARACTERS = 2**16
"""Characters of the pieces in which documents are tokenised, so that a book is no Python list of all its tokens."""


class HaystackData(TokenizedData):
    """One batch per length: a context ``context_ids`` (1, L) that all its cases share, and a case per depth.

    With ``together: false`` each depth has a context of its own, with that needle alone: what a model finds is then not
    limited by how many facts it can tell apart, and every depth costs a prefill.

    Needs a tokenizer: the trainer's ``lightning_module.tokenizer``, or set ``tokenizer`` before ``setup``. ``seed``
    determines the order of documents. Facts and wordings are those that training never sees. Raises ``ValueError`` for
    a setting out of range, or a value given twice.

    Parameters
    ----------
    text
        Source of the text. The default, the Python library's source, has 2.5 million tokens of SmolLM2's tokenizer.
    tokens
        Length of the context, including chat prefix and needles.
    lengths
        Several lengths, one haystack each; they replace ``tokens``.
    depths
        Positions of the needles: needle i comes after round(depth * filler) tokens of the text.
    together
        Hide all needles in one context; false: each in one of its own.
    seed
        Seed of the facts and of the documents' order.
    repeat
        Repeat the documents in a new order if the text is too short; the task's name then includes the number of
        rounds. Otherwise too short a text is an error.
    """

    def __init__(
        self,
        text: TextSource | None = None,
        tokens: int = 1_000_000,
        lengths: Sequence[int] | None = None,
        depths: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
        together: bool = True,
        seed: int = 0,
        repeat: bool = False,
    ) -> None:
        super().__init__()
        self.text = text or PythonSource()
        self.lengths = [tokens] if lengths is None else list(lengths)
        self.depths, self.together, self.seed, self.repeat = list(depths), together, seed, repeat
        if lengths is None and tokens < 1:
            raise ValueError(f"tokens is {tokens}: a context has at least 1 token")
        check_sweep(self.lengths, self.depths, [seed])

    def setup(self, stage: str | None = None) -> None:
        """Take the tokenizer. Raises ``ValueError`` if the needles do not fit into the shortest context."""
        super().setup(stage)
        self.frame = Frame(self.tokenizer)
        for length in self.lengths:
            self._room(length, self.depths)

    def test_dataloader(self) -> DataLoader[CaseBatch]:
        """Return the haystacks in the order of ``lengths``, each made on access."""
        parts = [self.depths] if self.together else [[depth] for depth in self.depths]
        haystacks = MadeOnAccess([partial(self.haystack, length, part) for length in self.lengths for part in parts])
        return DataLoader(haystacks, batch_size=None, shuffle=False)

    def transfer_batch_to_device(self, batch: CaseBatch, device: torch.device, dataloader_idx: int) -> CaseBatch:  # noqa: ARG002
        """Leave the batch where it is: each chunk is moved to the device before it runs."""
        return batch

    def haystack(self, length: int, depths: Sequence[float]) -> CaseBatch:
        """Make the context of ``length`` tokens with needles at ``depths``, and their cases.

        Raises ``ValueError`` if the text is too short and ``repeat`` is off.
        """
        facts, needles, room = self._room(length, depths)
        filler, documents, rounds = self._filler(room)
        task = self._task if rounds == 1 else f"{self._task}, text {rounds} times"
        context, spans = self._hidden(filler, needles, depths, length)
        hidden = zip(facts, depths, spans, strict=True)
        cases = [self._case(fact, depth, span, length, task, documents) for fact, depth, span in hidden]
        batch = case_batch(cases, pad_id(self.tokenizer))
        batch["context_ids"] = context
        return batch

    @property
    def _task(self) -> str:
        return "haystack" if self.together else "single needle"

    def _room(self, length: int, depths: Sequence[float]) -> tuple[list[Fact], list[list[int]], int]:
        """Return the facts at ``depths``, their token ids, and the number of text tokens beside them."""
        drawn = draw_facts(random_for("haystack", f"L{length}", f"s{self.seed}"), "held_out", len(self.depths))
        facts = [fact for fact, depth in zip(drawn, self.depths, strict=True) if depth in depths]
        needles = [needle_ids(self.frame, fact) for fact in facts]
        return facts, needles, filler_room(self.frame.room(length, "", False), needles, length)

    def _case(
        self, fact: Fact, depth: float, span: tuple[int, int], length: int, task: str, documents: tuple[str, ...]
    ) -> Case:
        """Make a case without the context, which is in the batch once."""
        info = CaseInfo(
            id=f"{self._task}/L{length}/d{depth_text(depth)}/s{self.seed}",
            task=task,
            answers=(fact.value,),
            question=f"{QUESTION_OPENING}{fact.question}",
            answer_prefix=fact.answer_prefix,
            max_new_tokens=len(self.frame.encode(f" {fact.value}")) + ANSWER_SLACK,
            depth=depth,
            seed=self.seed,
            document_ids=documents,
            needle_span=span,
        )
        asked = f"{info.question}{self.frame.question_suffix}{info.answer_prefix}"
        return Case([], self.frame.encode(asked), info)

    def _hidden(
        self, filler: "array[int]", needles: Sequence[Sequence[int]], depths: Sequence[float], length: int
    ) -> tuple[Tensor, list[tuple[int, int]]]:
        """Join prefix, filler and the needles at their depths to (1, L) int64; return it and each needle's span."""
        text = torch.frombuffer(filler, dtype=torch.int32)
        parts, done, before = [torch.tensor(self.frame.prefix_ids, dtype=torch.int32)], 0, len(self.frame.prefix_ids)
        places = [self.frame.behind_character(filler, round(depth * len(text))) for depth in depths]
        spans = [(0, 0)] * len(needles)
        for i in sorted(range(len(needles)), key=places.__getitem__):
            parts += [text[done : places[i]], torch.tensor(needles[i], dtype=torch.int32)]
            done = places[i]
            spans[i] = (before + done, before + done + len(needles[i]))
            before += len(needles[i])
        context = torch.cat([*parts, text[done:]]).long()[None]
        assert context.shape[1] == length
        return context, spans

    def _filler(self, count: int) -> "tuple[array[int], tuple[str, ...], int]":
        """Return ``count`` tokens of text, their documents, and the number of rounds through them."""
        stream = DocumentStream(self.text, EVERYTHING, "held_out", self.seed)
        ids, documents = array("i"), dict[str, None]()
        while len(ids) < count:
            document = next(stream)
            if stream.epoch and not self.repeat:
                raise ValueError(
                    f"the text has {len(ids):,} tokens and {count:,} are needed: use a text with more (LocalText, "
                    "HubText), a shorter context, or repeat: true to repeat its documents"
                )
            documents[document.id] = None
            for piece in _pieces(document):
                ids.extend(self.frame.encode(piece))
        if stream.epoch:
            log.warning("the text is shorter than the haystack: its documents are used %d times", stream.epoch + 1)
        end = self.frame.before_character(ids, count)
        return ids[:end] + array("i", [self.frame.line_end] * (count - end)), tuple(documents), stream.epoch + 1


def _pieces(document: Document) -> Iterator[str]:
    text = document.text + JOINT
    start = 0
    while start < len(text):
        end = start + PIECE_CHARACTERS
        line_end = text.rfind("\n", start, end) + 1 if end < len(text) else end  # no token crosses a line end
        end = line_end or end
        yield text[start:end]
        start = end
