"""Draws of different purposes are independent, also at equal seeds and steps."""

import ast
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from kvpress import KnormPress, SnapKVPress

from data.needles import NeedleTask
from sparsekv_pl.blocksparse.control_blocks import RandomBlocks
from sparsekv_pl.blocksparse.hadamard import SubsampledHadamard
from sparsekv_pl.eviction.dropout import draw_kept
from sparsekv_pl.models.seeding import generator_for, random_for, seed_for
from sparsekv_pl.objectives.reconstruction import _draws
from sparsekv_pl.presses.adaptive_block_dropout import AdaptiveBlockDropoutPress
from sparsekv_pl.presses.block_dropout import BlockDropoutPress
from sparsekv_pl.presses.eviction_aug import EvictionAugPress
from sparsekv_pl.presses.sentence_dropout import SentenceDropoutPress
from sparsekv_pl.presses.span_dropout import Shown, SpanDropoutPress
from sparsekv_pl.presses.variable_block import VariableBlockPress
from sparsekv_pl.reporting.intervals import _times_drawn
from sparsekv_pl.schedules import Fixed, Spread
from sparsekv_pl.training.eit_module import EITModule

ROOT = Path(__file__).parents[2]
STEPS = 1_000
FUNCTIONS = ("seed_for", "generator_for", "random_for")
BARE = ("manual_seed", "Random", "default_rng", "SeedSequence", "RandomState")
"""What seeds a generator in torch, Python and NumPy."""
SPANS: list[type[SpanDropoutPress]] = [
    BlockDropoutPress,
    VariableBlockPress,
    SentenceDropoutPress,
    AdaptiveBlockDropoutPress,
]


def press(step: int) -> float:
    """Draw the press that evicts, as EvictionAugPress does."""
    augmented = EvictionAugPress([KnormPress(), SnapKVPress()])
    augmented.draw(step)
    return augmented.drawn


def kept_keys(step: int) -> float:
    """Draw the one key that KVDropout keeps of 64."""
    always, removed = torch.zeros(1, 64, dtype=torch.bool), torch.tensor([63])
    return float(draw_kept(always, removed, [(0, step)], layer_idx=0, kv_heads=1)[0, 0, 0])


def adapter_dropout(step: int) -> float:
    """Draw the first number of an adapter's dropout in a batch."""
    module = cast(EITModule, SimpleNamespace(current_epoch=0, global_rank=0))
    with torch.random.fork_rng(devices=[]):
        EITModule.on_train_batch_start(module, cast(Any, {}), step)
        return float(torch.rand(()))


def spans(kind: type[SpanDropoutPress]) -> Callable[[int], float]:
    """Return the draw that decides the first span of a press that drops spans."""
    shown = cast(Shown, SimpleNamespace(keys=torch.zeros(1, 1, 4, 2), layer=0, rows=[0], firsts=[0]))

    def draw(step: int) -> float:
        dropout = kind()
        dropout.draw(step)
        return float(dropout.uniform(shown, 1))

    return draw


def every_purpose() -> dict[str, list[str]]:
    """Return the purposes that the code names -> their places; expressions by their source."""
    found: dict[str, list[str]] = {}
    for place, call, name in calls():
        if name in FUNCTIONS:
            first = call.args[0]
            purpose = first.value if isinstance(first, ast.Constant) else ast.unparse(first)
            found.setdefault(str(purpose), []).append(place)
    return found


def calls() -> Iterator[tuple[str, ast.Call, str]]:
    """Yield every call in code that trains, evaluates or analyses: its place, the call, the last part of its name."""
    for top in ("sparsekv_pl", "data", "callbacks", "train.py", "evaluate.py"):
        path = ROOT / top
        for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
            if file == ROOT / "sparsekv_pl" / "models" / "seeding.py":
                continue
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
                    name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
                    yield f"{file.relative_to(ROOT)}:{node.lineno}", node, name


def draws() -> dict[str, Callable[[int], float]]:
    """Return every draw as a function of the step at seed 0: those of training as made there, others by purpose."""
    by_purpose = {
        purpose: lambda step, purpose=purpose: random_for(purpose, 0, step).random() for purpose in every_purpose()
    }
    needles = NeedleTask.__new__(NeedleTask)
    needles.seed, needles.split = 0, "train"
    ratio = Spread(Fixed(0.8))
    return by_purpose | {
        "press": press,
        "compression ratio": ratio.ratio,
        "kept keys": kept_keys,
        "adapter dropout": adapter_dropout,
        "asked block": lambda step: float(_draws([[step]], 1)),
        "needle": lambda step: needles._rng(step).random(),
        "bootstrap": lambda step: _times_drawn(4, step)[0, 0],
        "sketch": lambda step: float(SubsampledHadamard(8, 1, step).signs @ 2.0 ** torch.arange(8)),
        "control blocks": lambda step: float(RandomBlocks(4)(step, torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 4, 1))),
        **{f"spans of {kind.__name__}": spans(kind) for kind in SPANS},
    }


def test_no_draw_tells_of_another_nor_of_the_step_before() -> None:
    drawn = {name: [draw(step) for step in range(STEPS + 1)] for name, draw in draws().items() if name != "spans"}
    drawn["another seed's ratio"] = [Spread(Fixed(0.8), seed=1).ratio(step) for step in range(STEPS + 1)]
    assert len(drawn) > 15
    series = {name: values[1:] for name, values in drawn.items()}
    series |= {f"{name}, a step before": values[:-1] for name, values in drawn.items()}
    correlation = np.abs(np.corrcoef(list(series.values())))
    assert np.isfinite(correlation).all(), "a draw is the same at every step"
    correlated = {
        pair: float(correlation[a, b])
        for (a, first), (b, second) in combinations(enumerate(series), 2)
        if correlation[a, b] > 4.8 / STEPS**0.5  # of a thousand pairs one in 600 runs would reach this by chance
        for pair in [f"{first} | {second}"]
    }
    assert not correlated


def test_every_generator_is_seeded_in_one_place_and_every_purpose_has_one() -> None:
    assert not [place for place, call, name in calls() if name in BARE and not _seeded(call)]
    shared = {purpose: places for purpose, places in every_purpose().items() if len(places) > 1}
    assert not shared, "two places would draw alike"


def _seeded(call: ast.Call) -> bool:
    """Whether the seed comes from ``seed_for``."""
    return any(
        isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "seed_for"
        for argument in call.args
        for node in ast.walk(argument)
    )


@pytest.mark.parametrize(
    "draw",
    [
        lambda *name: seed_for(*name),
        lambda *name: generator_for(*name).initial_seed(),
        lambda *name: random_for(*name).random(),
    ],
)
def test_a_draw_is_a_function_of_its_whole_name(draw: Callable[..., float]) -> None:
    names = [("a", 0, 1), ("a", 1, 0), ("a", 0, 11), ("a", 1), ("b", 0, 1), ("a", 0, 1, 0)]
    assert [draw(*name) for name in names] == [draw(*name) for name in names]
    assert len({draw(*name) for name in names}) == len(names)
