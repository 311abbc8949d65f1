"""Made-up records: presses that lose needles, and a training that helped."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

Record = dict[str, Any]
PRESSES = (("SnapKV", True), ("TOVA", False))


def invented(
    presses: Sequence[tuple[str, bool]] = PRESSES,
    ratios: Sequence[float] = (0.5, 0.75),
    tasks: Sequence[str] = ("niah_single_1", "text"),
    lengths: Sequence[int] = (512,),
    depths: Sequence[float | None] = (0.0, 0.5, 1.0),
    seeds: int = 4,
    variants: Sequence[str] = ("base", "trained"),
    prefill: str = "dense",
    stability: bool = False,
    seed: int = 0,
) -> list[Record]:
    """Every combination once; needles get lost with the ratio, and less so after training."""
    generator = np.random.default_rng(seed)
    conditions = [("full cache", 0.0, False), *((p, r, seen) for p, seen in presses for r in ratios)]
    records = []
    for task in tasks:
        for length in lengths:
            for depth in [None] if task == "text" else depths:
                for number in range(seeds):
                    luck = generator.random()
                    for variant in variants:
                        for press, ratio, seen in conditions:
                            loss = ratio * (0.8 + sum(map(ord, press)) % 5 / 10)
                            loss *= (0.4 if variant == "trained" else 1.1) * (0.7 if seen else 1.0)
                            common = {
                                "case": f"{task}-{length}-{depth}-{number}",
                                "task": task,
                                "length": length,
                                "depth": depth,
                                "seed": number,
                                "variant": variant,
                                "press": press,
                                "compression_ratio": ratio,
                                "prefill": prefill,
                                "seen_in_training": seen,
                            }
                            measures = _text(luck, loss) if task == "text" else _needle(luck, loss)
                            if stability and task == "text":
                                measures |= {"min_retained": 0.4 - loss / 4, "mean_retained": 0.8 - loss / 4}
                                measures["retained_variance"] = 0.01 + loss / 50
                            records.append(common | measures | _ledger(length, ratio))
    return records


def _needle(luck: float, loss: float) -> Record:
    found = float(luck > loss)
    said = "4711" if found else "1234"
    return {
        "substring": found,
        "exact": found,
        "words": 0.25 + found * 0.75,
        "f1": 0.5 + found / 2,
        "rouge_l": 0.4 + found * 0.6,
        "answer": said,
        "answers": ["4711"],
        "question": "What is the number?",
        "decode_seconds": 0.2,
        "decode_tokens": 8,
    }


def _text(luck: float, loss: float) -> Record:
    return {"nll": 63 * (3.0 + 0.3 * luck + 0.4 * loss), "kl": 63 * 0.2 * loss, "tokens": 63}


def _ledger(length: int, ratio: float) -> Record:
    kept = length * (1 - ratio)
    return {
        "kept_pairs": kept,
        "kv_bytes": int(kept * 23_040),
        "freed": True,
        "prefill_seconds": length / 900,
        "eviction_seconds": 0.02 * (ratio > 0),
        "peak_bytes": 900 * 2**20,
    }


@pytest.fixture(scope="session")
def make_records() -> Callable[..., list[Record]]:
    """invented(presses, ratios, tasks, lengths, depths, seeds, variants, prefill, stability, seed)."""
    return invented
