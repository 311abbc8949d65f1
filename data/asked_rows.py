"""Rows of questions for training and validation: which text is passed over, and what is counted."""

from collections.abc import Iterator, Mapping, Sequence

from data.cases import TrainingCase
from data.packing import Tokens
from data.question_cases import QuestionCases

PASSED_OVER = 64
"""Most pieces of text in a row that are passed over because they have nothing to ask about."""
TRIED_QUESTIONS = 64
"""Questions of each kind whose inserted sentences are counted."""


class AskedRows:
    """The rows of a training stream; the state is ``left_out`` and that of ``windows``.

    Parameters
    ----------
    maker
        Maker of the cases.
    windows
        Source of the text after a piece that has nothing to ask about.
    """

    def __init__(self, maker: QuestionCases, windows: Iterator[Tokens]) -> None:
        self.maker, self.windows = maker, windows
        self.left_out = dict.fromkeys(maker.weights, 0)
        """How often each kind was drawn for a text that has nothing for it."""

    def case(self, row: int, window: Tokens, length: int) -> TrainingCase:
        """Make a row's case from ``window`` or, if it has nothing to ask about, from the windows after it.

        Raises ``ValueError`` after ``PASSED_OVER`` windows.
        """
        for _ in range(PASSED_OVER):
            case = self.maker.case(row, window, context_tokens=length)
            for name in self.left_out if case is None else case.left_out:
                self.left_out[name] += 1
            if case is not None:
                return case
            window = next(self.windows)
        raise ValueError(
            f"the last {PASSED_OVER} pieces of text, {length} tokens of each, have nothing for any of the questions "
            f"{', '.join(self.left_out)}: add a kind that inserts sentences (facts, told), give longer contexts or "
            "another text"
        )


def validation_questions(maker: QuestionCases, text: Tokens, depths: Sequence[float]) -> list[TrainingCase]:
    """Ask one question at each depth, the kinds in turn; a kind that the text has nothing for is drawn again.

    Raises ``ValueError`` if the text has nothing for any kind.
    """
    kinds = list(maker.weights)
    cases: list[TrainingCase] = []
    for number, depth in enumerate(depths):
        case = maker.case(number, text, depth, first=kinds[number % len(kinds)])
        if case is None:
            raise ValueError(
                f"the validation split has nothing for any of the questions {', '.join(kinds)}: give more text, other "
                "kinds, or validation_needles 0"
            )
        cases.append(case)
    return cases


def check_room(maker: QuestionCases, lengths: Mapping[str, int]) -> None:
    """Raise ``ValueError`` if one of ``lengths``, the shortest contexts by setting, has no room for a kind."""
    least, kind = maker.room_needed(TRIED_QUESTIONS)
    for setting, length in lengths.items():
        if length < least:
            raise ValueError(
                f"{setting} is {length}: a context with questions of the kind {kind} needs {least} tokens, half of "
                f"them text. Give at least {least}, or no weight to {kind} in questions"
            )
