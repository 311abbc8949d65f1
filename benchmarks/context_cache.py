"""Twenty questions about one document: asked of a kept cache against a prefill for each of them, evicted and full.

Run from the checkout: ``python benchmarks/context_cache.py``; ``--adapter adapters/smollm2-135m-instruct`` measures
what was trained. Takes about two minutes of CPU time on free cores.

SmolLM2-135M-Instruct reads 1,000 tokens of the Python documentation with twenty made-up facts in them, and each fact is
asked for: of the full cache, and of a quarter of it (KeyDiff at 0.75). The two take turns: at every fourth question
each reads the document, then each answers. Times are CPU times of the process, so that other load hardly counts. "Kept"
is one reading and all answers; "again" is a reading before every answer, as a server without the cache does it. Tokens
a second are those of the answers over all the time of a way.
"""

import argparse
import random
import time
from dataclasses import dataclass, field
from operator import truediv
from statistics import fmean, median

from kvpress import KeyDiffPress
from measure import report, seconds

from data.facts import Fact, draw_facts
from data.text import EmbeddedText
from sparsekv_pl.models.backbone import Backbone
from sparsekv_pl.presses.nesting import press_name
from sparsekv_pl.usage.answers import greedy_answers
from sparsekv_pl.usage.context_cache import ContextCache
from sparsekv_pl.usage.loaded_model import LoadedModel

TOKENS, QUESTIONS, READ_EVERY, NEW_TOKENS, RATIO = 1_000, 20, 4, 12, 0.75
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


@dataclass
class Way:
    """A cache that is read and asked, and the CPU seconds that each took."""

    press: KeyDiffPress | None
    cache: ContextCache
    reading: list[float] = field(default_factory=list)
    asking: list[float] = field(default_factory=list)
    tokens: int = 0
    right: int = 0

    def read(self, ids: list[int]) -> None:
        """Read the document and evict."""
        self.reading.append(seconds(lambda: ContextCache.prefill(self.cache.model, ids, self.press), time.process_time))

    def ask(self, fact: Fact) -> None:
        """Answer a question from the kept cache."""
        model = self.cache.model
        row = model.question_ids(fact.question, fact.answer_prefix)
        start = time.process_time()
        (answer,) = greedy_answers(model, self.cache.kept, [row], NEW_TOKENS)
        self.asking.append(time.process_time() - start)
        self.tokens += len(answer.ids)
        self.right += fact.value in answer.text

    def seconds(self, again: bool) -> float:
        """CPU seconds of all questions, the document being read once or before each."""
        return fmean(self.reading) * (QUESTIONS if again else 1) + sum(self.asking)

    def row(self, name: str, again: bool) -> dict[str, object]:
        """Return a line of the table."""
        spent = self.seconds(again)
        return {
            "way": f"{'prefilled before each' if again else 'kept cache'}, {name}",
            "CPU time": f"{spent:.1f} s",
            "of it reading": f"{spent - sum(self.asking):.1f} s",
            "answer tokens a second": f"{self.tokens / spent:.2f}",
            "right": f"{self.right} of {QUESTIONS}",
            "tokens": f"{self.cache.tokens:,}",
            "pairs a head": f"{self.cache.kept_pairs:,.0f}",
            "bytes": f"{self.cache.kv_bytes:,}",
            "planned": f"{self.cache.plan().kv_bytes_kept:,}",
        }


def main() -> None:
    """Measure the full and the evicted cache in turn, question by question, and print them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapter", help="a trained adapter; without one the base model answers")
    model = LoadedModel(Backbone(adapter=parser.parse_args().adapter))
    facts = draw_facts(random.Random(0), "held_out", QUESTIONS)
    ids, press = document(model, facts), KeyDiffPress(RATIO)
    evicted, full = (Way(one, ContextCache.prefill(model, ids, one)) for one in (press, None))  # also the warm-up
    for place, fact in enumerate(facts):
        for way in (evicted, full):
            if place % READ_EVERY == 0:
                way.read(ids)
        for way in (evicted, full):
            way.ask(fact)
    rows = [model.question_ids(fact.question, fact.answer_prefix) for fact in facts]
    together = seconds(lambda: greedy_answers(model, evicted.cache.kept, rows, NEW_TOKENS), time.process_time)
    ratios = {
        "kept over again, evicted": evicted.seconds(False) / evicted.seconds(True),
        "kept over again, full": full.seconds(False) / full.seconds(True),
        "evicted and kept over full and again": evicted.seconds(False) / full.seconds(True),
        "reading, evicted over full": median(map(truediv, evicted.reading, full.reading)),
        "a question, evicted over full": median(map(truediv, evicted.asking, full.asking)),
        "together over one by one": together / sum(evicted.asking),
        "bytes over the full cache": evicted.cache.kv_bytes / full.cache.kv_bytes,
    }
    names = {f"{press_name(press)} {RATIO}": evicted, "full": full}
    table = [way.row(name, again) for name, way in names.items() for again in (False, True)]
    report("context_cache", table, ratios, {}, GOALS)


if __name__ == "__main__":
    main()
