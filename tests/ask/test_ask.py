"""``python -m sparsekv_pl.ask``: answers on stdout, the rest on stderr, and one line for what cannot be done."""

import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from sparsekv_pl.ask.__main__ import main
from sparsekv_pl.ask.arguments import parsed
from sparsekv_pl.cli.command_line import run
from sparsekv_pl.models.backbone import Backbone
from tests.usage.cache_cases import DOCUMENT, MORE, QUESTIONS

ROOT = Path(__file__).parents[2]
Run = pytest.CaptureFixture[str]


class Shell:
    """Runs the command in this process, in a folder with two texts, on the tiny Qwen3."""

    def __init__(self, folder: Path, pretrained: str, output: Run, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.pretrained, self.output, self.patch = folder, pretrained, output, patch
        patch.chdir(folder)
        Path("river.txt").write_text(DOCUMENT)
        Path("dunes.txt").write_text(MORE)

    def __call__(self, *given: str, stdin: str = "") -> tuple[list[str], str]:
        """The lines of stdout, and stderr."""
        self.patch.setattr(sys, "stdin", io.StringIO(stdin))
        main(parsed([*given, "--pretrained", self.pretrained, "--dtype", "float32", "--max_new_tokens", "6"]))
        printed = self.output.readouterr()
        return printed.out.splitlines(), printed.err

    def refused(self, *given: str) -> str:
        """The one line of an error."""
        with pytest.raises(SystemExit) as end:
            run(lambda: self(*given))
        line = str(end.value.code) if isinstance(end.value.code, str) else self.output.readouterr().err
        assert line.startswith("error: ") and line.strip().count("\n") == 0
        return line


@pytest.fixture
def shell(tiny_models: dict[str, str], tmp_path: Path, capsys: Run, monkeypatch: pytest.MonkeyPatch) -> Shell:
    return Shell(tmp_path, tiny_models["qwen3"], capsys, monkeypatch)


EVICTED = ("--press", "Knorm", "--compression_ratio", "0.5")


def test_a_document_is_asked_saved_and_asked_again(shell: Shell) -> None:
    answers, rest = shell("river.txt", *QUESTIONS, *EVICTED, "--save", "river.safetensors")
    assert len(answers) == 3 and any(answers)
    kept, planned, full = re.findall(r"([\d.]+) MiB", rest)[:3]
    assert kept == planned != full
    assert "pairs a head kept (Knorm 0.5)" in rest and "saved: river.safetensors" in rest
    assert "tokens read, " in rest and f"> {QUESTIONS[0]}" in rest
    assert shell("river.safetensors", stdin="\n".join([*QUESTIONS, "", ""]))[0] == answers
    assert shell("river.safetensors", *QUESTIONS, "--together")[0] == answers
    assert shell("-", *QUESTIONS, *EVICTED, stdin=DOCUMENT)[0] == answers
    _, rest = shell("river.txt", QUESTIONS[0], *EVICTED, "--bits", "4", "--save", "small.safetensors")
    assert "(Knorm 0.5, 4 bits)" in rest and f"planned with whole pairs {kept} MiB" in rest
    assert Path("small.safetensors").stat().st_size < Path("river.safetensors").stat().st_size / 2


def test_a_home_folder_is_meant_by_a_tilde(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shell expands none in ``--save=~/...``."""
    monkeypatch.setenv("HOME", str(shell.folder))
    answers, rest = shell("~/river.txt", QUESTIONS[0], *EVICTED, "--save=~/river.safetensors")
    assert re.search(r"saved: ~/river.safetensors, [\d.]+ MiB", rest)
    assert shell("~/river.safetensors", QUESTIONS[0], "--merge=~/river.safetensors")[0]
    assert shell("~/river.safetensors", QUESTIONS[0])[0] == answers


def test_more_text_is_appended_and_merged(shell: Shell) -> None:
    _, alone = shell("river.txt", QUESTIONS[0], *EVICTED, "--save", "river.safetensors")
    _, appended = shell("river.safetensors", QUESTIONS[0], "--append", "dunes.txt")
    _, merged = shell("dunes.txt", QUESTIONS[0], *EVICTED, "--merge", "river.safetensors", "--merge", "dunes.txt")
    read = [
        int(re.findall(r"^(\d+) tokens read, \d+ pairs", text, re.MULTILINE)[0]) for text in (alone, appended, merged)
    ]
    assert read[0] < read[1] < read[2]


def test_sampling_follows_the_seed_and_stop_strings_end_answers(shell: Shell) -> None:
    drawn = [shell("river.txt", QUESTIONS[0], "--temperature", "2", "--seed", seed)[0] for seed in ("1", "1", "2")]
    assert drawn[0] == drawn[1] != drawn[2]
    whole = "\n".join(shell("river.txt", QUESTIONS[0])[0])
    stop = whole[len(whole) // 2 :][:1]
    assert "\n".join(shell("river.txt", QUESTIONS[0], "--stop", stop)[0]) == whole.split(stop)[0].strip()


@pytest.mark.parametrize(
    "given, message",
    [
        ("missing.txt Why?", "missing.txt: No such file or directory: give a path that exists"),
        ("binary.txt Why?", "binary.txt is no text in UTF-8"),
        ("river.txt Why? --press KeyDif --compression_ratio 0.5", "there is no press 'KeyDif'"),
        ("river.txt Why? --press AdaKV(Knorm) --compression_ratio 0.5", "AdaKV.Knorm. hides pairs per head"),
        ("river.txt Why? --press Finch --compression_ratio 0.5", "Finch selects by the question"),
        ("river.txt Why? --press Knorm", "--press Knorm removes nothing: give --compression_ratio"),
        ("river.txt Why? --press Knorm --compression_ratio 1.5", "compression_ratio"),
        ("river.txt Why? --compression_ratio 0.5", "need a --press, such as KeyDiff"),
        ("kept.safetensors Why? --press Knorm", "is evicted already: leave --press out"),
        ("kept.safetensors Why?", "kept.safetensors: there is no such file"),
        ("damaged.safetensors Why?", "damaged.safetensors is damaged"),
        ("river.txt Why? --merge damaged.safetensors", "damaged.safetensors is damaged"),
        ("river.txt Why? --append kept.safetensors", "only a text can be read behind the document; --merge takes"),
        ("river.txt Why? --save kept.bin", "a cache is a .safetensors file"),
        ("river.txt Why? --temperature 0", "must be a number above 0"),
        ("river.txt Why? --temperature nan", "must be a number above 0"),
        ("river.txt Why? --stop ''", "--stop is empty, which would end every answer at once"),
        ("river.txt Why? --top_p 2", "must lie above 0"),
        ("river.txt Why? --together --top_p 0.5", "--together answers greedily"),
        ("river.txt Why? --max_new_tokens none", "invalid int value"),
        ("- ", "the document comes from stdin"),
        ("river.txt Why? --adapter nowhere", "adapter='nowhere': there is no such folder"),
        ("river.txt Why? --save dunes.txt/a.safetensors", "dunes.txt cannot be written: give another place"),
        ("river.txt Why? --press Knorm --budget 0", "budget=0 must be at least 1"),
        ("river.txt Why? --press ObservedAttention --compression_ratio 0.5", "reads attention weights"),
        ("river.txt Why? --press Block(Knorm) --compression_ratio 0.5 --append dunes.txt", "looks at a whole context"),
        ("", "the following arguments are required: DOCUMENT"),
    ],
)
def test_what_cannot_be_done_is_one_line(shell: Shell, given: str, message: str) -> None:
    for name in ("binary.txt", "damaged.safetensors"):
        Path(name).write_bytes(b"\xff\xfe")
    shell.patch.setattr(Backbone, "_model", lambda *_, **__: pytest.fail("the model was loaded"))
    assert re.search(message, shell.refused(*shlex.split(given)))


def test_help_is_there_at_once_and_its_commands_parse() -> None:
    code = "import sys; from sparsekv_pl.ask.arguments import parsed; print({'torch'} & {*sys.modules}); parsed()"
    done = subprocess.run([sys.executable, "-c", code, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("set()\nusage: python -m sparsekv_pl.ask")
    texts = [done.stdout, *((ROOT / name).read_text() for name in ("README.md", "docs/use.md"))]
    commands = re.findall(r"python -m sparsekv_pl\.ask (.*)", "\n".join(texts).replace("\\\n", " "))
    plain = [command for command in commands if not re.match(r"DOCUMENT|--help|\[", command)]
    given = [shlex.split(re.sub(r"[`<|].*| #.*", "", command)) for command in plain]
    assert len(given) > 5
    for words in given:
        assert parsed(words).document
