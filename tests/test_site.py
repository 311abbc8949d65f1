"""The built site: every page is there, and opening one fetches nothing from elsewhere."""

import re
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import sparsekv_pl
from sparsekv_pl import metrics, objectives, presses

ROOT = Path(__file__).parents[1]
CONFIG = tomllib.loads((ROOT / "zensical.toml").read_text())["project"]
SITE = ROOT / CONFIG["site_dir"]
SOURCES = sorted((ROOT / CONFIG["docs_dir"]).rglob("*.md"))
FETCHED = {
    "script": "src",
    "link": "href",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "object": "data",
}
WEIGHT = 1_000_000
"""Bytes of the heaviest page, its pictures, styles and scripts included."""

CHANGED = max(path.stat().st_mtime for path in [*SOURCES, ROOT / "zensical.toml"])
built = pytest.mark.skipif(
    not (SITE / "index.html").exists() or (SITE / "index.html").stat().st_mtime < CHANGED,
    reason="no site of these pages: make docs builds it and runs this",
)


class Fetched(HTMLParser):
    """Addresses that a browser fetches when it opens a page, and pictures without a text."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.mute: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Look at one tag; a ``link`` to the page's own address or to a neighbour fetches nothing."""
        given = dict(attrs)
        address = given.get(FETCHED.get(tag, ""))
        if address and given.get("rel") not in ("canonical", "next", "prev"):
            self.addresses.append(address)
        if tag == "img" and not given.get("alt"):
            self.mute.append(str(address))


def navigated(items: list[Any]) -> set[str]:
    """Pages named in a navigation."""
    found: set[str] = set()
    for item in items:
        for target in item.values():
            found |= navigated(target) if isinstance(target, list) else {target}
    return found


def test_every_page_is_in_the_navigation() -> None:
    assert len(SOURCES) > 15
    assert navigated(CONFIG["nav"]) == {page.relative_to(ROOT / CONFIG["docs_dir"]).as_posix() for page in SOURCES}


def test_nothing_is_asked_for_that_would_come_from_elsewhere() -> None:
    """Fonts, the repository's stars, Mermaid's script (unpkg.com) and scripts of our own."""
    assert CONFIG["theme"]["font"] is False
    assert not CONFIG.keys() & {"repo_url", "extra_javascript"}
    assert not [style for style in CONFIG["extra_css"] if "//" in style]
    assert not [page for page in SOURCES if "```mermaid" in page.read_text()], "draw it as an SVG"


@built
def test_opening_a_page_fetches_nothing_from_elsewhere() -> None:
    pages = sorted(SITE.rglob("*.html"))
    assert len(pages) == len(SOURCES) + 1  # 404.html
    for page in pages:
        found = Fetched()
        found.feed(page.read_text())
        assert len(found.addresses) > 2
        assert not [address for address in found.addresses if re.match(r"(https?:)?//", address)], page
        assert not found.mute, page
        if page.name != "404.html":  # its addresses start at the site's root
            local = [page.parent / address.partition("?")[0] for address in found.addresses if "data:" not in address]
            assert page.stat().st_size + sum(path.stat().st_size for path in local) < WEIGHT, page
    for style in SITE.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", style.read_text()), style


@built
def test_the_reference_has_every_name_that_a_user_writes() -> None:
    """What the library exports, and every class path of the shipped configurations."""
    exported = {name for room in (sparsekv_pl, presses, objectives, metrics) for name in room.__all__}
    class_path = re.compile(r"class_path: (?:sparsekv_pl|callbacks|data)\.[\w.]*\.(\w+)")
    configs = (ROOT / "configs").rglob("*.yaml")
    written = {name for path in configs for name in class_path.findall(path.read_text())}
    pages = [path.read_text() for path in SITE.glob("api*.html")]
    described = {anchor.rpartition(".")[2] for page in pages for anchor in re.findall(r'id="([\w.]+)"', page)}
    assert len(written) > 30 and not (exported | written) - described
