"""Keys given twice in a YAML file, of which the last would silently win."""

import yaml


def check_unique_keys(text: str) -> None:
    """Raise ``ValueError`` that names a key given twice in one mapping of ``text``, and its line."""
    seen: list[yaml.Node] = []
    waiting = [yaml.compose(text, Loader=yaml.SafeLoader)]
    while waiting:
        node = waiting.pop()
        if node is None or any(node is other for other in seen):  # an alias repeats a node
            continue
        seen.append(node)
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
        if isinstance(node, yaml.MappingNode):
            _check(node)
            waiting += [value for _, value in node.value]


def _check(mapping: yaml.MappingNode) -> None:
    lines: dict[str, int] = {}
    for key, _ in mapping.value:
        name, line = str(key.value), key.start_mark.line + 1
        if isinstance(key, yaml.ScalarNode) and name in lines:
            raise ValueError(f"key {name} stands twice, in lines {lines[name]} and {line}: keep one of them")
        lines[name] = line
