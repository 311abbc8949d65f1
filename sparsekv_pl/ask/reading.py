"""Make the cache that a command line asks for: read texts under a press, load caches, append and merge."""

import sys
from argparse import Namespace
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from kvpress import BasePress

from sparsekv_pl.cli.chosen_model import chosen_backbone, chosen_press
from sparsekv_pl.evaluation.prefill_progress import PrefillProgress
from sparsekv_pl.eviction.quantised_pairs import PairQuantisation
from sparsekv_pl.models.backbone import Backbone
from sparsekv_pl.reporting.console import console
from sparsekv_pl.usage.cache_file import SUFFIX, made_by
from sparsekv_pl.usage.cache_origin import CacheOrigin
from sparsekv_pl.usage.context_cache import ContextCache
from sparsekv_pl.usage.loaded_model import LoadedModel, check_before_loading
from sparsekv_pl.usage.reading_progress import Report
from sparsekv_pl.usage.usable_press import check_appendable


def cache_for(asked: Namespace) -> ContextCache:
    """Read or load the document, append and merge, in this order.

    Raises
    ------
    ValueError
        For an unknown or unfit press, a text or cache that cannot be read, and a model that does not belong to it.
    """
    press, backbone = chosen_press(asked), chosen_backbone(asked)
    _check(asked, press, backbone)
    texts = {name: _text(name) for name in [asked.document, *asked.append, *asked.merge] if not _is_cache(name)}
    if _is_cache(asked.document):
        cache = ContextCache.load(asked.document, backbone)
    else:
        packed = None if asked.bits is None else PairQuantisation(asked.bits)
        cache = _read(backbone, texts[asked.document], press, asked.chunk_tokens, asked.budget, packed)
    for name in asked.append:
        cache = _grown(cache, texts[name])
    for name in asked.merge:
        cache = cache.merge(ContextCache.load(name, cache.model) if _is_cache(name) else _read_like(cache, texts[name]))
    return cache


def _check(asked: Namespace, press: BasePress | None, backbone: Backbone) -> None:
    """Refuse what the eviction cannot do, and caches of another model, before the model is loaded."""
    saved = {name: made_by(Path(name).expanduser()) for name in (asked.document, *asked.merge) if _is_cache(name)}
    for name, (identity, _) in saved.items():
        check_before_loading(backbone, identity, name)
    if asked.document in saved:
        origin = saved[asked.document][1]
        press = origin.press_again(None)
    else:
        origin = CacheOrigin.of(press, asked.chunk_tokens, asked.budget)
    if asked.append:
        check_appendable(press, origin)
    if press is None and origin.press is not None and not saved.keys() >= set(asked.merge):
        raise ValueError(f"--merge: {origin.press} cannot be made from a file, so give a cache that it evicted")


def _read(
    model: LoadedModel | Backbone,
    text: str,
    press: BasePress | None,
    chunk_tokens: int | None,
    budget: int | None,
    packed: PairQuantisation | None,
) -> ContextCache:
    settings: dict[str, Any] = {"chunk_tokens": chunk_tokens, "budget": budget, "quantisation": packed}
    return _watched(0, lambda report: ContextCache.prefill(model, text, press, report=report, **settings))


def _read_like(cache: ContextCache, text: str) -> ContextCache:
    """Read another document, evicted as ``cache`` was."""
    origin = cache.origin
    return _read(cache.model, text, cache.press, origin.chunk_tokens, origin.budget, origin.quantisation)


def _grown(cache: ContextCache, text: str) -> ContextCache:
    return _watched(cache.tokens, lambda report: cache.append(text, report))


def _watched(read: int, make: Callable[[Report], ContextCache]) -> ContextCache:
    """Make a cache behind a progress bar on stderr, after ``read`` tokens that are not read again."""
    with ExitStack() as shown:
        bars: list[PrefillProgress] = []

        def report(done: int, tokens: int) -> None:
            if not bars:
                bars.append(shown.enter_context(PrefillProgress(tokens, read, console(stderr=True))))
            bars[0].reached(done)

        return make(report)


def _is_cache(name: str) -> bool:
    return name.endswith(SUFFIX)


def _text(name: str) -> str:
    """Read a file, or stdin for -."""
    try:
        return sys.stdin.read() if name == "-" else Path(name).expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is no text in UTF-8 (byte {error.start}): give a text file") from error
