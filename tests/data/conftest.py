"""A byte-level tokenizer with and without a chat template, and a few documents in memory."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data.cases import Frame
from data.packing import Tokens, take_tokens
from data.text import Document, EmbeddedText, TextSource

TEMPLATE = (
    "<s>{% for message in messages %}[{{ message.role }}]{{ message.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@dataclass
class Numbered(TextSource):
    """``count`` short documents whose text contains their number."""

    count: int = 40

    def documents(self) -> Iterator[Document]:
        """doc/0 ... doc/count-1, 30 words each."""
        for i in range(self.count):
            yield Document(f"doc/{i}", f"This is document number {i} " + " ".join(f"w{i}x{j}" for j in range(30)))


def byte_tokenizer(chat: bool) -> PreTrainedTokenizerFast:
    """One token per byte, plus <s> and <eos>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "<eos>": 1} | {token: i + 2 for i, token in enumerate(alphabet)}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="<eos>")
    tokenizer.chat_template = TEMPLATE if chat else None
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """With a chat template."""
    return byte_tokenizer(chat=True)


@pytest.fixture(scope="session")
def plain_tokenizer() -> PreTrainedTokenizerFast:
    """Without one."""
    return byte_tokenizer(chat=False)


@pytest.fixture
def numbered() -> Numbered:
    """Forty documents."""
    return Numbered()


@pytest.fixture(scope="module")
def plain(tokenizer: Any) -> tuple[Frame, Tokens]:
    """One token per byte, so that texts can be compared letter by letter."""
    return Frame(tokenizer), take_tokens(EmbeddedText().documents(), tokenizer, 30_000)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Record the seconds of each wait, without waiting."""
    asked: list[float] = []
    monkeypatch.setattr("data.retries.sleep", asked.append)
    return asked
