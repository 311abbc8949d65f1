"""Limits of a YAML text: its depth, its size with anchors, and each key once.

With anchors a text may contain itself, or grow from one line. Deeply nested text crashes the process in a C loader, and
raises RecursionError in a Python one. Of a key given twice the last would silently win.
"""

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


def check_nodes(text: str) -> None:
    """Raise ``ValueError`` if ``text`` contains itself, is too large with its anchors, or has a key twice."""
    waiting = [(yaml.compose(text, Loader=yaml.SafeLoader), "it", 0)]
    unique: set[int] = set()
    values = 0
    while waiting:
        node, top, depth = waiting.pop()
        values += 1
        if depth > DEEPEST or values > MOST:
            raise ValueError(
                f"{top} is more than {DEEPEST} levels deep or {MOST:,} values large: an anchor (&) may stand inside "
                "what it names, or be repeated (*) too often"
            )
        if isinstance(node, yaml.MappingNode):
            if id(node) not in unique:
                _check_keys(node)
            unique.add(id(node))
            waiting += [(inside, top if depth else str(key.value), depth + 1) for key, inside in node.value]
        elif isinstance(node, yaml.SequenceNode):
            waiting += [(inside, top, depth + 1) for inside in node.value]


def _check_keys(mapping: yaml.MappingNode) -> None:
    lines: dict[str, int] = {}
    for key, _ in mapping.value:
        name, line = str(key.value), key.start_mark.line + 1
        if isinstance(key, yaml.ScalarNode) and name in lines:
            raise ValueError(f"key {name} stands twice, in lines {lines[name]} and {line}: keep one of them")
        lines[name] = line
