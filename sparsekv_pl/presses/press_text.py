"""A press as one line of text, for command lines and files: ``KeyDiff``, ``SnapKV(0.5, window_size=32)``.

The text is Python's own notation of a call, but nothing in it is run: it names classes of the table of traits, and its
arguments are literals and further presses.
"""

import ast
import inspect
from typing import Any

from kvpress import BasePress

from sparsekv_pl.models.anchors import Anchors
from sparsekv_pl.presses.nesting import learnable, press_name
from sparsekv_pl.presses.traits import table

EXAMPLES = "KeyDiff, SnapKV(window_size=32) or KeyRerotation(KeyDiff)"


def press_text(press: BasePress) -> str:
    """Write ``press`` with all its settings; ``press_from`` reads it.

    Raises
    ------
    ValueError
        For a setting that no text can say, such as a tensor or a learned parameter.
    """
    for name in learnable(press):
        raise ValueError(f"{press_name(press)} has a learned parameter ({name}), which no text can say")
    return _written(press)


def press_from(text: str) -> BasePress:
    """Make the press that ``text`` names; "Press" at the end of a name may be left out, as in reports.

    Raises
    ------
    ValueError
        For a text in another form, an unknown name, or settings that the press refuses.
    """
    try:
        press = _read(ast.parse(text.strip(), mode="eval").body)
        if isinstance(press, BasePress):
            return press
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"press={text!r} cannot be read: write {EXAMPLES}") from error
    except (ValueError, TypeError, AssertionError) as error:
        raise ValueError(f"press={text!r}: {error}") from error
    raise ValueError(f"press={text!r} is no press: write {EXAMPLES}")


def _kinds() -> dict[str, type]:
    kinds = [*table(), Anchors]
    return {name: kind for kind in kinds for name in (kind.__name__, kind.__name__.removesuffix("Press")) if name}


def _read(node: ast.expr) -> Any:
    if isinstance(node, ast.Name):
        return _kind(node)()
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return _made(_kind(node.func), [_read(one) for one in node.args], node.keywords)
    if isinstance(node, ast.List | ast.Tuple):
        return [_read(one) for one in node.elts]
    return ast.literal_eval(node)


def _made(kind: type, given: list[Any], keywords: list[ast.keyword]) -> Any:
    """Make a press; one that comes first is the press inside, whatever the first argument is: Anchor(KeyDiff)."""
    names = list(inspect.signature(kind).parameters)
    if "press" in names and given and isinstance(given[0], BasePress):
        names = ["press", *(name for name in names if name != "press")]
    if len(given) > len(names) or any(word.arg is None for word in keywords):
        raise ValueError(f"{kind.__name__} takes {', '.join(names)}")
    settings = {str(word.arg): _read(word.value) for word in keywords}
    return kind(**dict(zip(names, given, strict=False)), **settings)


def _kind(node: ast.Name) -> type:
    kinds = _kinds()
    if node.id not in kinds:
        names = ", ".join(sorted({kind.__name__.removesuffix("Press") for kind in kinds.values()} - {""}))
        raise ValueError(f"there is no press {node.id!r}: take one of {names}")
    return kinds[node.id]


def _written(value: Any) -> str:
    if isinstance(value, BasePress | Anchors):
        names = inspect.signature(type(value)).parameters
        return f"{type(value).__name__}({', '.join(f'{name}={_written(getattr(value, name))}' for name in names)})"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_written, value))}]"
    try:
        if ast.literal_eval(repr(value)) == value:
            return repr(value)
    except (ValueError, SyntaxError):
        pass
    raise ValueError(f"a press has the setting {value!r}, which no text can say")
