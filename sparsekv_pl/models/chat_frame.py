"""The parts of a chat template before the text, after a question and between turns, cut as in kvpress's pipeline."""

from typing import Any

from sparsekv_pl.models.chat_template import render

QUESTION_OPENING = "\n\n"
"""Separator between the text and the first question."""
MARK = "<<<the text goes here>>>"
WORD_STARTS = ("Ġ", "Ċ", "▁", " ", "\n")
"""The first characters of tokens that begin with whitespace, in byte-level, SentencePiece and plain vocabularies."""


def chat_frame(tokenizer: Any) -> tuple[str, str]:
    """Return the template's parts before the text and after the question: (prefix, question suffix).

    Raises ``ValueError`` for a template that fails, or repeats or drops the message.
    """
    if tokenizer.chat_template is None:
        return tokenizer.bos_token or "", "\n"
    rendered = _rendered(tokenizer, [{"role": "user", "content": MARK}], add_generation_prompt=True)
    if rendered.count(MARK) != 1:
        raise _refused(tokenizer, f"repeats or drops the user's message: {rendered[:200]!r}")
    prefix, suffix = rendered.split(MARK)
    return prefix, suffix


def next_turn(tokenizer: Any) -> str:
    """Return the template's part between an answer and the next question.

    Raises ``ValueError`` for a template that fails, or drops or reorders messages.
    """
    if tokenizer.chat_template is None:
        return "\n"
    answer = MARK.replace("text", "answer")
    user = {"role": "user", "content": MARK}
    rendered = _rendered(tokenizer, [user, {"role": "assistant", "content": answer}, user])
    after = rendered.partition(answer)[2]
    if MARK not in after:
        raise _refused(tokenizer, f"drops or reorders messages: {rendered[:200]!r}")
    return after.split(MARK)[0]


def _rendered(tokenizer: Any, messages: list[dict[str, str]], **settings: Any) -> str:
    try:
        return render(tokenizer, messages, enable_thinking=False, **settings)
    except Exception as error:  # templates are programs; errors of any kind, Jinja's sandbox included
        raise _refused(tokenizer, f"fails: {type(error).__name__}: {' '.join(str(error).split())[:200]}") from error


def _refused(tokenizer: Any, why: str) -> ValueError:
    return ValueError(
        f"the chat template of {tokenizer.name_or_path or 'the tokenizer'} {why}; correct it in the model's folder "
        "(chat_template.jinja or tokenizer_config.json), or delete it there to go without"
    )
