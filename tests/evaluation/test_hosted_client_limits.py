"""Limits on a hosted model's cost, and hiding its key."""

import logging
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from sparsekv_pl.evaluation.hosted_client import HostedModel
from sparsekv_pl.evaluation.hosted_reply import Usage
from sparsekv_pl.evaluation.hosted_requests import ask
from tests.evaluation.hosted_cases import KEY, ask_one, hosted, requests, words
from tests.evaluation.scripted_server import failed, said, serving


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
            ask(hosted(url, **limit), requests(10), words)
        assert server.bodies == []
        assert len(ask(hosted(url, **limit), requests(9), words)) == 9


def test_real_usage_over_a_limit_stops_the_rest() -> None:
    with serving(said("x", usage=(30, 10))) as (server, url):
        model = hosted(url, concurrency=1, max_tokens_total=100)
        answers = ask(model, requests(10), words)
    assert [answer.error for answer in answers] == [None] * 3 + ["not_sent"] * 7  # after 80, 10 more still fitted
    assert len(server.bodies) == 3
    assert "over max_tokens_total=100" in answers[-1].message


def test_requests_under_way_count_before_their_answers_arrive() -> None:
    """After an answer of 85 tokens, of the limit's 100, there is room for one request, not for one per thread."""
    slow = said("x")
    slow.delay = 0.3
    with serving(said("x", usage=(80, 5)), slow) as (server, url):
        ask(hosted(url, concurrency=4, max_tokens_total=100), requests(10), words)
    assert len(server.bodies) <= 4


def test_a_failing_listener_stops_what_was_not_sent() -> None:
    def full(*_: object) -> None:
        raise OSError("disk full")

    reply = said("x")
    reply.delay = 0.02
    with serving(reply) as (server, url):
        with pytest.raises(OSError, match="disk full"):
            ask(hosted(url, concurrency=1), requests(50), words, full)
        assert len(server.bodies) < 10


@pytest.fixture
def ctrl_c_raises() -> Iterator[None]:
    """A shell that starts a process in the background, and Lightning after an interrupt, leave SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c_raises")
def test_ctrl_c_sends_nothing_more_and_keeps_what_is_under_way() -> None:
    answered: list[int] = []

    def interrupt(index: int, _: object) -> None:
        answered.append(index)
        if len(answered) == 1:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    reply = said("x")
    reply.delay = 0.1
    with serving(reply) as (server, url):
        with pytest.raises(KeyboardInterrupt):
            ask(hosted(url, concurrency=2), requests(50), words, interrupt)
        assert len(answered) == len(server.bodies) < 10


def test_the_key_reaches_the_server_and_nothing_else(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOSTED_TEST_KEY", f" {KEY}\n")
    caplog.set_level(logging.DEBUG)
    for name in ("httpx", "httpcore"):
        caplog.set_level(logging.DEBUG, logger=name)
    with serving(failed(401, f"{KEY} is no key of ours"), said(f"Your key is {KEY}")) as (server, url):
        model = hosted(url, key_variable="HOSTED_TEST_KEY", concurrency=1)
        answers = ask(model, requests(2), words) + ask(model, requests(1), words)
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
            ask(hosted(url, key_variable="HOSTED_TEST_KEY"), requests(1), words)
        assert server.bodies == []
    assert KEY not in str(caught.value)


def test_a_server_without_key_is_not_sent_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving(said("x")) as (server, url):
        ask_one(hosted(url))
    assert "authorization" not in server.headers[0]


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
        ({"base_url": f"https://gateway.example.com/{KEY}/v1"}, "hosted.base_url"),
        ({"base_url": "http://localhost:eighty/v1"}, "hosted.base_url"),
        ({"key_variable": KEY}, "hosted.key_variable"),
        ({"timeout": 0.0}, "hosted.timeout=0.0"),
        ({"retries": -1}, "hosted.retries=-1"),
        ({"concurrency": 0}, "hosted.concurrency=0"),
        ({"max_tokens_total": -7}, "hosted.max_tokens_total=-7"),
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


def test_asking_works_where_an_event_loop_runs() -> None:
    """As in a notebook."""
    import asyncio

    async def inside() -> str:
        return ask_one(hosted(url)).text

    with serving(said("x")) as (_, url):
        assert asyncio.run(inside()) == "x"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("hosted")]
