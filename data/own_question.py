"""A question about a text file of one's own."""

from collections.abc import Iterator
from dataclasses import dataclass

from data.cases import Frame
from data.question_sources import Question, QuestionSource
from data.text import LocalText


@dataclass
class OwnQuestion(QuestionSource):
    """One question about one text file.

    Parameters
    ----------
    path
        A .txt file in UTF-8.
    question
        The question.
    answer
        The expected answer, if answers are to be marked right or wrong, and its places in the text to be shown.
    answer_prefix
        The beginning of the answer, given to the model.

    Raises
    ------
    ValueError
        If path or question is empty, or there is no such file.
    """

    path: str
    question: str
    answer: str = ""
    answer_prefix: str = ""

    def __post_init__(self) -> None:
        for name in ("path", "question"):
            if not getattr(self, name).strip():
                raise ValueError(f'{name} is empty: give both, as in make demo TEXT=my.txt QUESTION="Who came?"')
        self.text = LocalText([self.path])

    def samples(self, frame: Frame, max_tokens: int) -> Iterator[Question]:  # noqa: ARG002
        """Yield the question; ``ValueError`` for a file that is no text."""
        for document in self.text.documents():
            yield Question(
                id=self.path,
                document=document.text,
                question=self.question,
                answers=(self.answer,) if self.answer.strip() else (),
                answer_prefix=self.answer_prefix,
                document_ids=(document.id,),
            )
