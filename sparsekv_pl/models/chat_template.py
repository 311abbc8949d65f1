"""Render chat templates with a fixed date: a template that prints today's date would change prompts at midnight."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

DAY = datetime(2024, 7, 26)
"""The default date of Llama 3.1's template."""


def render(tokenizer: Any, messages: Sequence[dict[str, str]], **settings: Any) -> str:
    """Render ``messages`` with ``tokenizer.apply_chat_template`` as text; ``strftime_now`` formats ``DAY``."""
    return str(tokenizer.apply_chat_template(list(messages), tokenize=False, strftime_now=DAY.strftime, **settings))
