"""Cost of every press over kvpress's SnapKV, and over the prefill before it.

Run from the checkout: ``python benchmarks/press_cost.py``. Takes about five minutes on one idle thread.

SmolLM2-135M-Instruct prefills the Python documentation once, in float32, and the inputs of each layer's hook are
recorded. A press's time is that of its hooks over all 30 layers: scoring, selecting and copying. One row, three
quarters evicted, default settings; presses that only drop in training run in training mode. The scorers inside
AnchorPress are also measured alone, to show the cost of the anchors.
"""

import statistics
import time
from collections.abc import Callable

import kvpress
import torch
from measure import paired_times, report, seconds
from transformers import PreTrainedModel

from data.text import EmbeddedText
from sparsekv_pl.eviction.replay import RecordedPrefill
from sparsekv_pl.models.backbone import Backbone
from sparsekv_pl.presses import (
    AdaptiveBlockDropoutPress,
    AnchorPress,
    BlockDropoutPress,
    PagePress,
    SentenceDropoutPress,
    SoftThresholdPress,
    VariableBlockPress,
)
from sparsekv_pl.presses.nesting import press_name
from sparsekv_pl.presses.traits import traits_of

LENGTHS, RATIO, ROUNDS = (2_048, 8_192), 0.75, 5
GOALS = {"over SnapKV": 0.5, "of the prefill": 0.01}


def presses() -> list[kvpress.BasePress]:
    """Measured presses, SnapKV (the reference) first."""
    return [
        kvpress.SnapKVPress(RATIO),
        kvpress.ExpectedAttentionPress(RATIO),
        kvpress.TOVAPress(RATIO),
        kvpress.KeyDiffPress(RATIO),
        kvpress.KnormPress(RATIO),
        kvpress.LagKVPress(RATIO, lag_size=32),
        kvpress.StreamingLLMPress(RATIO),
        kvpress.RandomPress(RATIO, seed=0),
        AnchorPress(RATIO),
        AnchorPress(RATIO, kvpress.KnormPress()),
        PagePress(RATIO),
        SoftThresholdPress(RATIO),
        BlockDropoutPress(RATIO),
        VariableBlockPress(RATIO),
        SentenceDropoutPress(RATIO),
        AdaptiveBlockDropoutPress(RATIO),
    ]


def evicting(recorded: RecordedPrefill, press: kvpress.BasePress) -> Callable[[], None]:
    """A step that runs every layer's hook once. ``recorded.evicted`` would also copy the cache and store scores."""
    with press(recorded.model):
        pass  # to prepare it
    layers, trains = recorded.cache.layers, traits_of(press).only_trains
    whole = [(layer.keys, layer.values) for layer in layers]

    @torch.no_grad()
    def step() -> None:
        for call in recorded.calls:
            call.module.training = trains  # what a press asks; model.train() would be timed
            press.forward_hook(call.module, [], call.kwargs | {"past_key_values": recorded.cache}, call.output)
        for layer, (keys, values) in zip(layers, whole, strict=True):
            layer.keys, layer.values = keys, values

    return step


def compare(model: PreTrainedModel, ids: torch.Tensor) -> tuple[list[dict[str, object]], dict[str, float]]:
    """Rows of the table for one context (1, L), and the ratios of AnchorPress with default settings."""
    start = time.perf_counter()
    recorded = RecordedPrefill(model, ids)
    prefill = time.perf_counter() - start
    every = presses()
    steps = [evicting(recorded, press) for press in every]
    steps[0]()
    reference = statistics.median(seconds(steps[0]) for _ in range(ROUNDS))
    rows: list[dict[str, object]] = []
    ratios: dict[str, float] = {}
    for press, step in zip(every, steps, strict=True):
        took = paired_times(step, steps[0], ROUNDS)
        share = took.median * reference / prefill
        rows.append(
            {
                "press": press_name(press),
                "tokens": ids.shape[1],
                "ms": f"{1_000 * took.median * reference:.1f}",
                "time over SnapKV (low to high)": f"{took.median:.3f} ({took.low:.3f} to {took.high:.3f})",
                "of the prefill": f"{share:.3%}",
            }
        )
        if press_name(press) == "Anchor(KeyDiff)":
            ratios = {f"over SnapKV at {ids.shape[1]}": took.median, f"of the prefill at {ids.shape[1]}": share}
    rows.append({"press": "the prefill", "tokens": ids.shape[1], "ms": f"{1_000 * prefill:,.0f}"})
    return [{column: row.get(column, "") for column in rows[0]} for row in rows], ratios


def main() -> None:
    """Print the table and the ratios."""
    model, tokenizer = Backbone(dtype="float32", lora=None).load(trainable=False)
    text = "\n".join(document.text for document in EmbeddedText().documents())
    ids = tokenizer(text[: 8 * max(LENGTHS)], return_tensors="pt").input_ids
    assert ids.shape[1] >= max(LENGTHS)
    rows, ratios = [], {}
    for tokens in LENGTHS:
        more, found = compare(model, ids[:, :tokens])
        rows += more
        ratios |= found
    report("press_cost", rows, ratios, {}, {name: GOALS[name.split(" at ")[0]] for name in ratios})


if __name__ == "__main__":
    main()
