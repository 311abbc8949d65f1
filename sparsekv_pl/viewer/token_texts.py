"""Tokens as pieces of the text that they make, and the tokens in which an answer stands."""

import re
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

UNFINISHED = "\ufffd"
"""Decoding's mark of a character whose last bytes are in a later token."""
LONGEST_CHARACTER = 4
"""Most tokens of one character: its bytes in UTF-8."""


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return each token's part of the decoded text; joined they are that text.

    Tokens are decoded with their neighbours, because some tokenizers drop a space at the beginning. A character of
    several tokens belongs to its last one; the others have an empty text.
    """
    texts: list[str] = []
    before, done = 0, 0  # ids[before:done] were decoded last
    for end in range(1, len(ids) + 1):
        shown, whole = _decoded(tokenizer, ids[before:done]), _decoded(tokenizer, ids[before:end])
        if whole.endswith(UNFINISHED) and end - done < LONGEST_CHARACTER and end < len(ids):
            texts.append("")
            continue
        texts.append(whole[len(shown) :])
        before, done = done, end
    return texts


def spans_of(texts: Sequence[str], answers: Sequence[str]) -> list[tuple[int, int]]:
    """Return the tokens [start, end) of every place where one of ``answers`` stands in the text, ignoring case.

    A place inside a word or number does not count.
    """
    ends = list(accumulate(map(len, texts)))
    whole, found = "".join(texts), set()
    for answer in filter(None, (answer.strip() for answer in answers)):
        pattern = rf"(?<![A-Za-z0-9]){re.escape(answer)}(?![A-Za-z0-9])"
        for place in re.finditer(pattern, whole, re.IGNORECASE):
            inside = [i for i, end in enumerate(ends) if end > place.start() and end - len(texts[i]) < place.end()]
            found.add((inside[0], inside[-1] + 1))
    return sorted(found)


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)) if ids else ""
