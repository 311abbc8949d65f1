"""The experiment log keeps one shape: a date, a command, lines that people can read, and an index of all entries."""

import re
from dataclasses import dataclass
from datetime import date
from itertools import pairwise
from pathlib import Path

INDEX = Path(__file__).parents[1] / "docs/log.md"
PAGES = sorted(INDEX.with_suffix("").glob("*.md"))
LINE = 160
PARAGRAPH = 4
"""The most lines of a paragraph: a conclusion is two sentences, and what needs more is a list."""


@dataclass(frozen=True)
class Entry:
    """What stands under one ``###`` heading."""

    page: str
    part: str
    heading: str
    lines: tuple[str, ...]

    @property
    def date(self) -> str:
        """The first line's date, empty where it has none."""
        dated = re.match(r"(\d{4}-\d\d-\d\d)\. ", next((line for line in self.lines if line), ""))
        return dated[1] if dated else ""

    @property
    def link(self) -> str:
        """Where the index finds it: headings lose punctuation and case, spaces become hyphens."""
        return f"log/{self.page}#" + re.sub(r"[^\w\- ]", "", self.heading).lower().replace(" ", "-")


def prose(text: str) -> list[str]:
    """Lines outside code and tables; these are empty, so that numbers and paragraphs stay."""
    lines, in_code = [], False
    for line in text.splitlines():
        fence = line.startswith("```")
        lines.append("" if in_code or fence or line.startswith("|") else line)
        in_code ^= fence
    return lines


def entries_of(page: Path) -> list[Entry]:
    """The entries of a page, as they stand."""
    found: list[Entry] = []
    for part in re.split(r"^## ", page.read_text(), flags=re.MULTILINE)[1:]:
        for entry in re.split(r"^### ", part, flags=re.MULTILINE)[1:]:
            heading, *lines = entry.splitlines()
            found.append(Entry(page.name, part.splitlines()[0], heading, tuple(lines)))
    return found


ENTRIES = [entry for page in PAGES for entry in entries_of(page)]


def test_every_page_has_entries_and_none_stands_outside_them() -> None:
    assert PAGES
    for page in PAGES:
        assert len(entries_of(page)) == page.read_text().count("\n### ") > 0, f"{page.name}: entries are ### under ##"
    assert "\n### " not in INDEX.read_text(), f"{INDEX.name} is the index: write the entry on a page of {INDEX.stem}/"


def test_every_entry_begins_with_its_date_newest_first() -> None:
    undated = [f"{entry.page}: {entry.heading}" for entry in ENTRIES if not entry.date]
    assert not undated, f"without a date at the start (YYYY-MM-DD. Conditions): {undated}"
    for entry, older in pairwise(ENTRIES):
        if (entry.page, entry.part) == (older.page, older.part):
            assert date.fromisoformat(entry.date) >= date.fromisoformat(older.date), f"{older.heading} is newer"


def test_every_entry_has_its_command() -> None:
    for entry in ENTRIES:
        text = " ".join(entry.lines)
        assert ("```bash" in entry.lines) != ("Command not kept" in text), (
            f"{entry.page}: {entry.heading} has neither a command nor 'Command not kept', or both"
        )


def test_lines_can_be_read() -> None:
    for page in (INDEX, *PAGES):
        for number, line in enumerate(prose(page.read_text()), 1):
            assert len(line) <= LINE, f"{page.name}:{number} has {len(line)} characters"


def test_a_conclusion_is_short_and_details_are_lists() -> None:
    for entry in ENTRIES:
        for paragraph in "\n".join(prose("\n".join(entry.lines))).split("\n\n"):
            lines = paragraph.strip().splitlines()
            if lines and not lines[0].startswith("- "):
                assert len(lines) <= PARAGRAPH, f"{entry.page}: {entry.heading}: {len(lines)} lines, make it a list"


def test_the_index_lists_every_entry_once_with_its_date() -> None:
    listed = re.findall(r"^\| \[(.+?)\]\((\S+?)\) \| (\S+) \| .+ \|$", INDEX.read_text(), flags=re.MULTILINE)
    written = [(entry.heading, entry.link, entry.date) for entry in ENTRIES]
    assert not set(written) - set(listed), "without a row in the index"
    assert not set(listed) - set(written), "rows of the index without an entry"
    assert len(listed) == len(set(listed))
