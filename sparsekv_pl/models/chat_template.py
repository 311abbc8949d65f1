"""The chat template on one day for ever: one that prints today's date would change every prompt at midnight."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

DAY = datetime(2024, 7, 26)
"""The date that Llama 3.1's template prints where it is given none."""


def render(tokenizer: Any, messages: Sequence[dict[str, str]], **settings: Any) -> str:
    """``tokenizer.apply_chat_template`` as text, in which ``strftime_now`` formats ``DAY``."""
    return str(tokenizer.apply_chat_template(list(messages), tokenize=False, strftime_now=DAY.strftime, **settings))
