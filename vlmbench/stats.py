"""Intervals that stay honest when samples share a video, when all of them are right, and when there are few.

Questions on one video are correlated, so every interval here is clustered. All are two-sided at 95 %, and none of them
is ever narrower than the number of clusters allows. Randomness is seeded: the same store gives the same table.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np

Z = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""
RESAMPLES = 2000
MIN_CLUSTERS = 6
"""A median has no distribution-free 95 % interval below six observations: 1 − 2·½⁵ is 93.75 %."""


class Estimate(NamedTuple):
    value: float
    low: float | None
    """None when the data cannot support an interval."""
    high: float | None


def wilson(successes: float, n: float, z: float = Z) -> Estimate | None:
    """Wilson's score interval of a share; `successes` may be a sum of scores in 0–1 and `n` an effective number.

    None when `n` is 0. At 0 of n the interval is [0, z²/(n + z²)], never a point.
    """
    return _wilson(successes / n, n, z) if n > 0 else None


def _wilson(share: float, n: float, z: float = Z) -> Estimate:
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(max(share * (1 - share), 0.0) / n + z * z / (4 * n * n))
    # The share itself belongs to its interval; rounding must not push it out at 0 and at 1.
    return Estimate(share, max(0.0, min(centre - half, share)), min(1.0, max(centre + half, share)))


def accuracy_interval(scores: Sequence[float], clusters: Sequence[Hashable]) -> Estimate | None:
    """Mean of scores in 0–1 with Wilson's interval at the effective number of samples; None without samples."""
    if not scores:
        return None
    return _wilson(math.fsum(scores) / len(scores), effective_n(scores, clusters))


def paired_delta(a: Sequence[float], b: Sequence[float], clusters: Sequence[Hashable]) -> Estimate | None:
    """Mean of ``a − b`` over paired scores in 0–1, with a clustered interval in −1…1; None without samples.

    Bonett and Price's (2012) adjusted Wald interval at the effective number of pairs n: one pair that is all better and
    one that is all worse are added before the variance is taken. Without them, a method that agrees on every one of
    five samples would get an interval of width zero; with them it gets about ±3/(n + 2), the rule of three.
    """
    if not a:
        return None
    differences = [x - y for x, y in zip(a, b, strict=True)]
    value = math.fsum(differences) / len(differences)
    square = math.fsum(each * each for each in differences) / len(differences)
    n = effective_n(differences, clusters)
    centre = value * n / (n + 2)
    half = Z * math.sqrt(max((square * n + 2) / (n + 2) - centre * centre, 0.0) / (n + 2))
    return Estimate(value, max(-1.0, min(centre - half, value)), min(1.0, max(centre + half, value)))


def ratio_interval(ratios: Sequence[float], clusters: Sequence[Hashable], seed: int = 0) -> Estimate | None:
    """Median of per-sample paired ratios with a percentile bootstrap over clusters; None without ratios.

    The percentiles are widened for few clusters as by Hesterberg (2015), without which eight clusters give 91 %. `low`
    and `high` are None below `MIN_CLUSTERS` clusters. The median is the usual one (mean of the two middle values).
    """
    import numpy as np

    if not ratios:
        return None
    values = np.asarray(ratios, dtype=float)
    median = float(np.median(values))
    index, n_clusters = codes(clusters)
    if n_clusters < MIN_CLUSTERS:
        return Estimate(median, None, None)
    order = np.argsort(values, kind="stable")
    values, index = values[order], index[order]
    rng = np.random.default_rng(seed)
    medians = []
    block = max(100, 100_000 // len(values))  # [resamples, n] never gets large
    for start in range(0, RESAMPLES, block):
        draws = rng.multinomial(n_clusters, np.full(n_clusters, 1 / n_clusters), size=min(block, RESAMPLES - start))
        below = np.cumsum(draws[:, index], axis=1)  # [block, n]: how many resampled values lie at or below each
        size = below[:, -1:]
        lower = np.argmax(2 * below >= size, axis=1)
        upper = np.argmax(2 * below > size, axis=1)
        medians.append((values[lower] + values[upper]) / 2)
    tail = bootstrap_tail(n_clusters)
    low, high = np.quantile(np.concatenate(medians), [tail, 1 - tail])
    return Estimate(median, min(float(low), median), max(float(high), median))


def bootstrap_tail(n_clusters: int) -> float:
    """Share of resamples on either side of a percentile interval, a little less than 2.5 % (Hesterberg 2015)."""
    return math.erfc(math.sqrt(n_clusters / (n_clusters - 1)) * t_quantile(n_clusters - 1) / math.sqrt(2)) / 2


def codes(clusters: Sequence[Hashable]) -> tuple[np.ndarray, int]:
    """Clusters as integers from 0, and how many there are."""
    import numpy as np

    names = {name: code for code, name in enumerate(dict.fromkeys(clusters))}
    return np.array([names[name] for name in clusters], dtype=int), len(names)


def effective_n(values: Sequence[float], clusters: Sequence[Hashable]) -> float:
    """How many independent samples would be worth as much as these clustered ones.

    That is n over the design effect, corrected for few clusters as by Korn and Graubard (1998), and kept between 1/Σw²
    (every cluster one single observation, w its share of the samples) and n. Where nothing varies (0 %, 100 %, no
    difference at all) the data say nothing about correlation, so the lower end is taken.
    """
    import numpy as np

    if len(values) != len(clusters):
        raise ValueError(f"{len(values)} values need as many clusters, not {len(clusters)}")
    index, n_clusters = codes(clusters)
    n, sizes = len(values), np.bincount(index)
    floor = 1.0 / float(((sizes / n) ** 2).sum())
    if n_clusters == 1 or min(values) == max(values):
        return floor
    residuals = np.asarray(values) - math.fsum(values) / n
    variance = float((residuals**2).sum()) / n
    sums = np.bincount(index, weights=residuals)
    clustered = n_clusters / (n_clusters - 1) * float((sums**2).sum()) / n**2 * (t_quantile(n_clusters - 1) / Z) ** 2
    return min(max(variance / clustered if clustered > 0 else float(n), floor), float(n))


@lru_cache
def t_quantile(freedom: int) -> float:
    """97.5 % quantile of Student's t, by halving. Without scipy, so that a benchmark runs where only torch is."""
    low, high = 0.0, 16.0  # 12.7 at one degree of freedom
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < 0.95 else (low, middle)
    return (low + high) / 2


def _within(t: float, freedom: int) -> float:
    """P(|T| < t) for whole degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0 if freedom == 1 else term
    for k in range(2 + odd, freedom - 1, 2):
        term *= square * (k - 1) / k
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
