"""A request costs no more than its bytes: one error of many, bounded prompts, and ids split as their text is."""

import json
import random
from collections.abc import Callable
from typing import Any

import openai
import pytest
from pydantic import BaseModel, ValidationError

from sparsekv_pl.models.chat_frame import QUESTION_OPENING
from sparsekv_pl.serve.prompts import completion_prompt
from sparsekv_pl.serve.request_fields import ChatFields, CompletionFields
from sparsekv_pl.usage.loaded_model import LoadedModel
from tests.serve.conftest import RunningServer

USER = {"role": "user", "content": "Who?"}
WRONG: list[tuple[type[BaseModel], dict[str, Any]]] = [
    (ChatFields, {"messages": [0] * 1000}),
    (ChatFields, {"messages": [USER | {"content": [0] * 1000}]}),
    (ChatFields, {"messages": [USER], "stop": [0] * 1000}),
    (ChatFields, {"messages": [USER], "stream_options": {str(number): 7 for number in range(1000)}}),
    (CompletionFields, {"prompt": [None] * 1000}),
    (CompletionFields, {"prompt": [[None] * 1000] * 1000}),
]


@pytest.mark.parametrize(("fields", "wrong"), WRONG)
def test_many_wrong_items_are_few_errors(fields: type[BaseModel], wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        fields.model_validate({"model": "tiny"} | wrong)
    assert caught.value.error_count() <= 4  # one of each form that a prompt may have


@pytest.mark.parametrize(
    ("path", "fields", "message"),
    [
        ("chat/completions", {"messages": [USER | {"content": "\ud800"}]}, "messages.0.content.0.text: "),
        ("completions", {"prompt": "a\ud800"}, "prompt: "),
        ("completions", {"prompt": ["a", "\udc00"]}, "prompt.1: "),
    ],
)
def test_half_characters_are_refused(
    serve: Callable[..., RunningServer], path: str, fields: dict[str, Any], message: str
) -> None:
    """JSON can write them, and no tokenizer takes them."""
    server = serve()
    headers = {"content-type": "application/json"}
    reply = server.client._client.post(
        f"{server.url}/{path}", content=json.dumps({"model": "tiny"} | fields), headers=headers
    )
    assert reply.status_code == 400
    said = reply.json()["error"]["message"]
    assert said.startswith(message) and "the text has half a surrogate pair at character" in said


def test_prompts_of_one_request_are_bounded(serve: Callable[..., RunningServer]) -> None:
    create = serve().client.completions.create
    with pytest.raises(openai.BadRequestError, match="the request has 129 prompts, and 128 go together"):
        create(model="tiny", prompt=["a"] * 129, max_tokens=1)
    assert len(create(model="tiny", prompt=["a"] * 128, max_tokens=1).choices) == 128


def test_token_ids_are_split_at_their_last_paragraph(model: LoadedModel) -> None:
    """As if all that follows a token were decoded each time, which took the square of a prompt's length."""
    pieces = ["\n", "\n\n", " ", " the", "a", ".\n", "\n ", "sea"]
    tokens = sorted({token for piece in pieces for token in model.encoder.encode(piece)})
    decode, draw, splits = model.encoder.decode, random.Random(0), 0

    def slowly(ids: list[int]) -> list[int]:
        for place in range(len(ids) - 1, 0, -1):
            token, behind = decode([ids[place]]), "".join(decode([one]) for one in ids[place:])
            if "\n" in token and QUESTION_OPENING in behind.rstrip():
                cut = place if token.startswith("\n") else place + 1
                return ids[:cut] if cut < len(ids) and decode(ids[:cut]).strip() else []
        return []

    for _ in range(500):
        ids = draw.choices(tokens, k=draw.randint(1, 12))
        prompt = completion_prompt(model, ids)
        assert (prompt.document, prompt.question) == (slowly(ids), ids[len(slowly(ids)) :])
        splits += bool(prompt.document)
    assert 50 < splits < 450
