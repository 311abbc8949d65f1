"""benchmarks/sampled_text.py on a tiny model: documents of every batch, in a file that is never half there."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import sampled_text


def test_every_batch_is_in_the_file_which_appears_at_the_end(
    tmp_path: Path, tiny_models: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output, sample, made = tmp_path / "made" / "sampled.jsonl", sampled_text.documents, list[str]()

    def documents(*given: Any) -> list[str]:
        assert not output.exists(), "a training that starts now would read a part"
        made.extend(found := sample(*given))
        return found

    monkeypatch.setattr(sampled_text, "documents", documents)
    arguments = ["--pretrained", tiny_models["llama"], "--start", "<s>", "--tokens", "8", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["sampled_text.py", *arguments])
    sampled_text.main()
    assert [json.loads(line)["text"] for line in output.read_text().splitlines()] == made
    assert len(made) >= sampled_text.ROWS
    assert f"{len(made)} documents" in capsys.readouterr().out.splitlines()[-1]


def test_a_start_that_is_no_token_is_one_line(
    tiny_models: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["sampled_text.py", "--pretrained", tiny_models["llama"], "--start", "<nowhere>"])
    with pytest.raises(SystemExit):
        sampled_text.main()
    assert "--start <nowhere> is no token of" in capsys.readouterr().err.splitlines()[-1]
