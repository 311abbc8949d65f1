"""The pages that people read: links lead somewhere, samples run, commands parse, names and files exist."""

import re
import shlex
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from evaluate import EvaluateCommandLine
from train import TrainCommandLine

ROOT = Path(__file__).parents[1]
HISTORY = [ROOT / "CHANGELOG.md", ROOT / "docs/log.md", *(ROOT / "docs/log").glob("*.md")]
"""Records of past days: their names and commands may no longer exist."""
PAGES = sorted({*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")})
PRESENT = [page for page in PAGES if page not in HISTORY]
README_LINES = 150
COMMAND_LINES = {"train.py": TrainCommandLine, "evaluate.py": EvaluateCommandLine}
COMMAND = re.compile(r"(?:^|\s)(python (?:-m )?[\w./]+.*|make [a-z]+(?: [A-Z]+=.*)?)")
NAME = re.compile(r"^(?:sparsekv_pl|data|callbacks)(?:\.\w+)+$")
FILE = re.compile(r"^(?:sparsekv_pl|data|callbacks|configs|tests|benchmarks|notebooks|docs)/[\w./*]*$")

named = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
present = pytest.mark.parametrize("page", PRESENT, ids=lambda page: page.relative_to(ROOT).as_posix())


def blocks(text: str, language: str) -> list[str]:
    """Fenced code in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def prose(text: str) -> str:
    """A page without its fenced code."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Ids of a page's headings, where GitHub and the site agree on them."""
    found = set()
    for heading in re.findall(r"^#+ (.*)$", prose(page.read_text()), re.MULTILINE):
        letters = re.sub(r"[^\w\s-]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)).strip().lower()
        if letters.replace(" ", "-") == (slug := re.sub(r"[-\s]+", "-", letters)):
            found.add(slug)
    return found


def commands() -> dict[str, list[str]]:
    """Command -> the pages that give it, in blocks and in lines; those with ... are no commands."""
    found: dict[str, list[str]] = {}
    for page in PRESENT:
        text = page.read_text()
        lines = "".join(blocks(text, "bash")).replace("\\\n", " ").splitlines()
        for line in [*lines, *re.findall(r"`([^`\n]+)`", prose(text))]:
            for command in COMMAND.findall(re.sub(r"(^|\s)#.*", "", line)):
                if "..." not in command:
                    found.setdefault(" ".join(command.split()), []).append(page.name)
    return found


COMMANDS = commands()
STARTED = [command for command in COMMANDS if command.split()[1] in COMMAND_LINES]
PLAIN = [command for command in STARTED if re.fullmatch(r"python \w+\.py \w+( --config \S+)+( --name \w+)?", command)]
"""Those that override nothing: tests/test_configs.py makes what their files say."""


def test_there_is_something_to_look_at() -> None:
    assert len(PRESENT) >= 16
    assert len(PLAIN) >= 10 and len(STARTED) - len(PLAIN) >= 8
    assert {command.split()[1] for command in STARTED} == set(COMMAND_LINES)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES


@named
def test_links_lead_somewhere_and_pictures_have_a_text(page: Path) -> None:
    text = prose(page.read_text())
    for picture, label, target in re.findall(r"(!?)\[([^]]*)\]\(([^)\s]+)\)", text):
        assert label.strip(), f"{target} has no text"
        if re.match(r"https?://", target):
            assert not picture, f"{target} would be fetched from elsewhere"
            continue
        name, _, anchor = target.partition("#")
        found = (page.parent / name).resolve() if name else page
        assert found.is_file(), f"{target} is not there"
        if anchor:
            assert anchor in anchors(found), f"{found.name} has no heading {anchor!r}"


@named
def test_every_table_has_a_head_and_rows_as_wide(page: Path) -> None:
    for above, table in re.findall(r"^(.*)\n((?:\|.*\n)+)", prose(page.read_text()), re.MULTILINE):
        head, *rest = table.splitlines()
        assert rest and re.fullmatch(r"\|(:?-+:?\|)+", rest[0]), f"a table without a head, or a row outside one: {head}"
        assert not above, f"a table directly below text is text: {above}"
        widths = {line: len(re.findall(r"(?<!\\)\|", line)) for line in [head, *rest]}
        wrong = [line for line, width in widths.items() if width != widths[head]]
        assert not wrong, f"rows with more or fewer cells than their head: {wrong}"


@present
def test_what_a_page_names_exists(page: Path) -> None:
    for code in re.findall(r"`([^`\n]+)`", prose(page.read_text())):
        for word in re.split(r"[\s=({})\[\],]+", code):
            if FILE.match(word) and word not in LOGGED:
                assert list(ROOT.glob(word.rstrip("/"))), f"{word} is not there"
            elif NAME.match(word) and not word.startswith(("data.init_args", *SETTINGS)):
                assert exists(word), f"{word} is no name"


LOGGED = {"data/skipped_documents", "data/left_out_questions/KIND"}
"""Names of curves that look like files of ours."""
SETTINGS = tuple(f"data.{name}" for name in ("text", "query_aware", "shortest_context", "batch_size", "tokens"))
"""Keys of a configuration that look like modules of ours."""


def exists(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        if find_module(".".join(parts[:length])):
            found = import_module(".".join(parts[:length]))
            for part in parts[length:]:
                found = getattr(found, part, None)
            return found is not None
    return False


def find_module(name: str) -> bool:
    """Whether a module can be imported; its parents are."""
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def sources(module: str) -> str:
    """The code of a module, or of a package's files."""
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None, module
    path = Path(spec.origin)
    return "\n".join(file.read_text() for file in (path.parent.glob("*.py") if path.stem == "__init__" else [path]))


@pytest.mark.parametrize("command", [command for command in STARTED if command not in PLAIN])
def test_every_command_parses(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its overrides name settings, with values that these take."""
    _, script, *arguments = shlex.split(command)
    if arguments[0] == "plan":  # its other options are a training's
        arguments = shlex.split(
            re.sub(r"^plan\b", "fit", re.sub(r" --(memory|tflops|device) \S+", "", shlex.join(arguments)))
        )
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", [script])
    helped = any(word.endswith("help") for word in arguments)
    with pytest.raises(SystemExit) as end:
        COMMAND_LINES[script](args=arguments if helped else [*arguments, "--print_config"], seed_everything_default=0)
    assert end.value.code == 0, capsys.readouterr().err[-500:]


def test_every_other_command_exists() -> None:
    """So do the options and the variables that it is given."""
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    for command in PLAIN:
        assert all((ROOT / name).is_file() for name in re.findall(r"--config (\S+)", command)), command
    for command in COMMANDS.keys() - set(STARTED):
        program, *words = shlex.split(command)
        if program == "make":
            assert words[0] in targets, command
            for name in re.findall(r" ([A-Z]+)=", command):
                assert re.search(rf"\$[$(]{name}\b", makefile), command
            continue
        source = sources(words[1]) if words[0] == "-m" else (ROOT / words[0]).read_text()
        for option in (word.lstrip("-").partition("=")[0] for word in words[1:] if word.startswith("--")):
            assert option == "help" or re.search(rf"\b{re.escape(option)}\b", source), (command, option)


@pytest.mark.parametrize(
    "page", [page for page in PRESENT if blocks(page.read_text(), "python")], ids=lambda page: page.stem
)
def test_samples_run(
    page: Path,
    tiny_models: dict[str, str],
    tiny_adapter: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All of a page's Python, top to bottom, on a tiny model."""
    monkeypatch.chdir(tmp_path)
    source = "\n".join(blocks(page.read_text(), "python"))
    for real, tiny in {
        "adapters/smollm2-135m-instruct": tiny_adapter(0),
        "smollm2-135m-instruct": tiny_models["llama"],
    }.items():
        source = source.replace(real, tiny)
    names: dict[str, Any] = {"__name__": "sample"}
    exec(compile(source, str(page), "exec"), names)
    if "found" in names:  # what the last line measured
        assert names["found"][0]["kept_pairs"] == 128
