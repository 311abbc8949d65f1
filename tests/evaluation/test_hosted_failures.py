"""Evaluations of a hosted model with faulty replies."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from sparsekv_pl.evaluation import pace
from tests.evaluation.hosted_runs import MakeHosted, cases, kept, report, right
from tests.evaluation.scripted_server import Reply, failed, said, serving
from tests.tiny_training import MakeTrainer


@pytest.fixture
def make(tiny_models: dict[str, str], tmp_path: Path) -> MakeHosted:
    return MakeHosted(tiny_models["llama"], tmp_path)


def test_what_is_finished_is_not_asked_again_and_what_failed_is(
    make: MakeHosted, tiny_trainer: MakeTrainer, tmp_path: Path
) -> None:
    too_long = failed(400, "too long", "context_length_exceeded")
    with serving(said("x"), too_long, failed(500), said("y")) as (server, url):
        tiny_trainer().test(make(url, concurrency=1), cases(), verbose=False)
        assert len(server.bodies) == 4
        first = report(tmp_path)
        assert sorted(record.get("error", "").split(":")[0] for record in kept(tmp_path)) == ["", "", "context_length"]
        assert "server: " in json.dumps(first)
        assert "context_length: " in json.dumps(first)
        tiny_trainer().test(make(url, concurrency=1), cases(), verbose=False)
        assert server.bodies[4:] == server.bodies[2:3]
        assert "server: " not in json.dumps(report(tmp_path))
        tiny_trainer().test(make(url, concurrency=1), cases(), verbose=False)
        assert len(server.bodies) == 5
        tiny_trainer().test(make(url, concurrency=1, model="another"), cases(), verbose=False)
        assert len(server.bodies) == 9


def test_answers_of_any_usage_are_kept_and_not_paid_for_again(
    make: MakeHosted, tiny_trainer: MakeTrainer, tmp_path: Path
) -> None:
    replies = [said("x", usage=None) for _ in range(4)]
    for reply, usage in zip(replies, ({}, {"total_tokens": 90}, {"prompt_tokens": -1}, [float("nan")]), strict=True):
        reply.body["usage"] = usage
    with serving(*replies) as (server, url):
        for _ in range(2):
            tiny_trainer().test(make(url, concurrency=1), cases(), verbose=False)
    assert len(server.bodies) == 4
    assert sorted(record["answer"] for record in kept(tmp_path)) == ["x"] * 4


def test_declined_and_unreadable_answers_are_no_wrong_ones_and_not_paid_for_again(
    make: MakeHosted, tiny_trainer: MakeTrainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    declined, unreadable = said(None), said(None)
    declined.body["choices"][0]["message"]["refusal"] = "I will not"
    unreadable.body["choices"][0]["message"]["content"] = 7

    def reply(body: dict[str, Any]) -> Reply:
        return {0: declined, 1: unreadable}.get(len(server.bodies) - 1, right(body))

    with serving(answer=reply) as (server, url):
        for _ in range(2):
            tiny_trainer().test(make(url, concurrency=1), cases(), verbose=False)
    assert len(server.bodies) == 4
    printed = capsys.readouterr().out
    assert "2 answered" in printed and "1 declined" in printed and "1 unreadable" in printed
    assert [(row["cases"], row["substring_before"]) for row in report(tmp_path)["rows"]] == [(2, 1.0)]
    assert sum(record["prompt_tokens"] for record in kept(tmp_path)) == 28


def test_what_a_garbled_reply_may_have_cost_is_kept_when_it_is_asked_again(
    make: MakeHosted, tiny_trainer: MakeTrainer, tmp_path: Path
) -> None:
    with serving(Reply(b"<html>"), Reply(b"", status=0), said("x", usage=(7, 3))) as (server, url):
        tiny_trainer().test(make(url, concurrency=1), cases(), verbose=False)
        first = {line["error"].split(":")[0]: line for line in kept(tmp_path) if "error" in line}
        assert set(first) == {"malformed", "connection"}
        assert {line["counted_by"] for line in first.values()} == {"estimate"}
        tiny_trainer().test(make(url, concurrency=1), cases(), verbose=False)
    assert len(server.bodies) == 6
    again = [line["prompt_tokens"] - 7 for line in kept(tmp_path)[4:]]
    assert sorted(again) == sorted(line["prompt_tokens"] for line in first.values())
    assert {line["answer"] for line in kept(tmp_path)[4:]} == {"x"}


@pytest.mark.parametrize("refusal", [failed(401, "bad key"), failed(429, "no", "insufficient_quota")])
def test_wrong_keys_and_spent_quotas_end_the_run_after_the_report(
    refusal: Reply, make: MakeHosted, tiny_trainer: MakeTrainer, tmp_path: Path
) -> None:
    with serving(said("x"), refusal, said("y")) as (server, url):
        with pytest.raises(ValueError, match=r"m: no further requests are sent: HTTP 4.*run again to send the rest"):
            tiny_trainer().test(make(url, concurrency=1), cases(), verbose=False)
        assert len(server.bodies) == 2
        assert [record["answer"] for record in kept(tmp_path)] == ["x"]
        assert "not_sent: " in json.dumps(report(tmp_path))
        tiny_trainer().test(make(url, concurrency=1), cases(), verbose=False)
    assert len(server.bodies) == 5
    assert sorted(record["answer"] for record in kept(tmp_path)) == ["x", "y", "y", "y"]


def test_thoughts_are_not_scored_and_a_lone_surrogate_is_no_end_of_a_run(
    make: MakeHosted, tiny_trainer: MakeTrainer, tmp_path: Path
) -> None:
    def reply(body: dict[str, Any]) -> Reply:
        return said(f"<think>{body['messages'][0]['content']} \udc00</think>\ud83d", finish_reason="\ud83d")

    with serving(answer=reply) as (_, url):
        tiny_trainer().test(make(url), cases(), verbose=False)
    assert {(record["answer"], record["substring"]) for record in kept(tmp_path)} == {("\ufffd", 0.0)}


def test_without_a_terminal_a_line_every_half_a_minute_says_how_far_it_is(
    make: MakeHosted,
    tiny_trainer: MakeTrainer,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ticks = itertools.count(0, 14)
    monkeypatch.setattr(pace.Pace, "clock", staticmethod(lambda: float(next(ticks))))
    for shows in (True, False):
        with serving(said("x")) as (_, url):
            tiny_trainer(enable_progress_bar=shows).test(
                make(url, model=f"m{shows}"), cases(cases_per_cell=4), verbose=False
            )
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("asking ")]
    assert lines == [
        "asking mTrue: 1 of 8 requests, 2 min left",
        "asking mTrue: 4 of 8 requests, 56 s left",
        "asking mTrue: 7 of 8 requests, 14 s left",
        "asking mTrue: 8 of 8 requests",
    ]


def test_all_failing_is_a_report_too(
    make: MakeHosted, tiny_trainer: MakeTrainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(failed(500, "out of order")) as (_, url):
        tiny_trainer().test(make(url), cases(), verbose=False)
    assert "4 server" in capsys.readouterr().out
    assert "out of order" in (tmp_path / "out" / "report.md").read_text()
    assert kept(tmp_path) == []
