"""Whether two methods' answers differ, and how small a difference these samples could show at all.

All take paired scores and clusters, as the intervals of `stats` do, and stand beside them: an interval says how large a
difference is, McNemar's test how surprising, and the detectable difference what a result of "no difference" is worth.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

from vlmbench import stats
from vlmbench.stats import MIN_CLUSTERS, Estimate, Z, bootstrap_tail, codes, effective_n

Z_80 = 0.8416212335729143
"""80 % quantile of the normal distribution."""


def mcnemar(a: Sequence[float], b: Sequence[float], clusters: Sequence[Hashable]) -> float | None:
    """Two-sided exact p-value of McNemar's test on right and wrong answers to the same questions; 1 without disagreement.

    With one question a video this is the binomial test on the pairs that disagree. Questions on one video are kept
    together: under the hypothesis a video's net gain may as well be its negative, and all sign patterns are counted, by
    convolution. None without pairs, and when a score is neither 0 nor 1: the test is one of right and wrong.
    """
    import numpy as np

    if not a or not {*a, *b} <= {0.0, 1.0}:
        return None
    gains: dict[Hashable, int] = {}
    for own, other, cluster in zip(a, b, clusters, strict=True):
        gains[cluster] = gains.get(cluster, 0) + round(own - other)
    sizes = [abs(gain) for gain in gains.values() if gain]
    chances = np.ones(1)  # [sum + 1]: of the total of the gains whose sign is plus
    for size in sizes:
        longer = np.zeros(len(chances) + size)
        longer[: len(chances)] += chances / 2
        longer[size:] += chances / 2
        chances = longer
    total = sum(sizes)
    net = 2 * np.arange(total + 1) - total
    return min(1.0, math.fsum(chances[abs(net) >= abs(sum(gains.values()))]))


def detectable(a: Sequence[float], b: Sequence[float], clusters: Sequence[Hashable]) -> float | None:
    """The least difference of two accuracies that these pairs show with 80 % probability at 5 %; None without pairs.

    Connor (1987): n·δ² = (z₀.₉₇₅·√ψ + z₀.₈·√(ψ − δ²))² for the share ψ of pairs that disagree, at the effective number n.
    One pair of either kind is added to ψ as in `stats.paired_delta`; a difference cannot be larger than ψ, so where these
    pairs disagree too rarely, ψ grows with δ. 1 when not even that is enough.
    """
    if not a:
        return None
    differences = [own - other for own, other in zip(a, b, strict=True)]
    n = effective_n(differences, clusters)
    share = (math.fsum(each * each for each in differences) / len(differences) * n + 2) / (n + 2)

    def enough(delta: float) -> bool:
        psi = max(share, delta)
        return n * delta**2 >= (Z * math.sqrt(psi) + Z_80 * math.sqrt(max(psi - delta**2, 0.0))) ** 2

    if not enough(1.0):
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def paired_bootstrap(
    a: Sequence[float], b: Sequence[float], clusters: Sequence[Hashable], seed: int = 0
) -> Estimate | None:
    """Mean of ``a − b`` with a percentile bootstrap over clusters; None without pairs.

    A second opinion on `stats.paired_delta`, from the data alone: where both methods agree on every sample it has width
    zero, which is why tables print the other one. Widened for few clusters as in `stats.ratio_interval`, and no interval
    below `MIN_CLUSTERS` of them.
    """
    import numpy as np

    if not a:
        return None
    differences = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    value = math.fsum(differences) / len(differences)
    index, n_clusters = codes(clusters)
    if n_clusters < MIN_CLUSTERS:
        return Estimate(value, None, None)
    sums, sizes = np.bincount(index, weights=differences), np.bincount(index)
    rng = np.random.default_rng(seed)
    means = []
    for _ in range(0, stats.RESAMPLES, 100):  # in blocks, so that [resamples, clusters] never gets large
        draws = rng.multinomial(n_clusters, np.full(n_clusters, 1 / n_clusters), size=100)
        means.append((draws @ sums) / (draws @ sizes))
    tail = bootstrap_tail(n_clusters)
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return Estimate(value, min(float(low), value), max(float(high), value))
