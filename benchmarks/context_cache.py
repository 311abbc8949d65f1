"""Twenty questions about one document: asked of a kept cache against a prefill for each of them, evicted and full.

Run from the checkout: ``python benchmarks/context_cache.py``; ``--adapter adapters/smollm2-135m-instruct`` measures
what was trained. Takes about ten minutes of CPU time.

SmolLM2-135M-Instruct reads 1,000 tokens of the Python documentation with twenty made-up facts in them, and each fact is
asked for: of the full cache, and of a quarter of it (KeyDiff at 0.75). "Kept" prefills once; "again" prefills before
every question, as a server without the cache does. The four take turns, question by question, and times are CPU times
of the process, so that other load hardly counts. Tokens per second are tokens of answers over all the time of a way,
reading included.
"""

import argparse
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from kvpress import KeyDiffPress
from measure import report

from data.facts import Fact, draw_facts
from data.text import EmbeddedText
from sparsekv_pl.models.backbone import Backbone
from sparsekv_pl.presses.nesting import press_name
from sparsekv_pl.usage.answers import greedy_answers
from sparsekv_pl.usage.context_cache import ContextCache
from sparsekv_pl.usage.loaded_model import LoadedModel

TOKENS, QUESTIONS, NEW_TOKENS, RATIO = 1_000, 20, 12, 0.75
GOALS = {"kept over again, evicted": 1.0}


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


@dataclass
class Way:
    """One way of answering, and what it has taken so far."""

    cache: ContextCache
    again: bool
    """Whether the document is read before every question."""
    reading: float
    """CPU seconds of reading, so far."""
    asking: float = 0.0
    tokens: int = 0
    right: int = 0

    def ask(self, fact: Fact, ids: list[int]) -> float:
        """Answer a question; return its CPU time, with that of reading if this way reads again."""
        model, cache, read = self.cache.model, self.cache, 0.0
        if self.again:
            start = time.process_time()
            cache = ContextCache.prefill(model, ids, cache.press)
            read = time.process_time() - start
        row = model.question_ids(fact.question, fact.answer_prefix)
        start = time.process_time()
        (answer,) = greedy_answers(model, cache.kept, [row], NEW_TOKENS)
        asked = time.process_time() - start
        self.reading += read
        self.asking += asked
        self.tokens += len(answer.ids)
        self.right += fact.value in answer.text
        return read + asked

    @property
    def seconds(self) -> float:
        """CPU seconds of everything."""
        return self.reading + self.asking

    def row(self, name: str) -> dict[str, object]:
        """Return this way's line of the table."""
        return {
            "way": name,
            "CPU time": f"{self.seconds:.1f} s",
            "of it reading": f"{self.reading:.1f} s",
            "answer tokens a second": f"{self.tokens / self.seconds:.2f}",
            "right": f"{self.right} of {QUESTIONS}",
            "tokens": f"{self.cache.tokens:,}",
            "pairs a head": f"{self.cache.kept_pairs:,.0f}",
            "bytes": f"{self.cache.kv_bytes:,}",
            "planned": f"{self.cache.plan().kv_bytes_kept:,}",
        }


def main() -> None:
    """Measure the four ways in turn, question by question, and print them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapter", help="a trained adapter; without one the base model answers")
    model = LoadedModel(Backbone(adapter=parser.parse_args().adapter))
    facts = draw_facts(random.Random(0), "held_out", QUESTIONS)
    ids, press = document(model, facts), KeyDiffPress(RATIO)
    Way(ContextCache.prefill(model, ids, press), True, 0.0).ask(facts[0], ids)  # the warm-up
    evicted, full = f"{press_name(press)} {RATIO}", "full cache"
    ways: dict[tuple[str, bool], Way] = {}
    for kind, chosen in ((evicted, press), (full, None)):
        start = time.process_time()
        cache = ContextCache.prefill(model, ids, chosen)
        ways[kind, False] = Way(cache, False, time.process_time() - start)
        ways[kind, True] = Way(cache, True, 0.0)
    each = [{way: made.ask(fact, ids) for way, made in ways.items()} for fact in facts]
    questions = [model.question_ids(fact.question) for fact in facts]
    kept = ways[evicted, False].cache.kept
    alone = cpu_seconds(lambda: [greedy_answers(model, kept, [row], NEW_TOKENS) for row in questions])
    together = cpu_seconds(lambda: greedy_answers(model, kept, questions, NEW_TOKENS))

    def over(one: tuple[str, bool], other: tuple[str, bool]) -> float:
        return ways[one].seconds / ways[other].seconds

    ratios = {
        "kept over again, evicted": over((evicted, False), (evicted, True)),
        "kept over again, full": over((full, False), (full, True)),
        "evicted over full, kept": over((evicted, False), (full, False)),
        "evicted and kept over full and again": over((evicted, False), (full, True)),
        "a question, kept over again, evicted": median(one[evicted, False] / one[evicted, True] for one in each),
        "a question, evicted over full, kept": median(one[evicted, False] / one[full, False] for one in each),
        "together over one by one": together / alone,
        "bytes over the full cache": ways[evicted, False].cache.kv_bytes / ways[full, False].cache.kv_bytes,
    }
    names = {True: "prefilled before each", False: "kept cache"}
    rows = [made.row(f"{names[again]}, {kind}") for (kind, again), made in ways.items()]
    report("context_cache", rows, ratios, {}, GOALS)


if __name__ == "__main__":
    main()
