"""Questions from the command line or stdin, and their answers as they arrive."""

import sys
from argparse import Namespace
from collections.abc import Iterator

from sparsekv_pl.models.seeding import seed_for
from sparsekv_pl.usage.answers import sampled_answer, sampling_of
from sparsekv_pl.usage.context_cache import ContextCache


def answer_all(cache: ContextCache, asked: Namespace) -> None:
    """Answer the questions of the command line, or those of stdin, one after the other or together."""
    if asked.together:
        questions = list(_questions(asked))
        answers = cache.ask(questions, max_new_tokens=asked.max_new_tokens, stop=asked.stop) if questions else []
        for question, answer in zip(questions, answers, strict=True):
            say(f"> {question}")
            print(answer, flush=True)
        return
    for number, question in enumerate(_questions(asked)):
        if asked.questions or not sys.stdin.isatty():
            say(f"> {question}")
        _answer(cache, asked, question, number)
        print(flush=True)


def _answer(cache: ContextCache, asked: Namespace, question: str, number: int) -> None:
    drawn = sampling_of(asked.temperature, asked.top_p, seed_for("ask", asked.seed, number))
    if drawn is None:
        cache.ask(question, max_new_tokens=asked.max_new_tokens, stop=asked.stop, on_text=_show)
        return
    row = cache.model.question_ids(question)
    sampled_answer(cache.model, cache.kept, row, asked.max_new_tokens, drawn, stop=asked.stop, on_text=_show)


def _questions(asked: Namespace) -> Iterator[str]:
    """Yield the questions; in a dialogue an empty line ends them, in a file it is skipped."""
    if asked.questions or asked.document == "-":
        yield from asked.questions
        return
    dialogue = sys.stdin.isatty()
    while True:
        if dialogue:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line or (dialogue and not line.strip()):
            return
        if line.strip():
            yield line.strip()


def _show(piece: str) -> None:
    print(piece, end="", flush=True)


def say(line: str) -> None:
    """Print what is no answer to stderr."""
    print(line, file=sys.stderr, flush=True)
