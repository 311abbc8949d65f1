"""Confidence intervals of scores: Wilson's for a proportion, and the paired bootstrap for statistics of sums."""

import math
from collections.abc import Callable
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sparsekv_pl.models.seeding import seed_for

Interval = tuple[float, float]
Statistic = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""Maps sums over cases, (..., C), to statistics, (..., S); NaN where undefined."""

BOOTSTRAP_RESAMPLES = 2_000
CONFIDENCE = 0.95


def wilson_interval(successes: int, cases: int) -> Interval:
    """Wilson's 95 % score interval of a proportion, valid at 0 and 1 and with few cases.

    E. B. Wilson, "Probable inference, the law of succession, and statistical inference", Journal of the American
    Statistical Association 22 (1927), 209-212. Raises ``ValueError`` unless 0 <= ``successes`` <= ``cases`` and
    ``cases`` >= 1.
    """
    if cases < 1 or not 0 <= successes <= cases:
        raise ValueError(f"{successes} successes in {cases} cases: need 0 <= successes <= cases, cases >= 1")
    z2 = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) ** 2
    share = successes / cases
    centre = (share + z2 / (2 * cases)) / (1 + z2 / cases)
    half = math.sqrt(z2 * (share * (1 - share) / cases + z2 / (4 * cases**2))) / (1 + z2 / cases)
    # At 0 and 1 the bound is exact; rounding would leave 1e-17.
    return (0.0 if successes == 0 else centre - half, 1.0 if successes == cases else centre + half)


def mean_interval(values: ArrayLike) -> Interval | None:
    """Bootstrap interval of the mean of a number per case."""
    column = np.asarray(values, np.float64)
    return paired_bootstrap(np.stack([column, np.ones_like(column)], 1), lambda sums: sums[..., :1] / sums[..., 1:])[0]


def paired_bootstrap(columns: ArrayLike, statistic: Statistic, seed: int = 0) -> list[Interval | None]:
    """95 % percentile bootstrap intervals of ``statistic(columns.sum(0))``, cases drawn with replacement.

    A draw takes whole cases: all columns (numerator and denominator, base and trained) are drawn together, which makes
    the comparison paired. The same seed and number of cases draw the same cases. With one case, or with equal cases, an
    interval has no width, which only says that no case differed.

    B. Efron, "Bootstrap methods: another look at the jackknife", Annals of Statistics 7 (1979), 1-26. Raises
    ``ValueError`` if ``columns`` is not 2-D or has no case.

    ``columns`` (cases, C) holds the contributions of each case to each of C sums; ``statistic`` maps sums (..., C) to
    statistics (..., S). Returns one interval per statistic. Draws in which it is not finite (a retention whose full
    cache scored 0) are left out; None if no draw is left.
    """
    values = np.asarray(columns, np.float64)
    if values.ndim != 2 or len(values) == 0:
        raise ValueError(f"columns {values.shape} must be (cases, sums) with at least one case")
    tails = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn = statistic(_times_drawn(len(values), seed) @ values)
    intervals: list[Interval | None] = []
    for column in drawn.T:
        finite = column[np.isfinite(column)]
        low_high = np.quantile(finite, tails) if finite.size else None
        intervals.append(None if low_high is None else (float(low_high[0]), float(low_high[1])))
    return intervals


@lru_cache(maxsize=4)
def _times_drawn(cases: int, seed: int) -> NDArray[np.float64]:
    """(resamples, cases): how often each resample drew each case. Sums over a resample are then a matrix product."""
    generator = np.random.default_rng(seed_for("bootstrap", seed))
    return generator.multinomial(cases, np.full(cases, 1 / cases), size=BOOTSTRAP_RESAMPLES).astype(np.float64)
