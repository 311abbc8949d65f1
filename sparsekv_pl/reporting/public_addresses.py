"""Web addresses without private parts: the host and known words of the path stay, as the rest may hold a key."""

import re
from typing import Any

from jsonargparse import Namespace

from sparsekv_pl.reporting.redaction import SHORTEST
from sparsekv_pl.reporting.secret_shapes import HIDDEN

ADDRESS = re.compile(r"(?P<host>https?://[^/?#\s]*)(?P<path>[^?#\s]*)(?P<rest>\S*)")
WORD = re.compile(
    r"|v\d{1,2}|v\d(?:alpha|beta)\d?|api|chat|compat|compatible-mode|completions|inference|llm|ml|models|openai|openapi"
    r"|paas|serverless|serving-endpoints"
)
"""Parts of providers' paths that are the same for every user."""


def public_address(address: str) -> str:
    """Hide everything in ``address`` but its host and known words of its path; other text is unchanged.

    >>> public_address("https://host:8000/4711/openai/v1"), public_address("a path/of.mine")
    ('https://host:8000/[hidden]/openai/v1', 'a path/of.mine')
    """
    parts = ADDRESS.fullmatch(address)
    if parts is None:
        return address
    path = "/".join(part if WORD.fullmatch(part) else HIDDEN for part in parts["path"].split("/"))
    return parts["host"] + path + (parts["rest"] and f"{parts['rest'][0]}{HIDDEN}")


def public_addresses(config: Any) -> Any:
    """Apply ``public_address`` to every text in ``config`` (settings, lists, mappings)."""
    if isinstance(config, str):
        return public_address(config)
    if isinstance(config, Namespace):
        return Namespace(**{name: public_addresses(value) for name, value in vars(config).items()})
    if isinstance(config, dict):
        return {name: public_addresses(value) for name, value in config.items()}
    return [public_addresses(value) for value in config] if isinstance(config, list) else config


def without_private_parts(text: str, address: str) -> str:
    """Hide in ``text`` the parts of ``address`` that ``public_address`` hides."""
    parts = ADDRESS.fullmatch(address)
    for part in sorted(parts["path"].split("/") if parts else (), key=len, reverse=True):
        if not WORD.fullmatch(part):
            text = text.replace(part, HIDDEN) if len(part) >= SHORTEST else text.replace(f"/{part}", f"/{HIDDEN}")
    return text
