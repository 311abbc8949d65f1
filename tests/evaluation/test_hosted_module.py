"""HostedModule end to end: against ``transformers serve`` with a real model, and against servers that fail."""

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsekv_pl.evaluation.hosted_module import prompt_of
from sparsekv_pl.models.batch import CaseInfo
from tests.evaluation.hosted_runs import MakeHosted, cases, kept, report, right
from tests.evaluation.scripted_server import Reply, said, serving
from tests.processes import free_port
from tests.tiny_training import MakeTrainer

KEY = "sk-test-0b9d4e8f2a61"
READY_SECONDS = 240


@pytest.fixture(scope="module")
def real_server(tiny_models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """base_url of ``transformers serve`` with the tiny Llama."""
    port = free_port()
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--device", "cpu", "--log-level", "warning", "--force-model", tiny_models["llama"]]
    said = tmp_path_factory.mktemp("serve") / "log"
    with said.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        for _ in range(READY_SECONDS * 10):
            assert process.poll() is None, said.read_text()[-2000:]
            try:
                direct.open(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.1)
        else:
            pytest.fail(f"transformers serve was not ready after {READY_SECONDS} s: {said.read_text()[-2000:]}")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture
def make(tiny_models: dict[str, str], tmp_path: Path) -> MakeHosted:
    return MakeHosted(tiny_models["llama"], tmp_path)


def test_it_asks_a_real_server_and_reports_what_the_model_says(
    real_server: str,
    make: MakeHosted,
    tiny_models: dict[str, str],
    tiny_trainer: MakeTrainer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from transformers import AutoModelForCausalLM

    module, data = make(real_server, model=tiny_models["llama"], concurrency=2), cases()
    tiny_trainer().test(module, data, verbose=False)
    records = {record["question"]: record for record in kept(tmp_path)}
    assert len(records) == 4
    model = AutoModelForCausalLM.from_pretrained(tiny_models["llama"]).eval()
    for batch in data.test_dataloader():
        for info in batch["cases"]:
            chat = [{"role": "user", "content": prompt_of(info)}]
            prompt = module.tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            with torch.no_grad():
                out = model.generate(**prompt, do_sample=False, max_new_tokens=info.max_new_tokens + 4)
            new = out[0, prompt["input_ids"].shape[1] :]
            assert records[info.question]["answer"] == module.tokenizer.decode(new, skip_special_tokens=True)
    printed = capsys.readouterr().out
    assert "4 answered" in printed
    assert "counted by the tokenizer" in printed  # this server reports no usage
    assert all(record["completion_tokens"] > 0 for record in records.values())
    assert (tmp_path / "out" / "report.html").exists()


def test_two_words_fit_a_hosted_model_and_scores_are_those_of_retrieval(
    make: MakeHosted, tiny_trainer: MakeTrainer, tmp_path: Path
) -> None:
    with serving(answer=right) as (server, url):
        tiny_trainer().test(make(url), cases(), verbose=False)
    rows = report(tmp_path)["rows"]
    assert {row["press"] for row in rows} == {"hosted m"}
    assert {row["task"] for row in rows} == {"facts"}
    records = kept(tmp_path)
    assert [record["substring"] for record in records] == [1.0] * 4
    assert [record["exact"] for record in records] == [0.0] * 4
    assert {record["prompt_tokens"] for record in records} == {7}
    assert {body["temperature"] for body in server.bodies} == {0}
    assert report(tmp_path)["environment"]["endpoint"] == url.removesuffix("/v1")


def test_the_answers_own_beginning_is_not_scored(make: MakeHosted, tiny_trainer: MakeTrainer, tmp_path: Path) -> None:
    known: dict[str, CaseInfo] = {}

    def full_sentence(body: dict[str, Any]) -> Reply:
        info = known[body["messages"][0]["content"]]
        return said(f"{info.answer_prefix} {info.answers[0]}.")

    data = cases()
    with serving(answer=full_sentence) as (_, url):
        module = make(url)
        data.tokenizer = module.tokenizer
        data.setup()
        known |= {prompt_of(info): info for batch in data.test_dataloader() for info in batch["cases"]}
        tiny_trainer().test(module, data, verbose=False)
    assert [record["exact"] for record in kept(tmp_path)] == [1.0] * 4


def test_limits_hold_for_all_cases_together_before_the_first_request(
    make: MakeHosted, tiny_trainer: MakeTrainer, tmp_path: Path
) -> None:
    with serving(said("x")) as (server, url):
        with pytest.raises(ValueError, match="max_tokens_total=300"):  # one case has 160
            tiny_trainer().test(make(url, max_tokens_total=300), cases(), verbose=False)
        assert server.bodies == []
    assert not (tmp_path / "out").exists()


def test_dry_sends_nothing_and_says_what_it_would_take(
    make: MakeHosted, tiny_trainer: MakeTrainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prices = {"dollars_per_million_input": 1e3, "dollars_per_million_output": 1e3, "max_dollars": 0.5}
    with serving(said("x")) as (server, url):
        tiny_trainer().test(make(url, dry=True, key_variable="HOSTED_UNSET_KEY", **prices), cases(), verbose=False)
        assert server.bodies == []
    printed = capsys.readouterr().out
    assert "m: 4 requests of at most" in printed
    assert "$0." in printed
    assert "over max_dollars=0.5" in printed
    assert not (tmp_path / "out").exists()


def test_text_windows_are_skipped_and_that_is_said(
    make: MakeHosted, tiny_trainer: MakeTrainer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(said("x")) as (server, url):
        tiny_trainer().test(make(url), cases(windows=2), verbose=False)
    assert "2 text windows skipped" in caplog.text
    assert len(server.bodies) == len(kept(tmp_path)) == 4


def test_the_question_is_asked_once_also_when_the_context_ends_with_it() -> None:
    info = CaseInfo("1", "t", ("7",), "A text.", "\n\nWhich?", "It is")
    assert prompt_of(info) == "A text.\n\nWhich?\nIt is"
    assert prompt_of(CaseInfo("1", "t", ("7",), "A text.\n\nWhich?", "\n\nWhich?", "It is")) == prompt_of(info)
    assert prompt_of(CaseInfo("1", "t", ("7",), "A text.", "\n\nWhich?")) == "A text.\n\nWhich?"


def test_several_processes_are_refused(make: MakeHosted, tiny_trainer: MakeTrainer) -> None:
    module = make("http://127.0.0.1:9/v1")
    module.trainer = tiny_trainer(devices=2, strategy="ddp")
    with pytest.raises(ValueError, match=r"trainer\.devices=2"):
        module.setup("test")
