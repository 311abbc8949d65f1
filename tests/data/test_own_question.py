"""A question about one's own file: cut to a length, asked in the chat frame, refused in one line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.own_question import OwnQuestion
from data.questions import QuestionData


@pytest.mark.parametrize("answer", ["", "Ada"])
def test_it_becomes_one_case(answer: str, tiny_backbone: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "[my] text.txt"
    path.write_text("Ada came. " * 50)
    data = QuestionData(OwnQuestion(str(path), "Who: [x] #y?", answer), 1, max_tokens=120, max_new_tokens=7)
    data.tokenizer = tiny_backbone().load_tokenizer()
    data.setup()
    (batch,) = data.predict_dataloader()
    (case,) = batch["cases"]
    assert case.question.endswith("Who: [x] #y?") and case.answers == ((answer,) if answer else ())
    assert case.context.startswith("Ada came.") and case.max_new_tokens == 7
    assert batch["context_ids"].shape[1] <= 120


@pytest.mark.parametrize("given", [{"path": " "}, {"question": ""}])
def test_half_of_it_is_refused(given: dict[str, str]) -> None:
    (name,) = given
    with pytest.raises(ValueError, match=rf"{name} is empty: give both, as in make demo TEXT"):
        OwnQuestion(**({"path": "a.txt", "question": "Who?"} | given))
