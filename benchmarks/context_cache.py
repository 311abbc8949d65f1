"""Twenty questions about one document: asked of a kept cache against a prefill for each of them.

Run from the checkout: ``python benchmarks/context_cache.py``; ``--adapter output/quickstart/final`` measures what was
trained. Takes about eight minutes on one idle thread.

SmolLM2-135M-Instruct reads 1,000 tokens of the Python documentation with twenty made-up facts in them, a quarter of the
pairs stays (KeyDiff at 0.75), and each fact is asked for. "Kept" prefills once; "again" prefills before every question,
as a server without the cache does; "full" is a kept cache without eviction. The three take turns, and times are CPU
times of the process, so that other load hardly counts.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable

from kvpress import KeyDiffPress
from measure import report

from data.facts import Fact, draw_facts
from data.text import EmbeddedText
from sparsekv_pl.models.backbone import Backbone
from sparsekv_pl.presses.nesting import press_name
from sparsekv_pl.usage.context_cache import ContextCache
from sparsekv_pl.usage.loaded_model import LoadedModel

TOKENS, QUESTIONS, NEW_TOKENS, ROUNDS, RATIO = 1_000, 20, 12, 2, 0.75
GOALS = {"kept over again": 0.4}


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
    """Measure the three ways in turn and print them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapter", help="a trained adapter; without one the base model answers")
    model = LoadedModel(Backbone(adapter=parser.parse_args().adapter))
    facts = draw_facts(random.Random(0), "held_out", QUESTIONS)
    ids = document(model, facts)
    found: dict[str, ContextCache] = {}
    right: dict[str, int] = {}

    def ask(way: str, press: KeyDiffPress | None, again: bool) -> None:
        right[way] = 0
        for number, fact in enumerate(facts):
            if again or not number:
                found[way] = ContextCache.prefill(model, ids, press)
            answer = found[way].ask(fact.question, answer_prefix=fact.answer_prefix, max_new_tokens=NEW_TOKENS)
            right[way] += fact.value in answer

    ways: dict[str, Callable[[], None]] = {
        "kept": lambda: ask("kept", KeyDiffPress(RATIO), False),
        "again": lambda: ask("again", KeyDiffPress(RATIO), True),
        "full": lambda: ask("full", None, False),
    }
    found["kept"] = ContextCache.prefill(model, ids, KeyDiffPress(RATIO))
    together = cpu_seconds(lambda: found["kept"].ask([fact.question for fact in facts], max_new_tokens=NEW_TOKENS))
    taken = [{way: cpu_seconds(step) for way, step in ways.items()} for _ in range(ROUNDS)]
    asking = [cpu_seconds(lambda: found["kept"].ask(fact.question, max_new_tokens=NEW_TOKENS)) for fact in facts]
    rows = [
        {
            "way": f"{way}: {press_name(found[way].press)}, {found[way].tokens:,} tokens",
            "CPU time of 20 answers": " ".join(f"{one[way]:.1f} s" for one in taken),
            "over again": f"{statistics.median(one[way] / one['again'] for one in taken):.3f}",
            "right": f"{right[way]} of {QUESTIONS}",
            "pairs a head": f"{found[way].kept_pairs:,.0f}",
            "bytes": f"{found[way].kv_bytes:,}",
            "planned": f"{found[way].plan().kv_bytes_kept:,}",
        }
        for way in ways
    ]
    ratios = {
        f"{way} over again": statistics.median(one[way] / one["again"] for one in taken) for way in ("kept", "full")
    }
    ratios["together over one by one"] = together / sum(asking)
    ratios["bytes over the full cache"] = found["kept"].kv_bytes / found["full"].kv_bytes
    report("context_cache", rows, ratios, {}, GOALS)


if __name__ == "__main__":
    main()
