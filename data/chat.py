"""The chat template, cut where kvpress's pipeline cuts it: what stands before the text, after a question, between."""

from typing import Any

MARK = "<<<the text goes here>>>"
WORD_STARTS = ("Ġ", "Ċ", "▁", " ", "\n")
"""How tokens that begin with whitespace are spelled in byte-level, sentencepiece and plain vocabularies."""


def chat_frame(tokenizer: Any) -> tuple[str, str]:
    """What stands before the text and after the question, as kvpress's pipeline has it: (prefix, question
    suffix).
    """
    if tokenizer.chat_template is None:
        return tokenizer.bos_token or "", "\n"
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": MARK}],
        add_generation_prompt=True,
        tokenize=False,
        enable_thinking=False,
    )
    if rendered.count(MARK) != 1:
        raise ValueError(
            f"the chat template repeats or drops the user's message: {rendered!r}. Set tokenizer.chat_template = None"
        )
    prefix, suffix = rendered.split(MARK)
    return prefix, suffix


def next_turn(tokenizer: Any) -> str:
    """What stands between an answer and the next question in a conversation."""
    if tokenizer.chat_template is None:
        return "\n"
    answer = MARK.replace("text", "answer")
    user = {"role": "user", "content": MARK}
    rendered = tokenizer.apply_chat_template(
        [user, {"role": "assistant", "content": answer}, user], tokenize=False, enable_thinking=False
    )
    return rendered.split(answer)[1].split(MARK)[0]
