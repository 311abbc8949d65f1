"""Finished work survives a kill; damaged work is reported and done again."""

import json
import logging
from pathlib import Path

import pytest

from sparsekv_pl.storage.fingerprint import digest_of
from sparsekv_pl.storage.own_folder import locked
from sparsekv_pl.storage.records import Results
from sparsekv_pl.storage.result_keys import key_of
from tests.processes import FORKSERVER

RECORD = {"case": "facts/1", "exact": 1.0, "answers": ["48213", "Ünïcode\n"], "depth": None}


def test_a_key_depends_on_everything_described_and_on_nothing_else() -> None:
    key = key_of(press="SnapKV", settings={"ratio": 0.5, "window": 64})
    assert key == key_of(settings={"window": 64, "ratio": 0.5}, press="SnapKV")
    assert key != key_of(press="SnapKV", settings={"ratio": 0.5, "window": 32})
    assert key != key_of(press="SnapKV", settings={"ratio": 0.5, "window": "64"})


def test_what_was_put_is_there_for_the_next_run(tmp_path: Path) -> None:
    first = Results(tmp_path / "results")
    assert first.get("a") is None
    first.put("a", [RECORD], "base_SnapKV")
    first.put("b", [RECORD, RECORD], "base_SnapKV")
    assert first.get("a") == [RECORD]
    again = Results(tmp_path / "results")
    assert (again.get("a"), again.get("b"), again.get("c")) == ([RECORD], [RECORD, RECORD], None)


def test_ranks_write_apart_and_read_together(tmp_path: Path) -> None:
    for rank in (0, 1):
        Results(tmp_path, rank).put(f"of {rank}", [RECORD], "trained")
    assert len(list(tmp_path.glob("*.jsonl"))) == 2
    assert Results(tmp_path, 1).get("of 0") == [RECORD]


def test_a_line_torn_by_a_kill_is_dropped_and_the_rest_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    results = Results(tmp_path)
    for key in ("a", "b"):
        results.put(key, [RECORD], "x")
    path = tmp_path / "x.0.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    with caplog.at_level(logging.WARNING):
        mended = Results(tmp_path)
    assert (mended.get("a"), mended.get("b")) == ([RECORD], None)
    assert "x.0.jsonl, line 2 is damaged" in caplog.text
    mended.put("b", [RECORD], "x")  # on a line of its own, not on the torn one
    caplog.clear()
    assert Results(tmp_path).get("b") == [RECORD]
    assert not caplog.text


@pytest.mark.parametrize(
    "damage",
    [
        lambda line: line.replace("1.0", "0.0"),
        lambda line: json.dumps({k: v for k, v in json.loads(line).items() if k != "checksum"}) + "\n",
        lambda _: "[]\n",
        lambda line: "\0" * len(line) + "\n",
    ],
    ids=["a changed number", "no checksum", "no object", "zeros"],
)
def test_a_changed_line_is_not_trusted(damage, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Results(tmp_path).put("a", [RECORD], "x")
    path = tmp_path / "x.0.jsonl"
    path.write_text(damage(path.read_text()))
    with caplog.at_level(logging.WARNING):
        assert Results(tmp_path).get("a") is None
    assert "line 1 is damaged" in caplog.text


def _add_and_mend(folder: Path, own: str) -> None:
    for number in range(60):
        results = Results(folder)  # finds what the other's torn lines left, and takes it away
        results.put(f"{own} {number}", [{"n": number}], "trained")
        with locked(folder / ".lock"), (folder / "trained.0.jsonl").open("ab") as file:  # as one killed in a line
            file.write(b'{"checksum": "torn')


def test_two_processes_that_mend_one_file_lose_no_line(tmp_path: Path) -> None:
    processes = [FORKSERVER.Process(target=_add_and_mend, args=(tmp_path, own)) for own in ("one", "other")]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    found = Results(tmp_path)
    assert all(found.get(f"{own} {number}") for own in ("one", "other") for number in range(60))


def test_no_number_that_json_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range float"):
        Results(tmp_path).put("a", [{"nll": float("nan")}], "x")
    assert Results(tmp_path).get("a") is None


def test_a_digest_is_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert digest_of(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
