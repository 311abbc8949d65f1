"""Twenty questions about one document: asked of a kept cache against a prefill before each of them, evicted and full.

Run from the checkout: ``python benchmarks/context_cache.py``; ``--adapter adapters/smollm2-135m-instruct`` measures
what was trained. Takes about four minutes of CPU time on free cores.

SmolLM2-135M-Instruct reads 1,000 tokens of the Python documentation with twenty made-up facts in them, and each fact is
asked for: of the full cache, and of a quarter of it (KeyDiff at 0.75). Question by question four ways take turns: the
kept cache is asked, and the document is read again and then asked, each evicted and full. A kept cache's own reading is
counted once, as a mean of the twenty. Times are CPU times of the process, so that other load hardly counts. Tokens a
second are those of the answers over all the time of a way.
"""

import argparse
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import sub, truediv
from statistics import fmean, median

from kvpress import KeyDiffPress
from measure import report, seconds

from data.facts import Fact, draw_facts
from data.text import EmbeddedText
from sparsekv_pl.models.backbone import Backbone
from sparsekv_pl.presses.nesting import press_name
from sparsekv_pl.usage.answers import AnswerGiven, greedy_answers
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


@dataclass(eq=False)
class Way:
    """A press that evicts a document, and the CPU seconds of reading and of asking, by question."""

    press: KeyDiffPress | None
    kept: ContextCache
    """Read before the first question."""
    reading: list[float] = field(default_factory=list)
    asking: list[float] = field(default_factory=list)
    """Of the kept cache."""
    asking_again: list[float] = field(default_factory=list)
    """Of the cache that was read for the question."""
    tokens: int = 0
    right: int = 0

    def ask(self, fact: Fact, ids: list[int]) -> None:
        """Answer a question from the kept cache; then read the document, evict, and answer it from that cache."""
        times = [time.process_time()]
        (answer,) = answered(self.kept, [fact])
        times.append(time.process_time())
        cache = ContextCache.prefill(self.kept.model, ids, self.press)
        times.append(time.process_time())
        again = answered(cache, [fact])
        times.append(time.process_time())
        assert again == [answer], "a kept cache answers as one that was just read"
        for spent, taken in zip(
            (self.asking, self.reading, self.asking_again), map(sub, times[1:], times), strict=True
        ):
            spent.append(taken)
        self.tokens += len(answer.ids)
        self.right += fact.value in answer.text

    def seconds(self, again: bool) -> float:
        """CPU seconds of all questions, the document being read once or before each."""
        return sum(self.reading) + sum(self.asking_again) if again else fmean(self.reading) + sum(self.asking)

    def a_token(self, again: bool) -> float:
        """CPU seconds of all questions by tokens of their answers."""
        return self.seconds(again) / self.tokens

    def row(self, name: str, again: bool) -> dict[str, object]:
        """Return a line of the table."""
        spent = self.seconds(again)
        return {
            "way": f"{'prefilled before each' if again else 'kept cache'}, {name}",
            "CPU time": f"{spent:.1f} s",
            "of it reading": f"{sum(self.reading) if again else fmean(self.reading):.1f} s",
            "answer tokens a second": f"{1 / self.a_token(again):.2f}",
            "right": f"{self.right} of {QUESTIONS}",
            "tokens": f"{self.kept.tokens:,}",
            "pairs a head": f"{self.kept.kept_pairs:,.0f}",
            "bytes": f"{self.kept.kv_bytes:,}",
            "planned": f"{self.kept.plan().kv_bytes_kept:,}",
        }


def answered(cache: ContextCache, facts: Sequence[Fact]) -> list[AnswerGiven]:
    """Ask for ``facts`` as one batch."""
    rows = [cache.model.question_ids(fact.question, fact.answer_prefix) for fact in facts]
    return greedy_answers(cache.model, cache.kept, rows, NEW_TOKENS)


def main() -> None:
    """Measure the full and the evicted cache in turn, question by question, and print them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapter", help="a trained adapter; without one the base model answers")
    model = LoadedModel(Backbone(adapter=parser.parse_args().adapter))
    facts = draw_facts(random.Random(0), "held_out", QUESTIONS)
    ids, press = document(model, facts), KeyDiffPress(RATIO)
    evicted, full = (Way(one, ContextCache.prefill(model, ids, one)) for one in (press, None))  # also the warm-up
    for number, fact in enumerate(facts, 1):
        for way in (evicted, full):
            way.ask(fact, ids)
        print(f"question {number} of {QUESTIONS}", file=sys.stderr, flush=True)
    together = {way: seconds(partial(answered, way.kept, facts), time.process_time) for way in (evicted, full)}
    ratios = {
        "kept over again, evicted": evicted.seconds(False) / evicted.seconds(True),
        "kept over again, full": full.seconds(False) / full.seconds(True),
        "evicted and kept over full and again": evicted.seconds(False) / full.seconds(True),
        "reading, evicted over full": median(map(truediv, evicted.reading, full.reading)),
        "a question, evicted over full": median(map(truediv, evicted.asking, full.asking)),
        "an answer token, evicted and kept over full and again": evicted.a_token(False) / full.a_token(True),
        "together over one by one, evicted": together[evicted] / sum(evicted.asking),
        "together over one by one, full": together[full] / sum(full.asking),
        "bytes over the full cache": evicted.kept.kv_bytes / full.kept.kv_bytes,
    }
    names = {f"{press_name(press)} {RATIO}": evicted, "full": full}
    table = [way.row(name, again) for name, way in names.items() for again in (False, True)]
    report("context_cache", table, ratios, {}, GOALS)


if __name__ == "__main__":
    main()
