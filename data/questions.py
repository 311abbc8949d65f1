"""The LightningDataModule of questions about documents: one prompt per batch, in the chat frame, cut to a length."""

import itertools
import logging

from torch.utils.data import DataLoader

from data.cases import Case, Frame
from data.collate import case_batch, pad_id
from data.question_sources import PlantedQuestions, Question, QuestionSource, document_room
from data.tokenized import TokenizedData
from sparsekv_pl.models.batch import CaseBatch, CaseInfo
from sparsekv_pl.models.chat_frame import QUESTION_OPENING

log = logging.getLogger(__name__)


class QuestionData(TokenizedData):
    """Documents (the context), each with a question up to the answer's beginning (the continuation), one per batch.

    Needs a tokenizer: the trainer's ``lightning_module.tokenizer``, or set ``tokenizer`` before ``setup``. Documents
    that are too long are cut at the end; the position of an answer in the removed part is then unknown.

    Parameters
    ----------
    source
        Source of documents and questions; the default needs no download.
    samples
        Number of questions, at least 1.
    max_tokens
        Most tokens of a prompt: chat frame, document, question and the answer's beginning.
    max_new_tokens
        Most tokens of a generated answer.
    """

    def __init__(
        self,
        source: QuestionSource | None = None,
        samples: int = 50,
        max_tokens: int = 8000,
        max_new_tokens: int = 32,
    ) -> None:
        super().__init__()
        for name, value in {"samples": samples, "max_tokens": max_tokens, "max_new_tokens": max_new_tokens}.items():
            if value < 1:
                raise ValueError(f"{name} is {value}: give at least 1")
        self.source = source or PlantedQuestions()
        self.samples, self.max_tokens, self.max_new_tokens = samples, max_tokens, max_new_tokens
        self.lengths: list[int] = []

    def setup(self, stage: str | None = None) -> None:
        """Take the tokenizer, read the questions and make their prompts; ``lengths`` then has the longest one's length.

        Raises ``ValueError`` if the source has too few questions, or a question leaves no room for its document.
        """
        super().setup(stage)
        self.frame = Frame(self.tokenizer)
        questions = list(itertools.islice(self.source.samples(self.frame, self.max_tokens), self.samples))
        if len(questions) < self.samples:
            raise ValueError(
                f"{type(self.source).__name__} has {len(questions)} questions and {self.samples} were requested: set "
                f"data.samples to {len(questions)} or give it more"
            )
        self.cut = 0
        cases = [self._case(question) for question in questions]
        if self.cut:
            log.warning(
                "%d of %d documents are longer than %d tokens: their beginning is kept",
                self.cut,
                self.samples,
                self.max_tokens,
            )
        self.lengths = [max(len(case.context_ids) + len(case.continuation_ids) for case in cases)]
        self._batches = [case_batch([case], pad_id(self.tokenizer)) for case in cases]

    def predict_dataloader(self) -> DataLoader[CaseBatch]:
        """Return the questions in the source's order."""
        return DataLoader(self._batches, batch_size=None, shuffle=False)  # type: ignore[arg-type]  # a list is sized

    def _case(self, question: Question) -> Case:
        room = document_room(self.frame, self.max_tokens, question.question, question.answer_prefix)
        ids, answer = self._tokens(question)
        self.cut += len(ids) > room
        room = self.frame.before_character(ids, room)
        prefix = len(self.frame.prefix_ids)
        info = CaseInfo(
            id=question.id,
            task="questions",
            answers=question.answers,
            max_new_tokens=self.max_new_tokens,
            depth=question.depth,
            document_ids=question.document_ids,
            answer_span=(prefix + answer[0], prefix + answer[1]) if answer and answer[1] <= room else None,
        )
        asked = f"{QUESTION_OPENING}{question.question}"
        return self.frame.build(ids[:room], asked, question.answer_prefix, info)

    def _tokens(self, question: Question) -> tuple[list[int], tuple[int, int] | None]:
        """Return a document's token ids, and the tokens [start, end) that contain the answer, or None."""
        if question.answer_at is None:
            return self.frame.encode(question.document), None
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"{type(self.tokenizer).__name__} does not map tokens to characters, so the tokens of the answer to "
                f"{question.id} are unknown: use a fast tokenizer"
            )
        ids, offsets = self.frame.with_offsets(question.document)
        start, end = question.answer_at
        inside = [i for i, (first, last) in enumerate(offsets) if first < end and last > start]
        return ids, (inside[0], inside[-1] + 1) if inside else None
