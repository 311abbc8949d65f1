"""Invalid replies: one request fails within limits and is counted, and the run continues."""

import gzip
import json
import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from sparsekv_pl.evaluation import hosted_requests
from sparsekv_pl.evaluation.hosted_reply import Usage
from sparsekv_pl.evaluation.hosted_requests import ask
from sparsekv_pl.evaluation.hosted_thoughts import without_thoughts
from tests.evaluation.hosted_cases import AT_ONCE, ask_one, hosted, requests, words
from tests.evaluation.scripted_server import Reply, failed, said, serving

MOST = Usage(7, 3)
"""What one of ``requests`` can use."""


def content(value: Any, **message: Any) -> Reply:
    reply = said("x")
    reply.body["choices"][0]["message"] |= {"content": value} | message
    return reply


def usage(value: Any) -> Reply:
    reply = said("one two", usage=None)
    reply.body["usage"] = value
    return reply


def dripping(*parts: bytes) -> Iterator[bytes]:
    """``parts`` with blanks between, for 2.4 s in all."""
    for part in parts:
        yield part
        for _ in range(12):
            time.sleep(2.4 / 12 / len(parts))
            yield b" "


def endless() -> Iterator[bytes]:
    yield b'{"choices": "'
    while True:
        yield b"x" * 65_536


BOMB = gzip.compress(json.dumps(said("x" * 32 * 2**20).body).encode())
HEADERS = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nX-Slow:"

BAD: dict[str, tuple[Callable[[], Reply], str, Usage]] = {
    "drips its body": (lambda: Reply(dripping(json.dumps(said("late").body).encode())), "timeout", MOST),
    "drips its headers": (lambda: Reply(dripping(HEADERS, b"\r\n\r\n{}"), status=0), "timeout", MOST),
    "a gateway's timeout": (lambda: failed(504, "upstream"), "timeout", MOST),
    "lost without a reply": (lambda: Reply(b"", status=0), "connection", MOST),
    "lost in its headers": (lambda: Reply(HEADERS, status=0), "connection", MOST),
    "lost in its body": (lambda: Reply(b'{"choi', headers={"content-length": "900"}), "connection", MOST),
    "no HTTP": (lambda: Reply(b"hello\r\n\r\n", status=0), "connection", MOST),
    "endless": (lambda: Reply(endless()), "malformed", MOST),
    "a gzip bomb": (lambda: Reply(BOMB, headers={"content-encoding": "gzip"}), "malformed", MOST),
    "deep JSON": (lambda: Reply(b'{"choices":' + b"[" * 200_000), "malformed", MOST),
    "deep JSON that ends": (lambda: Reply(b'{"a":' * 980 + b"1" + b"}" * 980), "malformed", MOST),
    "a number of many digits": (lambda: Reply(b'{"choices": ' + b"9" * 5_000 + b"}"), "malformed", MOST),
    "content 7": (lambda: content(7), "unreadable", Usage(7, 3)),
    "content true": (lambda: content(True), "unreadable", Usage(7, 3)),
    "content an object": (lambda: content({"text": "x"}), "unreadable", Usage(7, 3)),
    "content numbers": (lambda: content([1, 2]), "unreadable", Usage(7, 3)),
    "content parts of no text": (lambda: content([{"type": "image"}]), "unreadable", Usage(7, 3)),
    "message a text": (lambda: Reply({"choices": [{"message": "x"}], "usage": {"total_tokens": 9}}),
                       "unreadable", Usage(7, 2)),
    "choice a list": (lambda: Reply({"choices": [[]]}), "unreadable", MOST),
    "choices null": (lambda: Reply({"choices": None}), "malformed", MOST),
    "an error with status 200": (lambda: Reply({"error": {"code": 400, "message": "no"}}), "refused", Usage()),
    "an error that is a number": (lambda: Reply({"error": 7}, 400), "refused", Usage()),
    "a refusal": (lambda: content(None, refusal="I will not"), "declined", Usage(7, 3)),
    "a refusal in parts": (lambda: content([{"type": "refusal", "refusal": "I will not"}]), "declined", Usage(7, 3)),
    "a reason to finish": (lambda: said("", finish_reason="SAFETY"), "filtered", Usage(7, 3)),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_one_request_fails_bounded_and_counted_and_the_run_goes_on(kind: str) -> None:
    bad, error, used = BAD[kind]

    def reply(body: dict[str, Any]) -> Reply:
        return bad() if body["messages"][0]["content"] == "question 1" else said("fine")

    with serving(answer=reply) as (server, url):
        model = hosted(url, concurrency=1, retries=0, timeout=1.2 if error == "timeout" else 5.0)
        answers = ask(model, requests(3), words)
    assert [answer.text for answer in answers] == ["fine", "", "fine"]
    assert (answers[1].error, answers[1].usage) == (error, used)
    assert 3 < len(answers[1].message) <= 300
    answers[1].message.encode()
    assert len(server.bodies) == 3


def test_what_a_reply_unpacks_to_is_never_in_memory() -> None:
    with serving(Reply(BOMB, headers={"content-encoding": "gzip"})) as (server, url):
        tracemalloc.start()
        answer = ask_one(hosted(url))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert "compressed" in answer.message
    assert server.headers[0]["accept-encoding"] == "identity"
    assert peak < 2 * hosted_requests.MOST_BYTES


def test_json_of_any_depth_is_an_error_of_one_request() -> None:
    """What can be parsed may still be too deep to be shown."""

    def reply(body: dict[str, Any]) -> Reply:
        depth = 500 + 10 * int(body["messages"][0]["content"].split()[1])
        return Reply(b'{"error": {"code": ' + b"[" * depth + b"]" * depth + b"}}", 400)

    with serving(answer=reply) as (_, url):
        answers = ask(hosted(url, retries=0), requests(60), words)
    assert {answer.error for answer in answers} == {"refused", "malformed"}


def test_every_attempt_that_may_be_billed_counts_and_limits_hold_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosted_requests, "FIRST_PAUSE", 0.01)
    lost = Reply(b"", status=0)
    with serving(lost, lost, said("x")) as (server, url):
        answer = ask_one(hosted(url, max_tokens_total=30))
        assert (answer.text, answer.usage, answer.counted_by) == ("x", Usage(21, 9), "estimate")
    with serving(lost) as (server, url):
        answer = ask_one(hosted(url, max_tokens_total=25))
    assert (answer.error, answer.usage, len(server.bodies)) == ("connection", Usage(14, 6), 2)
    assert "max_tokens_total=25" in answer.message


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (["Pa", "ris"], "Paris"),
        ([{"type": "text", "text": "Pa"}, {"type": "output_text", "text": "ris"}], "Paris"),
        ([{"type": "thinking", "thinking": [{"type": "text", "text": "Rome?"}]}, {"type": "text", "text": "x"}], "x"),
        ([], ""),
        ("7 \ud83d", "7 \ufffd"),
        ("7 \ud83d\ude00", "7 \U0001f600"),
    ],
)
def test_content_that_can_be_read(value: Any, text: str) -> None:
    with serving(content(value)) as (_, url):
        answer = ask_one(hosted(url))
    assert (answer.text, answer.error, answer.usage) == (text, None, Usage(7, 3))


ESTIMATED = Usage(7, 2)


@pytest.mark.parametrize(
    ("reported", "used", "counted_by"),
    [
        *((nonsense, ESTIMATED, "tokenizer") for nonsense in (None, {}, [], 7, "7", {"input_tokens": 9})),
        *(
            ({"prompt_tokens": bad, "completion_tokens": bad, "total_tokens": bad}, ESTIMATED, "tokenizer")
            for bad in (None, 0, -5, float("nan"), float("inf"), 10**400, True, "9", [9], {})
        ),
        ({"total_tokens": 60}, Usage(7, 53), "provider"),
        ({"total_tokens": 5}, Usage(5, 0), "provider"),
        ({"prompt_tokens": 9, "completion_tokens": -1, "total_tokens": 12}, Usage(9, 3), "provider"),
        ({"completion_tokens": 4, "total_tokens": 13}, Usage(9, 4), "provider"),
        ({"prompt_tokens": 9}, Usage(9, 2), "tokenizer"),
        ({"completion_tokens": 4}, Usage(7, 4), "tokenizer"),
        ({"prompt_tokens": 9.0, "completion_tokens": 4.0}, Usage(9, 4), "provider"),
        ({"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 2}, Usage(9, 4), "provider"),
    ],
)
def test_an_answer_is_kept_whatever_its_usage_says(reported: Any, used: Usage, counted_by: str) -> None:
    with serving(usage(reported)) as (_, url):
        answer = ask_one(hosted(url))
    assert (answer.text, answer.error) == ("one two", None)
    assert (answer.usage, answer.counted_by) == (used, counted_by)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        *((f"{begin}Rome? {end}Paris", "Paris") for begin, end in (
            ("<think>", "</think>"), ("<THINKING>", "</THINKING>"), ("[THINK]", "[/THINK]"), ("◁think▷", "◁/think▷"),
            ("<seed:think>", "</seed:think>"), ("<thought>", "</thought>"), ("<reasoning>", "</reasoning>"),
            ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
            ("", "</think>"),
        )),
        ("<think>Rome?", ""),
        ("Paris <think>or Rome?", "Paris "),
        ("<think>a</think>Par<think>b</think>is", "Paris"),
        ("<think>a <think>b</think> c</think>Paris", "Paris"),
        ("I think of <b>Paris</b> [1]", "I think of <b>Paris</b> [1]"),
    ],
)  # fmt: skip
def test_thoughts_are_no_part_of_the_answer(text: str, answer: str) -> None:
    assert without_thoughts(text) == answer


def test_thoughts_are_counted_where_the_provider_does_not() -> None:
    apart = content("Paris", reasoning_content=" Rome it is")
    apart.body["usage"] = None
    with serving(said("<think>Rome it is </think>Paris", usage=None), apart) as (_, url):
        answers = ask(hosted(url, concurrency=1), requests(2), words)
    assert [(answer.text, answer.usage, answer.counted_by) for answer in answers] == [
        ("Paris", Usage(7, 4), "tokenizer")
    ] * 2


def test_a_prompt_is_not_sent_to_another_host() -> None:
    with serving(said("x")) as (other, elsewhere), serving(
        *(Reply({}, status, headers={"location": f"{elsewhere}/a-key-4711"}) for status in (307, 308, 302))
    ) as (server, url):  # fmt: skip
        answers = ask(hosted(url, concurrency=1), requests(3), words)
    assert [answer.error for answer in answers] == ["refused"] * 3
    assert all(f"redirects to {elsewhere.removesuffix('/v1')}, " in answer.message for answer in answers)
    assert (len(server.bodies), other.bodies) == (3, [])


QUOTA = {
    "402": failed(402, "Insufficient Balance"),
    "code": failed(429, "You exceeded your current quota", "insufficient_quota", **AT_ONCE),
    "credit": failed(400, "Your credit balance is too low to access the API"),
    "of a day": failed(429, "Quota exceeded for GenerateRequestsPerDayPerProject", **AT_ONCE),
    "with status 200": Reply({"error": {"code": 402, "message": "Insufficient credits"}}),
}


@pytest.mark.parametrize("kind", QUOTA)
def test_a_spent_quota_stops_the_rest_at_once(kind: str) -> None:
    """Also requests that wait for another attempt."""
    slow = failed(429, "slow down", retry_after="30")

    def reply(body: dict[str, Any]) -> Reply:
        asked = body["messages"][0]["content"]
        return {"question 0": said("fine"), "question 1": slow}.get(asked, QUOTA[kind])

    with serving(answer=reply) as (server, url):
        answers = ask(hosted(url, concurrency=2), requests(6), words)
    assert [answer.error for answer in answers] == [None, "rate_limit", "quota"] + ["not_sent"] * 3
    assert "earlier request was refused: HTTP 4" in answers[5].message
    assert len(server.bodies) == 3


def test_a_minutes_limit_is_no_spent_quota() -> None:
    """Gemini's words for it."""
    minute = failed(429, "You exceeded your current quota, please check your plan. Please retry in 3 s", **AT_ONCE)
    minute.body["error"]["status"] = "RESOURCE_EXHAUSTED"
    with serving(minute, said("x")) as (_, url):
        assert ask_one(hosted(url)).text == "x"
