"""Limits on the depth and size of a configuration: with YAML's anchors it may contain itself, or grow from one line.

Deeply nested text crashes the process in a loader written in C, and raises RecursionError in a Python one.
"""

from typing import Any

import yaml

DEEPEST, MOST = 50, 100_000
"""Most levels and most values."""


def check_depth(text: str) -> None:
    """Raise ``ValueError`` for YAML that is nested too deep to load, and ``yaml.YAMLError`` for invalid YAML."""
    depth = 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            assert event.start_mark is not None
            raise ValueError(f"line {event.start_mark.line + 1} is more than {DEEPEST} levels deep: write it flatter")


def check_extent(node: Any) -> None:
    """Raise ``ValueError`` for a value that contains itself, or that anchors have made too large."""
    waiting, seen = [(node, "it", 0)], 0
    while waiting:
        item, top, depth = waiting.pop()
        seen += 1
        if depth > DEEPEST or seen > MOST:
            raise ValueError(
                f"{top} is more than {DEEPEST} levels deep or {MOST:,} values large: an anchor (&) may stand inside "
                "what it names, or be repeated (*) too often"
            )
        if isinstance(item, dict):
            waiting += [(inside, top if depth else str(name), depth + 1) for name, inside in item.items()]
        elif isinstance(item, list):
            waiting += [(inside, top, depth + 1) for inside in item]
