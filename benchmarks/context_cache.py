"""Twenty questions about one document: asked of a kept cache against a prefill for each of them.

Run from the checkout: ``python benchmarks/context_cache.py``; ``--adapter output/quickstart/final`` measures what was
trained. Takes more than six minutes of CPU time.

SmolLM2-135M-Instruct reads 1,000 tokens of the Python documentation with twenty made-up facts in them, a quarter of the
pairs stays (KeyDiff at 0.75), and each fact is asked for. "Kept" prefills once; "again" prefills before every question,
as a server without the cache does. The two take turns, question by question, and times are CPU times of the process, so
that other load hardly counts.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from operator import truediv

from kvpress import KeyDiffPress
from measure import report

from data.facts import Fact, draw_facts
from data.text import EmbeddedText
from sparsekv_pl.models.backbone import Backbone
from sparsekv_pl.presses.nesting import press_name
from sparsekv_pl.usage.context_cache import ContextCache
from sparsekv_pl.usage.loaded_model import LoadedModel

TOKENS, QUESTIONS, NEW_TOKENS, RATIO = 1_000, 20, 12, 0.75
GOALS = {"kept over again": 1.0}


def document(model: LoadedModel, facts: list[Fact]) -> list[int]:
    """``TOKENS`` tokens in the chat frame: text with the facts at equal distances."""
    stated = [model.encoder.encode(f" {fact.statement}") for fact in facts]
    text = model.encoder.encode(
        "".join(one.text for _, one in zip(range(40), EmbeddedText().documents(), strict=False))
    )
    room = (TOKENS - len(model.prefix_ids) - sum(map(len, stated))) // len(facts)
    parts = [[*text[place * room : (place + 1) * room], *one] for place, one in enumerate(stated)]
    return [*model.prefix_ids, *(token for part in parts for token in part)]


def cpu_seconds(step: Callable[[], object]) -> float:
    """CPU time of ``step`` in this process, all threads together."""
    start = time.process_time()
    step()
    return time.process_time() - start


def main() -> None:
    """Measure both ways in turn, question by question, and print them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapter", help="a trained adapter; without one the base model answers")
    model = LoadedModel(Backbone(adapter=parser.parse_args().adapter))
    facts = draw_facts(random.Random(0), "held_out", QUESTIONS)
    ids, press = document(model, facts), KeyDiffPress(RATIO)
    right = dict.fromkeys(("kept", "again", "full"), 0)

    def ask(way: str, cache: ContextCache, fact: Fact) -> None:
        answer = cache.ask(fact.question, answer_prefix=fact.answer_prefix, max_new_tokens=NEW_TOKENS)
        right[way] += fact.value in answer

    full = ContextCache.prefill(model, ids)  # also the warm-up
    for fact in facts:
        ask("full", full, fact)
    made: list[ContextCache] = []
    once = cpu_seconds(lambda: made.append(ContextCache.prefill(model, ids, press)))
    kept, again = list[float](), list[float]()
    for fact in facts:
        kept.append(cpu_seconds(partial(ask, "kept", made[0], fact)))
        again.append(cpu_seconds(lambda fact=fact: ask("again", ContextCache.prefill(model, ids, press), fact)))
    questions = [fact.question for fact in facts]
    alone = cpu_seconds(lambda: [made[0].ask(question, max_new_tokens=NEW_TOKENS) for question in questions])
    together = cpu_seconds(lambda: made[0].ask(questions, max_new_tokens=NEW_TOKENS))
    shown = f"{press_name(press)} {RATIO}"
    rows: list[dict[str, object]] = [
        _row(f"kept cache, {shown}", once + sum(kept), right["kept"], made[0]),
        _row(f"prefilled before each, {shown}", sum(again), right["again"], made[0]),
        _row("kept cache, full", None, right["full"], full),
    ]
    ratios = {
        "kept over again": (once + sum(kept)) / sum(again),
        "a question, kept over again": statistics.median(map(truediv, kept, again)),
        "together over one by one": together / alone,
        "bytes over the full cache": made[0].kv_bytes / full.kv_bytes,
    }
    report("context_cache", rows, ratios, {}, GOALS)


def _row(way: str, seconds: float | None, right: int, cache: ContextCache) -> dict[str, object]:
    return {
        "way": way,
        "CPU time": "" if seconds is None else f"{seconds:.1f} s",
        "right": f"{right} of {QUESTIONS}",
        "tokens": f"{cache.tokens:,}",
        "pairs a head": f"{cache.kept_pairs:,.0f}",
        "bytes": f"{cache.kv_bytes:,}",
        "planned": f"{cache.plan().kv_bytes_kept:,}",
    }


if __name__ == "__main__":
    main()
