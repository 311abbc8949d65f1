"""Removing a model's thoughts from its answer, where an endpoint leaves them in."""

import re

TAG = re.compile(
    r"[<\[◁](?P<end>/)?(?:seed:)?(?:think(?:ing)?|thoughts?|reasoning)[>\]▷]"
    r"|<\|channel\|>(?:analysis|commentary|(?P<final>final))<\|message\|>",
    re.IGNORECASE,
)
"""Tags of DeepSeek, Qwen, Magistral, Kimi, Seed and gpt-oss."""


def without_thoughts(text: str) -> str:
    """``text`` without thoughts, including one that began in the prompt and one that was cut off.

    >>> [without_thoughts(text) for text in ("<think>7?</think>It is 5.", "7?</think>It is 5.", "5<think>or 7")]
    ['It is 5.', 'It is 5.', '5']
    """
    kept: list[str] = []
    place, thinking = 0, False
    for tag in TAG.finditer(text):
        if tag["end"] or tag["final"]:
            if not thinking:
                kept = []
            thinking, place = False, tag.end()
        elif not thinking:
            kept.append(text[place : tag.start()])
            thinking = True
    return "".join([*kept, "" if thinking else text[place:]])
