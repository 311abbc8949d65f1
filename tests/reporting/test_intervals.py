"""Wilson by definition; the bootstrap against a slow loop over the same draws, hand-made cases and theory."""

import math

import numpy as np
import pytest

from sparsekv_pl.reporting import paired_bootstrap, wilson_interval
from sparsekv_pl.reporting.intervals import BOOTSTRAP_RESAMPLES, _times_drawn


# By definition, not by the formula: the bounds are the roots of (share - p)^2 = z^2 p (1 - p) / n.
@pytest.mark.parametrize(("successes", "cases"), [(0, 50), (3, 64), (32, 64), (50, 50), (1, 1)])
def test_wilson_bounds_solve_the_defining_equation(successes, cases):
    low, high = wilson_interval(successes, cases)
    share = successes / cases
    assert 0 <= low <= share <= high <= 1
    for p in (low, high):
        assert (share - p) ** 2 == pytest.approx(1.959964**2 * p * (1 - p) / cases, abs=1e-7)


def test_wilson_known_values():
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)  # a textbook's value
    assert wilson_interval(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)


@pytest.mark.parametrize(("successes", "cases"), [(-1, 5), (6, 5), (0, 0)])
def test_wilson_refuses_impossible_counts(successes, cases):
    with pytest.raises(ValueError, match=f"{successes} successes in {cases} cases"):
        wilson_interval(successes, cases)


def test_perplexity_has_the_width_that_theory_gives():
    tokens = np.full(400, 10)
    nll = 30 + 2 * np.random.default_rng(0).standard_normal(400)  # per token: mean 3, deviation 0.2
    ((low, high),) = paired_bootstrap(np.stack([nll, tokens], 1), lambda sums: np.exp(sums[..., :1] / sums[..., 1:]))
    half = 1.96 * nll.std() / 10 / math.sqrt(400)
    assert math.log(low) == pytest.approx(nll.mean() / 10 - half, abs=0.15 * half)
    assert math.log(high) == pytest.approx(nll.mean() / 10 + half, abs=0.15 * half)


def test_bootstrap_equals_a_slow_loop_that_draws_whole_cases():
    columns = np.random.default_rng(1).random((7, 4))
    found = paired_bootstrap(columns, lambda sums: sums[..., :2] / sums[..., 2:], seed=5)
    values = []
    for times in _times_drawn(7, 5):
        cases = [case for case, count in zip(columns, times, strict=True) for _ in range(int(count))]
        assert len(cases) == 7
        totals = [sum(column) for column in zip(*cases, strict=True)]
        values.append((totals[0] / totals[2], totals[1] / totals[3]))
    assert len(values) == BOOTSTRAP_RESAMPLES
    for interval, column in zip(found, zip(*values, strict=True), strict=True):
        ordered = sorted(column)
        place = 0.025 * (len(ordered) - 1)  # linear interpolation between order statistics
        below = int(place)
        low = ordered[below] + (place - below) * (ordered[below + 1] - ordered[below])
        assert interval[0] == pytest.approx(low)
        assert interval[0] < interval[1]


def test_every_case_is_drawn_equally_often_and_independently():
    drawn = _times_drawn(10, 0)
    assert drawn.sum(axis=1).tolist() == [10] * BOOTSTRAP_RESAMPLES
    assert drawn.mean(axis=0) == pytest.approx(np.ones(10), abs=0.1)
    assert drawn.var(axis=0) == pytest.approx(np.full(10, 0.9), abs=0.12)  # multinomial: n p (1 - p)


def test_pairing_takes_away_what_the_cases_have_in_common():
    hard = np.random.default_rng(0).random(50)
    columns = np.stack([hard, hard + 0.1, np.ones(50)], axis=1)  # trained is better by 0.1 on every case
    base, difference = paired_bootstrap(
        columns, lambda sums: np.stack([sums[..., 0], sums[..., 1] - sums[..., 0]], -1) / sums[..., 2:]
    )
    assert difference == pytest.approx((0.1, 0.1))
    assert base[1] - base[0] > 0.1


def test_undefined_draws_are_left_out_and_nothing_is_left_of_none_defined():
    one_found = np.array([[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
    (found,) = paired_bootstrap(one_found, lambda sums: sums[..., :1] / sums[..., 1:])
    assert found == (1.0, 1.0)
    (nothing,) = paired_bootstrap(np.zeros((3, 2)), lambda sums: sums[..., :1] / sums[..., 1:])
    assert nothing is None


@pytest.mark.parametrize("columns", [[], [1.0, 2.0]])
def test_bootstrap_refuses_what_is_no_table_of_cases(columns):
    with pytest.raises(ValueError, match="columns"):
        paired_bootstrap(columns, lambda sums: sums)
