"""The page of one case: a template, a style, scripts and the data, in one file that fetches nothing."""

import base64
import hashlib
import html
import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

SCRIPTS = ("kept.js", "elements.js", "viewer.js")
ESCAPED = {ord(letter): f"\\u{ord(letter):04x}" for letter in "<>&\u2028\u2029"}
"""Letters that could end the element that holds the data; escaped, they are the same JSON."""


def viewer_page(content: Mapping[str, Any]) -> bytes:
    """Render the page; ``content`` is what viewer.js reads, JSON-able and finite, with a "title".

    Its policy (https://www.w3.org/TR/CSP3) runs this style and these scripts alone, by their hashes, and lets nothing
    be fetched. Texts reach the page as JSON and as text nodes, never as markup.
    """
    style, script = _part("viewer.css"), "\n".join(map(_part, SCRIPTS))
    parts = {
        "TITLE": html.escape(str(content["title"])),
        "POLICY": f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'",
        "STYLE": style,
        "SCRIPT": script,
        "DATA": json.dumps(content, allow_nan=False, separators=(",", ":")).translate(ESCAPED),
    }
    pieces = _part("viewer.html").split("%%")  # text, name, text, name, ..., text
    return "".join(parts[piece] if number % 2 else piece for number, piece in enumerate(pieces)).encode()


def _part(name: str) -> str:
    return (files("sparsekv_pl.viewer") / "page" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
