"""``python -m sparsekv_pl.serve`` as a process: it says where it is, answers, and ends well at a signal."""

import re
import signal
import socket
import time
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from fastapi import FastAPI
from kvpress import KnormPress
from openai import OpenAI

from sparsekv_pl.cli.command_line import run
from sparsekv_pl.serve.__main__ import main
from sparsekv_pl.serve.draining_server import DrainingServer
from sparsekv_pl.serve.serve_arguments import parsed
from sparsekv_pl.usage.context_cache import ContextCache
from sparsekv_pl.usage.loaded_model import LoadedModel
from tests.processes import Started
from tests.usage.cache_cases import DOCUMENT

SECONDS = 120


def test_a_process_answers_and_ctrl_c_lets_it_end_well(tiny_models: dict[str, str], tmp_path: Path) -> None:
    command = [
        "sparsekv_pl/serve/__main__.py",
        "--pretrained",
        tiny_models["qwen3"],
        "--port",
        "0",
        "--drain_seconds",
        "600",
    ]
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
        assert re.search(r"^SIGINT: finishing \d requests?; a second one stops at once$", started.printed, re.MULTILINE)
        assert "Traceback" not in started.printed
    finally:
        started.kill()


def test_whoever_reads_the_address_may_connect(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    served, turns = MagicMock(), MagicMock()
    monkeypatch.setattr("sparsekv_pl.serve.building.built", lambda _: (served, turns, FastAPI()))

    def connect(_: DrainingServer, sockets: list[socket.socket]) -> None:
        assert re.search(r" at http://127\.0\.0\.1:\d+/v1$", capsys.readouterr().err, re.MULTILINE)
        socket.create_connection(sockets[0].getsockname(), timeout=5).close()

    monkeypatch.setattr(DrainingServer, "run", connect)
    main(parsed(["--port", "0"]))
    turns.close.assert_called_once()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--compression_ratio", "0.5"), "--compression_ratio and --budget need a --press"),
        (("--press", "Knorm"), "--press Knorm removes nothing: give --compression_ratio"),
        (("--press", "AdaKV(Knorm(0.5))"), "AdaKV.* hides pairs per head"),
        (("--max_requests", "0"), "--max_requests 0 must be at least 1"),
        (("--kept_mib", "-1"), "--kept_mib -1.0 must be a number of 0 or more"),
        (("--kept_mib", "inf"), "--kept_mib inf must be a number of 0 or more"),
        (("--press", "Knorm", "--budget", "0"), "budget=0 must be at least 1"),
        (("--chunk_tokens", "0"), "chunk_tokens=0 must be at least 1"),
        (("--document", "missing.safetensors"), "missing.safetensors: there is no such file"),
        (("--document", "saved.safetensors"), "saved.safetensors was evicted by Knorm 0.5, .* evicts by full cache"),
        (("--port", "taken"), "--port .*: Address already in use: give another --port, or 0 for a free one"),
    ],
)
def test_what_cannot_be_served_is_said_in_one_line_before_the_model_is_loaded(
    given: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model: LoadedModel,
    tmp_path: Path,
) -> None:
    ContextCache.prefill(model, DOCUMENT, KnormPress(0.5)).save(tmp_path / "saved.safetensors")
    monkeypatch.chdir(tmp_path)

    def loaded(*_: object) -> None:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr("sparsekv_pl.serve.building.LoadedModel", loaded)
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit) as end:
        port = str(taken.getsockname()[1])
        words = [port if word == "taken" else word for word in given]
        server = [] if "--port" in words else ["--port", "0"]
        run(lambda: main(parsed([*words, *server, "--pretrained", model.backbone.pretrained, "--dtype", "float32"])))
    line = str(end.value.code) if isinstance(end.value.code, str) else capsys.readouterr().err
    assert re.match(f"error: .*{message}", line) and line.strip().count("\n") == 0
