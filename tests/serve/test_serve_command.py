"""``python -m sparsekv_pl.serve`` as a process: it says where it is, answers, and ends well at a signal."""

import re
import signal
import socket
import time
from pathlib import Path

import pytest
from openai import OpenAI

from sparsekv_pl.cli.command_line import run
from sparsekv_pl.serve.__main__ import main
from sparsekv_pl.serve.serve_arguments import parsed
from tests.processes import Started

SECONDS = 120


def test_a_process_answers_and_ctrl_c_lets_it_end_well(tiny_models: dict[str, str], tmp_path: Path) -> None:
    command = ["sparsekv_pl/serve/__main__.py", "--pretrained", tiny_models["qwen3"], "--port", "0"]
    started = Started([*command, "--press", "Knorm", "--compression_ratio", "0.5"], tmp_path / "log")
    try:
        for _ in range(SECONDS * 10):
            assert started.poll() is None, started.printed
            if found := re.search(
                r"^(\S+) \(Knorm 0\.5\) at (http://127\.0\.0\.1:\d+/v1)$", started.printed, re.MULTILINE
            ):
                break
            time.sleep(0.1)
        assert found
        with OpenAI(base_url=found[2], api_key="none", timeout=SECONDS) as client:
            message = {"role": "user", "content": "Rivers carry sand.\n\nWhat do they carry?"}
            stream = client.chat.completions.create(
                model=found[1],
                messages=[message],
                max_tokens=300,
                stream=True,
                temperature=2,
                seed=1,  # type: ignore[call-overload]
            )
            next(iter(stream))
            started.send_signal(signal.SIGINT)
            reasons = [part.choices[0].finish_reason for part in stream]
        assert reasons[-1] in ("stop", "length")
        assert started.wait(SECONDS) == 0
        assert re.search(r"^SIGINT: finishing \d requests; a second one stops at once$", started.printed, re.MULTILINE)
        assert "Traceback" not in started.printed
    finally:
        started.kill()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--compression_ratio", "0.5"), "--compression_ratio and --budget need a --press"),
        (("--press", "Knorm"), "--press Knorm removes nothing: give --compression_ratio"),
        (("--press", "AdaKV(Knorm(0.5))"), "AdaKV.* hides pairs per head"),
        (("--max_requests", "0"), "--max_requests 0 must be at least 1"),
        (("--kept_mib", "-1"), "--kept_mib -1.0 must be 0 or more"),
        (("--document", "missing.safetensors"), "missing.safetensors: there is no such file"),
        (("--port", "taken"), "--port .*: Address already in use: give another --port, or 0 for a free one"),
    ],
)
def test_what_cannot_be_served_is_said_in_one_line_before_the_model_is_loaded(
    given: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def loaded(*_: object) -> None:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr("sparsekv_pl.serve.building.LoadedModel", loaded)
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit) as end:
        port = str(taken.getsockname()[1])
        words = [port if word == "taken" else word for word in given]
        run(lambda: main(parsed(words if "--port" in words else [*words, "--port", "0"])))
    line = str(end.value.code) if isinstance(end.value.code, str) else capsys.readouterr().err
    assert re.match(f"error: .*{message}", line) and line.strip().count("\n") == 0
