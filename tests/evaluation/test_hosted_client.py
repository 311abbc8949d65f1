"""Asking hosted models: retries, kinds of error, concurrency."""

import pytest

from sparsekv_pl.evaluation.hosted_reply import Answer, Usage
from sparsekv_pl.evaluation.hosted_requests import ask
from tests.evaluation.hosted_cases import AT_ONCE, GEMINI_TOO_LONG, VLLM_TOO_LONG, ask_one, hosted, requests, words
from tests.evaluation.scripted_server import Reply, failed, said, serving


def test_the_request_is_what_an_openai_endpoint_expects() -> None:
    with serving(said("Paris")) as (server, url):
        answer = ask_one(hosted(url))
    assert (answer.text, answer.usage, answer.counted_by) == ("Paris", Usage(7, 3), "provider")
    assert (answer.error, answer.finish_reason) == (None, "stop")
    assert 0 < answer.seconds < 5
    assert server.bodies == [
        {"model": "m", "messages": [{"role": "user", "content": "question 0"}], "temperature": 0, "max_tokens": 3}
    ]


def test_options_are_added_and_null_takes_a_field_away() -> None:
    with serving(said("x")) as (server, url):
        options = {"reasoning_effort": "none", "temperature": None}
        ask_one(hosted(url, options=options, length_parameter="max_completion_tokens", thinking_tokens=5))
    body = server.bodies[0]
    assert body["reasoning_effort"] == "none"
    assert body["max_completion_tokens"] == 8
    assert not {"temperature", "max_tokens"} & set(body)


def test_answers_come_in_the_order_of_the_requests_and_are_reported_one_by_one() -> None:
    reported: dict[int, Answer] = {}
    with serving(answer=lambda body: said(body["messages"][0]["content"].upper())) as (_, url):
        answers = ask(hosted(url), requests(20), words, reported.__setitem__)
    assert [answer.text for answer in answers] == [f"QUESTION {index}" for index in range(20)]
    assert [reported[index] for index in range(20)] == answers


def test_two_429s_are_waited_out_longer_each_time() -> None:
    with serving(failed(429), failed(429), said("at last")) as (server, url):
        answer = ask_one(hosted(url))
    assert answer.text == "at last"
    first, second = (after - before for before, after in zip(server.times, server.times[1:], strict=False))
    assert 0.35 < first < second  # 0.5 s and 1 s, each less up to a quarter
    assert second > 0.7
    assert answer.seconds > 1


def test_the_servers_retry_after_is_kept() -> None:
    with serving(failed(429, **AT_ONCE), failed(503, **AT_ONCE), said("at last")) as (server, url):
        assert ask_one(hosted(url)).text == "at last"
    assert len(server.times) == 3
    assert server.times[-1] - server.times[0] < 0.35


@pytest.mark.parametrize(
    ("reply", "kind", "sent"),
    [
        (failed(429, "slow down", **AT_ONCE), "rate_limit", 3),
        (failed(500, "broken", **AT_ONCE), "server", 3),
        (failed(503, VLLM_TOO_LONG, **AT_ONCE), "server", 3),
        (failed(401, "bad key"), "refused", 1),
        (failed(404, "no such model"), "refused", 1),
        (failed(400, "temperature must be 1"), "refused", 1),
        (failed(400, "too long", "context_length_exceeded"), "context_length", 1),
        (failed(400, VLLM_TOO_LONG), "context_length", 1),
        (failed(400, "The prompt (total length 25938) is too long to fit into the model (context length 4096)."),
         "context_length", 1),
        (Reply(GEMINI_TOO_LONG, 400), "context_length", 1),
        (failed(400, "blocked", "content_filter"), "filtered", 1),
        (said(None, finish_reason="content_filter"), "filtered", 1),
        (Reply(b"<html>\xff"), "malformed", 1),
        (Reply({"id": "1"}), "malformed", 1),
    ],
)  # fmt: skip
def test_kinds_of_error(reply: Reply, kind: str, sent: int) -> None:
    with serving(reply) as (server, url):
        answer = ask_one(hosted(url))
    assert answer.error == kind
    assert answer.text == ""
    assert len(answer.message) > len("Error code: 400")
    assert len(server.bodies) == sent


def test_a_server_that_hangs_is_a_timeout_and_counts_as_used() -> None:
    with serving(Reply({}, delay=0.6), Reply({}, delay=0.6), said("late")) as (server, url):
        model = hosted(url, timeout=0.15, retries=1, concurrency=1, max_tokens_total=25)
        first, second = ask(model, requests(2), words)
    assert first.error == "timeout"
    assert len(server.bodies) == 2
    assert second.error == "not_sent"  # both attempts may be billed: 20 of the 25 tokens, and 10 more are too many
    assert "max_tokens_total=25" in second.message


def test_no_server_is_a_connection_error() -> None:
    with serving(said("x")) as (_, url):
        pass
    assert ask_one(hosted(url, retries=0)).error == "connection"


def test_an_empty_answer_is_an_answer() -> None:
    with serving(said(None, finish_reason="length")) as (_, url):
        answer = ask_one(hosted(url))
    assert (answer.text, answer.error, answer.finish_reason) == ("", None, "length")


def test_requests_overlap_up_to_the_concurrency() -> None:
    reply = said("x")
    reply.delay = 0.1
    with serving(reply) as (server, url):
        ask(hosted(url, concurrency=3), requests(9), words)
        assert server.most_under_way == 3
    with serving(reply) as (server, url):
        ask(hosted(url, concurrency=1), requests(3), words)
        assert server.most_under_way == 1
