"""Errors in OpenAI's shape, as OpenAI's client raises them; and the server answers the next request."""

import http.client
import json
from collections.abc import Callable
from typing import Any

import openai
import pytest

from sparsekv_pl.usage.loaded_model import LoadedModel
from tests.serve.conftest import RunningServer
from tests.usage.cache_cases import DOCUMENT

Serve = Callable[..., RunningServer]
LIMITED = ("--press", "Knorm", "--compression_ratio", "0.5", "--max_new_tokens", "20")
USER = {"role": "user", "content": "Who?"}
IMAGE = [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/a.png"}}]


@pytest.mark.parametrize(
    ("settings", "param", "message"),
    [
        ({"n": 2}, "n", "n=2 is not supported by this server: leave it out"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "tools=.* is not supported"),
        ({"logprobs": True}, "logprobs", "logprobs=True is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "is not supported"),
        ({"extra_body": {"top_k": 3}}, "top_k", "the field 'top_k' is not supported by this server: leave it out"),
        ({"stream_options": {"all": True}}, "stream_options", "include_usage alone"),
        ({"temperature": 3}, "temperature", r"temperature: Input should be less than or equal to 2 \(it is '3'\)"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"stop": ""}, "stop", "at least 1 character"),
        ({"stop": "x" * 257}, "stop", "at most 256 characters"),
        ({"stop": ["x"] * 17}, "stop", "stop: List should have at most 16 items"),
        ({"extra_body": {"stop": 5}}, "stop", r"stop: Input should be a valid list \(it is '5'\)"),
        ({"max_tokens": 21}, "max_tokens", r"max_tokens=21 must be 1 to 20, the most of this server"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "greater than or equal to 1"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "'system', 'developer', 'user'"),
        ({"messages": [{"role": "user", "content": IMAGE}]}, "messages.0.content.0.type", "should be 'text'"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages", "none of the role 'user'"),
        ({"messages": [{"role": "user", "content": " "}]}, "messages", r"messages\[0\] has no question"),
        ({"messages": "Who?"}, "messages", "valid list"),
        ({"messages": [{"role": "user", "content": []}]}, "messages.0.content", "at least 1 item"),
        ({"messages": [{"role": "system", "content": []}, USER]}, "messages.0.content", "at least 1 item"),
    ],
)
def test_what_cannot_be_is_refused_by_field(serve: Serve, settings: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        serve(*LIMITED).ask([USER], **settings)
    assert str(caught.value.param).startswith(param)
    assert caught.value.type == "invalid_request_error"


def test_fields_that_ask_for_nothing_are_taken(serve: Serve) -> None:
    neutral: dict[str, Any] = {"n": 1, "frequency_penalty": 0, "tools": [], "user": "me", "logprobs": None}
    assert serve(*LIMITED).ask("Who?", **neutral, response_format={"type": "text"}).choices


def test_another_model_is_refused(serve: Serve) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt' here: take 'tiny'") as caught:
        serve(*LIMITED).ask("Who?", model="gpt")
    assert caught.value.code == "model_not_found"


def test_prompts_end_within_the_models_positions(serve: Serve, model: LoadedModel) -> None:
    server = serve(*LIMITED)
    frame = len(model.prefix_ids) + len(model.encoder.encode(model.question_suffix))
    most = 1024 - frame
    word = model.encoder.encode(" the")
    assert len(word) == 1
    reply = server.ask(" the" * (most - 5), max_tokens=6)
    assert reply.usage.prompt_tokens + 6 - 1 == 1024
    for extra in (1, 400):
        with pytest.raises(openai.BadRequestError, match="maximum context length is 1024 tokens") as caught:
            server.ask(" the" * (most - 5 + extra), max_tokens=6)
        assert caught.value.code == "context_length_exceeded"
    assert server.ask(" the" * (most - 5), max_tokens=None).usage.completion_tokens <= 6


def test_a_prompt_limit_of_ones_own_and_positions_of_a_re_rotating_press(serve: Serve) -> None:
    with pytest.raises(openai.BadRequestError, match="maximum context length is 50 tokens"):
        serve(*LIMITED, "--max_prompt_tokens", "50").ask(f"{DOCUMENT}\n\nWho?")
    with pytest.raises(ValueError, match=r"--max_prompt_tokens 2000 is more than this model reads \(1024\)"):
        serve(*LIMITED, "--max_prompt_tokens", "2000")
    longer = ("--press", "KeyRerotation(Knorm)", "--compression_ratio", "0.9", "--chunk_tokens", "200")
    server = serve(*longer, "--max_prompt_tokens", "2000")
    reply = server.ask(f"{' the' * 1500}\n\nWho?")
    assert reply.usage.document_tokens > 1500 and reply.usage.kept_pairs < 160


def test_an_answer_of_open_length_ends_with_the_room(serve: Serve) -> None:
    """With the positions that are left behind the kept pairs, and with the server's limit."""
    re_rotating = ("--press", "KeyRerotation(Knorm)", "--compression_ratio", "0.5", "--chunk_tokens", "100")
    server = serve(*re_rotating, "--max_prompt_tokens", "2000")
    reply = server.ask(f"{' the' * 1900}\n\nWho?", max_tokens=None)
    assert 900 < reply.usage.kept_pairs < 1024 - reply.usage.completion_tokens
    short = serve("--max_new_tokens", "3").client.completions.create(model="tiny", prompt="Rivers carry")
    assert short.usage is not None and short.usage.completion_tokens <= 3


def test_bodies_are_bounded_before_they_are_read(serve: Serve) -> None:
    server = serve(*LIMITED)
    post = server.client._client.post
    address, most = f"{server.url}/chat/completions", 64 * 1024 + 65_536
    long = post(address, content=b"x" * (most + 1))
    assert (long.status_code, long.json()["error"]["code"]) == (413, "context_length_exceeded")
    broken = post(address, content=b"{", headers={"content-type": "application/json"})
    assert broken.status_code == 400 and "JSON" in broken.json()["error"]["message"]
    assert post(f"{server.url}/embeddings", json={}).json()["error"]["message"] == "POST /v1/embeddings: Not Found"
    assert 'status="413"' in server.served.metrics.text().decode()


@pytest.mark.parametrize("headers", [{}, {"content-length": "5"}], ids=["alone", "beside a length"])
def test_bodies_in_chunks_are_bounded_while_they_are_read(serve: Serve, headers: dict[str, str]) -> None:
    """As clients send them that do not know the length before; a Content-Length beside is not believed."""
    server = serve(*LIMITED)
    most = 64 * 1024 + 65_536
    whole = json.dumps({"model": "tiny", "messages": [USER], "max_tokens": 2}).encode()

    def sent(body: bytes) -> tuple[int, Any]:
        connection = http.client.HTTPConnection(server.url.split("/")[2], timeout=10)
        connection.putrequest("POST", "/v1/chat/completions")
        given = {"content-type": "application/json", "transfer-encoding": "chunked"} | headers
        for name, value in given.items():
            connection.putheader(name, value)
        connection.endheaders(
            (body[start : start + 50_000] for start in range(0, len(body), 50_000)), encode_chunked=True
        )
        reply = connection.getresponse()
        read = json.loads(reply.read())
        connection.close()
        return reply.status, read

    assert sent(whole)[0] == 200
    assert sent(whole + b" " * (most - len(whole)))[0] == 200
    status, refused = sent(whole + b" " * (most + 1 - len(whole)))
    assert (status, refused["error"]["code"]) == (413, "context_length_exceeded")
    assert refused["error"]["message"].startswith("the request is at least 131,073 bytes long, and a prompt")


def test_what_only_the_model_knows_is_refused_before_the_status_is_sent(serve: Serve) -> None:
    server = serve("--press", "PyramidKV(0.5, 4)", "--chunk_tokens", "20")
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match=r"cannot evict from \d+ chunks"):
            server.ask(f"{DOCUMENT}\n\nWho?", stream=stream)
    assert server.ask("Who?").choices


def test_a_failure_is_the_servers_and_the_next_request_is_answered(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server = serve(*LIMITED)

    def fail(*_: Any) -> None:
        raise RuntimeError("a secret of the machine")

    with monkeypatch.context() as patch:
        patch.setattr(server.served, "answer", fail)
        with pytest.raises(openai.InternalServerError, match="the server failed, and its log says how") as caught:
            server.ask("Who?")
        assert "secret" not in str(caught.value)

        def late(_: Any, __: Any, ___: Any, turn: Any) -> None:
            turn.tell("a piece")
            fail()

        patch.setattr(server.served, "answer", late)
        with pytest.raises(openai.APIError, match="the server failed") as caught_late:
            list(server.ask("Who?", stream=True))
        assert json.dumps(caught_late.value.body)
    assert "a secret of the machine" in caplog.text
    assert server.ask("Who?").choices
