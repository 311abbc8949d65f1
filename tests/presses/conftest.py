"""Text and presses for the press matrix."""

from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from tests.presses.press_bench import Bench, MakeBench, model_of
from tests.presses.press_cases import EASY, PressCase, Setting


@pytest.fixture(scope="session")
def tokenizer(tiny_models: dict[str, str]) -> Any:
    return AutoTokenizer.from_pretrained(tiny_models["llama"])


@pytest.fixture(scope="session")
def text(tokenizer: Any) -> Tensor:
    """(6, 192): rows of English with its punctuation, each another text."""
    ids = tokenizer("\n".join(topics[name] for name in sorted(topics)[::40]))["input_ids"]
    assert len(ids) >= 6 * 192
    return torch.tensor(ids[: 6 * 192]).view(6, 192)


@pytest.fixture
def bench(text: Tensor, tokenizer: Any) -> MakeBench:
    def make(kind: str, case: PressCase, setting: Setting = EASY) -> Bench:
        return Bench(case, model_of(kind, setting.dtype), setting, text, tokenizer)

    return make
