"""The parts of the chat template around text and question (tests/data/test_cases.py: they equal kvpress's)."""

import pytest
from transformers import PreTrainedTokenizerFast

from sparsekv_pl.models.chat_frame import chat_frame, next_turn
from tests.data.conftest import byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """With a chat template."""
    return byte_tokenizer(chat=True)


@pytest.fixture(scope="module")
def plain_tokenizer() -> PreTrainedTokenizerFast:
    """Without one."""
    return byte_tokenizer(chat=False)


def test_chat_and_plain_frames(tokenizer, plain_tokenizer):
    assert chat_frame(tokenizer) == ("<s>[user]", "<eos>[assistant]")
    assert chat_frame(plain_tokenizer) == ("<s>", "\n")


def test_repeating_template_is_refused(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages[0].content }}{{ messages[0].content }}")
    with pytest.raises(ValueError, match="repeats or drops"):
        chat_frame(tokenizer)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('one message alone') }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{{ messages[0].content + 1 }}",
        "{{ 1 / 0 }}",
        "{% if %}",
    ],
)
@pytest.mark.parametrize("needed", [chat_frame, next_turn])
def test_a_template_that_fails_is_one_line(template, needed, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(ValueError, match=r"^the chat template of .+ (fails: \w+: |drops or)[^\n]+; correct it"):
        needed(tokenizer)


def test_turns_follow_each_other(tokenizer, plain_tokenizer):
    assert next_turn(tokenizer) == "<eos>[user]"
    assert next_turn(plain_tokenizer) == "\n"
