"""Schedules: exact ratios, the adaptive rule step by step, state, configuration, bad settings."""

import json
from typing import Any

import pytest
from jsonargparse import ArgumentParser

from sparsekv_pl.schedules import Adaptive, Cosine, Fixed, Linear, Schedule, Spread, Step

EVERY_KIND = [
    Fixed(0.4, warmup_steps=3),
    Linear(0.1, 0.7, steps=10, warmup_steps=2),
    Cosine(0.2, 0.6, steps=7),
    Step([0.1, 0.5], [20]),
    Adaptive(start=0.2, maximum=0.6, patience=2),
    Spread(Linear(0.1, 0.7, steps=10), low=0.05, seed=3),
]


def ratios(schedule: Schedule, steps: list[int]) -> list[float]:
    return [schedule.ratio(step) for step in steps]


def test_fixed() -> None:
    assert ratios(Fixed(0.4), [0, 1, 10**6]) == [0.4, 0.4, 0.4]


def test_linear_ends_exactly_and_stays() -> None:
    schedule = Linear(0.1, 0.7, steps=10)
    assert ratios(schedule, [0, 5, 10, 1000]) == pytest.approx([0.1, 0.4, 0.7, 0.7])
    assert schedule.ratio(10) == 0.7
    assert ratios(Linear(0.7, 0.1, steps=2), [0, 1, 2]) == pytest.approx([0.7, 0.4, 0.1])


def test_cosine_is_slow_at_both_ends() -> None:
    schedule = Cosine(0.1, 0.7, steps=4)
    assert ratios(schedule, [0, 1, 2, 3, 4, 9]) == pytest.approx(
        [0.1, 0.4 - 0.3 * 0.5**0.5, 0.4, 0.4 + 0.3 * 0.5**0.5, 0.7, 0.7]
    )


def test_step_changes_at_its_boundaries() -> None:
    schedule = Step([0.1, 0.3, 0.7], [5, 8])
    assert ratios(schedule, [0, 4, 5, 7, 8, 99]) == [0.1, 0.1, 0.3, 0.3, 0.7, 0.7]


@pytest.mark.parametrize(
    "schedule",
    [Fixed(0.4, 4), Linear(0.4, 0.8, 2, 4), Cosine(0.4, 0.8, 2, 4), Step([0.4, 0.8], [2], 4)],
)
def test_warm_up_rises_from_zero_to_the_start_and_delays_the_rest(schedule: Schedule) -> None:
    assert ratios(schedule, [0, 1, 2, 3, 4]) == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert schedule.ratio(6) == (0.4 if isinstance(schedule, Fixed) else 0.8)


INF = float("inf")
ADAPTIVE: dict[str, tuple[dict[str, float], list[float], list[float]]] = {  # settings, perplexities, levels after each
    "raises while perplexity holds": ({"maximum": 0.3}, [20, 20, 21.9, 15, 15], [0.1, 0.2, 0.3, 0.3, 0.3]),
    "compares with the best, so a slow rise counts": ({"back_off": 0.05}, [20, 21.5, 23], [0.1, 0.2, 0.15]),
    "holds": ({"step_size": 0.4, "back_off": 0.0}, [20, 20, INF], [0.1, 0.5, 0.5]),
    "backs off": ({"step_size": 0.4, "back_off": 0.2}, [20, 20, INF], [0.1, 0.5, 0.3]),
    "never below its start": ({"step_size": 0.4, "back_off": 0.9}, [20, 20, INF], [0.1, 0.5, 0.1]),
    "patience counts in a row": (
        {"patience": 2, "back_off": 0.0},
        [20, 20, 30, 20, 20, 20],
        [0.1, 0.1, 0.1, 0.1, 0.2, 0.2],
    ),
    "takes no infinity as its reference": ({}, [INF, INF, 20, 20], [0.1, 0.1, 0.1, 0.2]),
}


@pytest.mark.parametrize("rule", ADAPTIVE)
def test_adaptive(rule: str) -> None:
    settings, perplexities, expected = ADAPTIVE[rule]
    schedule = Adaptive(**({"start": 0.1, "step_size": 0.1, "tolerance": 0.1} | settings))  # type: ignore[arg-type]
    levels = []
    for perplexity in perplexities:  # the first only sets the reference
        schedule.observe(perplexity)
        levels.append(schedule.ratio(0))
    assert levels == pytest.approx(expected)


def test_adaptive_warm_up_scales_the_level() -> None:
    assert ratios(Adaptive(start=0.4, warmup_steps=4), [0, 2, 4]) == pytest.approx([0.0, 0.2, 0.4])


@pytest.mark.parametrize("perplexity", [float("nan"), 0.5, -1.0])
def test_adaptive_refuses_what_is_no_perplexity(perplexity: float) -> None:
    with pytest.raises(ValueError, match=f"perplexity under eviction is {perplexity}"):
        Adaptive().observe(perplexity)


def test_adaptive_state_restores_the_next_decisions() -> None:
    first, second = Adaptive(patience=2), Adaptive(patience=2)
    for perplexity in (20.0, 19.0):
        first.observe(perplexity)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for schedule in (first, second):
        schedule.observe(19.1)
    assert first.level > first.start
    assert first == second


def test_spread_draws_between_low_and_the_inner_ratio() -> None:
    drawn = ratios(Spread(Fixed(0.8), low=0.2), list(range(500)))
    assert min(drawn) >= 0.2
    assert max(drawn) < 0.8
    assert sum(drawn) / len(drawn) == pytest.approx(0.5, abs=0.03)
    assert len(set(drawn)) == 500


def test_spread_is_a_function_of_seed_and_step() -> None:
    steps = list(range(50))
    assert ratios(Spread(Fixed(0.8), seed=1), steps) == ratios(Spread(Fixed(0.8), seed=1), steps[::-1])[::-1]
    assert not set(ratios(Spread(Fixed(0.8), seed=1), steps)) & set(ratios(Spread(Fixed(0.8), seed=2), steps))


def test_spread_leaves_a_ratio_below_low_alone() -> None:
    assert Spread(Fixed(0.1), low=0.2).ratio(5) == 0.1


def test_spread_passes_observations_and_state_to_the_inner_schedule() -> None:
    schedule = Spread(Adaptive(start=0.1, step_size=0.2))
    assert schedule.observes
    for perplexity in (20.0, 20.0):
        schedule.observe(perplexity)
    restored = Spread(Adaptive(start=0.1, step_size=0.2))
    restored.load_state_dict(schedule.state_dict())
    assert restored == schedule
    assert restored.schedule.ratio(0) == pytest.approx(0.3)


@pytest.mark.parametrize("schedule", EVERY_KIND, ids=lambda s: type(s).__name__)
def test_what_every_schedule_promises(schedule: Schedule) -> None:
    assert all(0 <= schedule.ratio(step) < 1 for step in range(40))
    state = schedule.state_dict()
    assert bool(state) == schedule.observes
    schedule.load_state_dict(json.loads(json.dumps(state)))


@pytest.mark.parametrize("schedule", EVERY_KIND, ids=lambda s: type(s).__name__)
def test_yaml_makes_every_schedule_and_describe_gives_it_back(schedule: Schedule) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--schedule", type=Schedule)
    written = json.dumps({"schedule": schedule.describe()})
    config = parser.parse_string(written)
    assert parser.instantiate(config).schedule == schedule


def test_a_state_of_another_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Fixed has no state.*level"):
        Fixed().load_state_dict(Adaptive().state_dict())
    with pytest.raises(ValueError, match=r"Adaptive needs the state.*best.*holds \{\}"):
        Adaptive().load_state_dict({})
    with pytest.raises(ValueError, match=r"level 0.6 lies outside.*0.1 to Adaptive.maximum 0.5"):
        Adaptive(maximum=0.5).load_state_dict({"level": 0.6, "best": 20.0, "held": 0})


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 30.0, float("nan")])
@pytest.mark.parametrize(
    ("kind", "name", "settings"),
    [
        (Fixed, "compression_ratio", lambda r: {"compression_ratio": r}),
        (Linear, "start", lambda r: {"start": r}),
        (Linear, "end", lambda r: {"end": r}),
        (Cosine, "end", lambda r: {"end": r}),
        (Step, r"values\[1\]", lambda r: {"values": [0.1, r], "boundaries": [5]}),
        (Adaptive, "start", lambda r: {"start": r}),
        (Adaptive, "maximum", lambda r: {"maximum": r}),
        (Spread, "low", lambda r: {"schedule": Fixed(), "low": r}),
    ],
)
def test_a_ratio_outside_zero_to_one_is_named(kind: Any, name: str, settings: Any, ratio: float) -> None:
    with pytest.raises(ValueError, match=rf"{kind.__name__}\.{name} is {ratio}: .*below 1"):
        kind(**settings(ratio))


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (Fixed, {"warmup_steps": -1}, "Fixed.warmup_steps is -1: give 0 or more"),
        (Linear, {"steps": 0}, "Linear.steps is 0: give 1 or more"),
        (Cosine, {"steps": 0}, "Cosine.steps is 0"),
        (Linear, {"steps": 40.0}, "Linear.steps is 40.0: give 1 or more steps as a whole number, or a share"),
        (Linear, {"steps": 0.0}, "Linear.steps is 0.0: .* above 0 to 1.0"),
        (Fixed, {"warmup_steps": -0.1}, "Fixed.warmup_steps is -0.1: .* from 0 to 1.0"),
        (Step, {"values": [0.1, 0.2, 0.3], "boundaries": [0.5, 9]}, r"boundaries is \[0.5, 9\]"),
        (Step, {"values": [0.1], "boundaries": [5]}, "1 values and 1 boundaries"),
        (Step, {"values": [0.1, 0.2, 0.3], "boundaries": [5, 5]}, r"boundaries is \[5, 5\]"),
        (Step, {"values": [0.1, 0.2], "boundaries": [0]}, r"boundaries is \[0\]: give steps above 0"),
        (Adaptive, {"start": 0.5, "maximum": 0.4}, "maximum is 0.4: give 0.5 or more"),
        (Adaptive, {"step_size": 0.0}, "step_size is 0.0"),
        (Adaptive, {"patience": 0}, "patience is 0: give 1"),
        (Adaptive, {"back_off": -0.1}, "back_off is -0.1"),
        (Adaptive, {"tolerance": -0.1}, "tolerance is -0.1"),
        (Spread, {"schedule": Fixed(), "seed": -1}, "seed is -1"),
    ],
)
def test_bad_settings_are_named(kind: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**settings)


@pytest.mark.parametrize(
    ("shares", "steps"),
    [
        (Linear(0.1, 0.7), Linear(0.1, 0.7, 40)),
        (Cosine(0.1, 0.7, steps=0.5, warmup_steps=0.25), Cosine(0.1, 0.7, 15, 10)),
        (Linear(0.1, 0.7, steps=1.0, warmup_steps=8), Linear(0.1, 0.7, 32, 8)),
        (Step(), Step(boundaries=[10, 20, 30])),
        (Fixed(0.5, warmup_steps=0.1), Fixed(0.5, 4)),
        (Adaptive(warmup_steps=0.1), Adaptive(warmup_steps=4)),
        (Spread(Linear(0.1, 0.7, 0.8), low=0.05), Spread(Linear(0.1, 0.7, 32), low=0.05)),
    ],
)
def test_shares_follow_the_length_of_the_run(shares: Schedule, steps: Schedule) -> None:
    assert shares.over(40) == steps == steps.over(1000)
    assert shares.over(1).ratio(0) >= 0  # the shortest run there is
    with pytest.raises(ValueError, match=r"a share of the run, and trainer.max_steps is -1: give max_steps, or"):
        shares.over(-1)
    with pytest.raises(ValueError, match=r"has shares of a run, .*: ask schedule.over\(max_steps\)"):
        shares.ratio(3)
