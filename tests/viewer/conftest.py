"""The system's Chromium, without a window, and what its console said."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
INSTALL = "sudo apt-get install --yes chromium"


class Opened:
    """A page in a tab of its own, all that its console and its network said, and what its window holds."""

    def __init__(self, tab: Any, path: Path) -> None:
        self.tab = tab
        self.said: list[str] = []
        self.fetched: list[str] = []
        tab.on("console", lambda message: self.said.append(message.text))
        tab.on("pageerror", lambda error: self.said.append(str(error)))
        tab.on("dialog", lambda dialog: (self.said.append("a dialog"), dialog.dismiss()))
        tab.on("request", lambda request: self.fetched.append(request.url))
        tab.goto(path.as_uri())
        tab.wait_for_function("window.viewer")

    def run(self, script: str, *arguments: Any) -> Any:
        """What a function in JavaScript returned."""
        return self.tab.evaluate(script, *arguments)

    def text(self, selector: str) -> str:
        """The text of one element."""
        return str(self.tab.locator(selector).inner_text())

    def shares(self) -> list[float]:
        """Every token's shade: the share that is drawn, negative where base alone keeps it."""
        signed = "(span) => span.style.getPropertyValue('--share') * (span.classList.contains('minus') ? -1 : 1)"
        return list(self.run(f"() => [...document.querySelectorAll('[data-token]')].map({signed})"))


@pytest.fixture(scope="module")
def open_page() -> Iterator[Callable[..., Opened]]:
    """open_page(path, **context) opens a file; the context may be dark, narrow, ..."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"there is no Chromium: {INSTALL}")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        # Chromium's sandbox needs namespaces, which root and many containers do not have; the pages are our own.
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield lambda path, **context: Opened(browser.new_context(**context).new_page(), path)
        browser.close()
