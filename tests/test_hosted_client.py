"""Asking hosted models: retries, kinds of error, limits, concurrency, and a key that shows nowhere."""

import logging
import threading
from typing import Any

import pytest
from jsonargparse import ArgumentParser

from sparsekv_pl.hosted_client import Answer, HostedModel, Request, Usage
from tests.scripted_server import Reply, failed, said, serving

KEY = "sk-test-5f3a9c1d7e2b"
AT_ONCE = {"retry_after_ms": "1"}
GEMINI_TOO_LONG = [
    {"error": {"code": 400, "message": "The input token count (1200293) exceeds the maximum number of tokens allowed"}}
]
VLLM_TOO_LONG = "This model's maximum context length is 4096 tokens. However, you requested 5000 tokens."


def hosted(base_url: str, **settings: Any) -> HostedModel:
    return HostedModel(**({"model": "m", "base_url": base_url, "key_variable": None, "retries": 2} | settings))


def requests(count: int, prompt_tokens: int = 7, max_new_tokens: int = 3) -> list[Request]:
    return [Request(f"question {index}", prompt_tokens, max_new_tokens) for index in range(count)]


def words(text: str) -> int:
    return len(text.split())


def ask_one(model: HostedModel, request: Request | None = None) -> Answer:
    (answer,) = model.ask([request or requests(1)[0]], words)
    return answer


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
        answers = hosted(url).ask(requests(20), words, reported.__setitem__)
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
        (Reply(b'{"choices": ['), "malformed", 1),
        (Reply(b"<html>\xff"), "malformed", 1),
        (Reply(None), "malformed", 1),
        (Reply({"id": "1"}), "malformed", 1),
        (Reply({"choices": []}), "malformed", 1),
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
        first, second = model.ask(requests(2), words)
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


def test_without_usage_the_tokenizer_counts_and_says_so() -> None:
    with serving(said("one two", usage=None)) as (_, url):
        answer = ask_one(hosted(url), Request("question", 11, 3))
    assert answer.usage == Usage(11, 2)
    assert answer.counted_by == "tokenizer"


def test_thoughts_that_are_in_the_total_alone_are_counted() -> None:
    reply = said("x", usage=(7, 3))
    reply.body["usage"]["total_tokens"] = 60
    with serving(reply) as (_, url):
        assert ask_one(hosted(url)).usage == Usage(7, 53)


def test_a_refusal_that_holds_for_all_stops_the_rest() -> None:
    with serving(failed(401, "wrong key")) as (server, url):
        answers = hosted(url, concurrency=1).ask(requests(5), words)
    assert [answer.error for answer in answers] == ["refused"] + ["not_sent"] * 4
    assert "wrong key" in answers[4].message
    assert len(server.bodies) == 1


def test_requests_overlap_up_to_the_concurrency() -> None:
    reply = said("x")
    reply.delay = 0.1
    with serving(reply) as (server, url):
        hosted(url, concurrency=3).ask(requests(9), words)
        assert server.most_under_way == 3
    with serving(reply) as (server, url):
        hosted(url, concurrency=1).ask(requests(3), words)
        assert server.most_under_way == 1


def test_the_estimate_and_its_price() -> None:
    model = HostedModel("m", dollars_per_million_input=2.0, dollars_per_million_output=10.0, thinking_tokens=100)
    used = model.estimate(requests(4, prompt_tokens=1_000, max_new_tokens=28))
    assert used == Usage(4_000, 512)
    assert model.dollars(used) == pytest.approx(0.008 + 0.00512)
    assert HostedModel("m").dollars(used) is None


@pytest.mark.parametrize(
    ("limit", "named"),
    [
        ({"max_tokens_total": 99}, "max_tokens_total=99"),
        (
            {"max_dollars": 9e-5, "dollars_per_million_input": 1.0, "dollars_per_million_output": 1.0},
            "max_dollars=9e-05",
        ),
    ],
)
def test_what_could_pass_a_limit_is_refused_before_anything_is_sent(limit: dict[str, Any], named: str) -> None:
    with serving(said("x")) as (server, url):
        with pytest.raises(ValueError, match=named):
            hosted(url, **limit).ask(requests(10), words)
        assert server.bodies == []
        assert len(hosted(url, **limit).ask(requests(9), words)) == 9


def test_real_usage_over_a_limit_stops_the_rest() -> None:
    with serving(said("x", usage=(30, 10))) as (server, url):
        model = hosted(url, concurrency=1, max_tokens_total=100)
        answers = model.ask(requests(10), words)
    assert [answer.error for answer in answers] == [None] * 3 + ["not_sent"] * 7  # after 80, 10 more still fitted
    assert len(server.bodies) == 3
    assert "over max_tokens_total=100" in answers[-1].message


def test_requests_under_way_count_before_their_answers_arrive() -> None:
    """After an answer of 85 tokens, of the limit's 100, there is room for one request, not for one per thread."""
    slow = said("x")
    slow.delay = 0.3
    with serving(said("x", usage=(80, 5)), slow) as (server, url):
        hosted(url, concurrency=4, max_tokens_total=100).ask(requests(10), words)
    assert len(server.bodies) <= 4


def test_a_failing_listener_stops_what_was_not_sent() -> None:
    def full(*_: object) -> None:
        raise OSError("disk full")

    reply = said("x")
    reply.delay = 0.02
    with serving(reply) as (server, url):
        with pytest.raises(OSError, match="disk full"):
            hosted(url, concurrency=1).ask(requests(50), words, full)
        assert len(server.bodies) < 10


def test_the_key_reaches_the_server_and_nothing_else(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOSTED_TEST_KEY", f" {KEY}\n")
    caplog.set_level(logging.DEBUG)
    for name in ("openai", "httpx2", "httpcore2"):
        caplog.set_level(logging.DEBUG, logger=name)
    with serving(failed(401, f"{KEY} is no key of ours"), said(f"Your key is {KEY}")) as (server, url):
        model = hosted(url, key_variable="HOSTED_TEST_KEY", concurrency=1)
        answers = model.ask(requests(2), words) + model.ask(requests(1), words)
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    assert [answer.error for answer in answers] == ["refused", "not_sent", None]
    assert answers[0].message.count("[key]") == answers[1].message.count("[key]") == 1
    assert answers[2].text == "Your key is [key]"
    printed = capfd.readouterr()
    shown = f"{model!r}{vars(model)}{answers}{caplog.text}{printed.out}{printed.err}"
    assert "HTTP Request" in caplog.text  # the loggers did speak
    assert KEY not in shown


@pytest.mark.parametrize("value", [None, "  ", f"{KEY}\u00e9", f"{KEY}\nx"])
def test_a_missing_or_unusable_key_is_an_error_that_does_not_show_it(
    value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if value is None:
        monkeypatch.delenv("HOSTED_TEST_KEY", raising=False)
    else:
        monkeypatch.setenv("HOSTED_TEST_KEY", value)
    with serving(said("x")) as (server, url):
        with pytest.raises(ValueError, match="HOSTED_TEST_KEY") as caught:
            hosted(url, key_variable="HOSTED_TEST_KEY").ask(requests(1), words)
        assert server.bodies == []
    assert KEY not in str(caught.value)


def test_a_server_without_key_is_not_sent_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving(said("x")) as (server, url):
        ask_one(hosted(url))
    assert server.headers[0]["authorization"] == "Bearer none"


def test_loopback_does_not_go_through_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with serving(said("direct")) as (_, url):
        assert ask_one(hosted(url, retries=0)).text == "direct"
        assert ask_one(hosted(url.replace("127.0.0.1", "localhost"), retries=0)).text == "direct"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"model": ""}, "hosted.model"),
        ({"base_url": "localhost:8000/v1"}, "hosted.base_url"),
        ({"base_url": f"https://{KEY}@api.example.com/v1"}, "hosted.base_url"),
        ({"base_url": f"https://api.example.com/v1?key={KEY}"}, "hosted.base_url"),
        ({"base_url": "http://localhost:eighty/v1"}, "hosted.base_url"),
        ({"key_variable": KEY}, "hosted.key_variable"),
        ({"timeout": 0.0}, "hosted.timeout=0.0"),
        ({"retries": -1}, "hosted.retries=-1"),
        ({"concurrency": 0}, "hosted.concurrency=0"),
        ({"thinking_tokens": -1}, "hosted.thinking_tokens=-1"),
        ({"max_dollars": 1.0}, "dollars_per_million_input"),
        ({"dollars_per_million_input": 1.0}, "and _output"),
        ({"dollars_per_million_input": -1.0, "dollars_per_million_output": 1.0}, "-1.0"),
    ],
)
def test_settings_that_cannot_work_are_refused_without_showing_a_key(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named) as caught:
        HostedModel(**({"model": "m"} | settings))
    assert KEY not in str(caught.value)


def test_it_goes_through_yaml_without_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    parser = ArgumentParser()
    parser.add_class_arguments(HostedModel, "hosted")
    text = parser.dump(
        parser.parse_args(["--hosted.model=gemini-2.5-flash", "--hosted.max_tokens_total=null"]), skip_unset=False
    )
    assert "key_variable: OPENAI_API_KEY" in text
    assert KEY not in text
    again = parser.instantiate(parser.parse_string(text)).hosted
    assert again == HostedModel("gemini-2.5-flash", max_tokens_total=None)


def test_asking_works_where_an_event_loop_runs() -> None:
    """As in a notebook."""
    import asyncio

    async def inside() -> str:
        return ask_one(hosted(url)).text

    with serving(said("x")) as (_, url):
        assert asyncio.run(inside()) == "x"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("hosted")]
