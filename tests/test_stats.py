"""Intervals cover what they claim, and stay honest where a textbook formula has width zero."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import stdtrit

from vlmbench.stats import (
    MIN_CLUSTERS,
    Estimate,
    Z,
    accuracy_interval,
    effective_n,
    paired_delta,
    ratio_interval,
    t_quantile,
    wilson,
)

scores = st.lists(st.sampled_from([0.0, 0.3, 1.0]), min_size=1, max_size=40)
ratios = st.lists(st.floats(0.1, 10), min_size=MIN_CLUSTERS, max_size=40)


def width(estimate: Estimate | None) -> float:
    assert estimate is not None
    assert estimate.low is not None
    assert estimate.high is not None
    return estimate.high - estimate.low


def inside(estimate: Estimate | None, low: float, high: float) -> bool:
    """The interval holds its value and lies within the scale."""
    assert estimate is not None
    assert estimate.low is not None
    assert estimate.high is not None
    return low <= estimate.low <= estimate.value <= estimate.high <= high


def test_without_samples_there_is_no_estimate() -> None:
    assert wilson(0, 0) is None
    assert accuracy_interval([], []) is None
    assert paired_delta([], [], []) is None
    assert ratio_interval([], []) is None


def test_wilson_is_the_published_formula() -> None:
    found = wilson(81, 263)  # Newcombe (1998), table I
    assert found is not None
    assert found.low == pytest.approx(0.2553, abs=5e-5)
    assert found.high == pytest.approx(0.3662, abs=5e-5)


@given(scores, st.data())
def test_an_interval_holds_its_value_and_stays_on_the_scale(values: list[float], data: st.DataObject) -> None:
    clusters = data.draw(st.lists(st.integers(0, 5), min_size=len(values), max_size=len(values)))
    others = data.draw(st.lists(st.sampled_from([0.0, 1.0]), min_size=len(values), max_size=len(values)))
    assert inside(accuracy_interval(values, clusters), 0, 1)
    assert inside(paired_delta(values, others, clusters), -1, 1)


@given(scores, st.data())
def test_names_and_order_of_clusters_do_not_matter(values: list[float], data: st.DataObject) -> None:
    clusters = data.draw(st.lists(st.integers(0, 5), min_size=len(values), max_size=len(values)))
    order = data.draw(st.permutations(range(len(values))))
    moved = accuracy_interval([values[i] for i in order], [f"video {clusters[i]}" for i in order])
    assert moved == pytest.approx(accuracy_interval(values, clusters))


@given(scores)
def test_one_cluster_counts_as_one_sample(values: list[float]) -> None:
    share = math.fsum(values) / len(values)
    assert accuracy_interval(values, ["v"] * len(values)) == pytest.approx(wilson(share, 1))


@given(scores)
def test_a_sample_alone_in_its_cluster_counts_whole(values: list[float]) -> None:
    found = accuracy_interval(values, range(len(values)))
    assert width(found) == pytest.approx(width(wilson(math.fsum(values), len(values))))


@given(scores)
def test_copies_of_a_sample_in_one_video_add_nothing(values: list[float]) -> None:
    one = accuracy_interval(values, range(len(values)))
    copied = accuracy_interval([v for v in values for _ in range(5)], [i for i in range(len(values)) for _ in range(5)])
    assert copied is not None
    assert width(copied) >= width(one) - 1e-9


@pytest.mark.parametrize("n", [1, 5, 100])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_all_right_or_all_wrong_is_not_certain(n: int, value: float) -> None:
    found = accuracy_interval([value] * n, range(n))
    assert found == pytest.approx(wilson(value * n, n))
    assert width(found) > 1.9 / (n + 4)


@pytest.mark.parametrize("n", [1, 5, 100])
def test_agreeing_on_every_sample_is_not_proof_of_no_difference(n: int) -> None:
    found = paired_delta([1.0] * n, [1.0] * n, range(n))
    half = min(1, 1.96 * math.sqrt(2) / (n + 2))
    assert found == pytest.approx((0, -half, half), rel=1e-3)


@given(scores, st.data())
def test_swapping_the_methods_turns_the_difference_round(values: list[float], data: st.DataObject) -> None:
    others = data.draw(st.lists(st.sampled_from([0.0, 1.0]), min_size=len(values), max_size=len(values)))
    clusters = data.draw(st.lists(st.integers(0, 5), min_size=len(values), max_size=len(values)))
    there, back = paired_delta(values, others, clusters), paired_delta(others, values, clusters)
    assert there is not None
    assert back is not None
    assert there == pytest.approx([-each for each in (back.value, back.high, back.low) if each is not None])


@given(ratios)
def test_a_ratio_is_the_median_and_lies_in_its_interval_within_the_data(values: list[float]) -> None:
    found = ratio_interval(values, range(len(values)))
    assert found is not None
    assert found.value == pytest.approx(float(np.median(values)))
    assert inside(found, min(values), max(values))
    assert found == ratio_interval(values, range(len(values)))  # seeded


def test_the_bootstrap_is_that_of_resampled_clusters() -> None:
    rng = np.random.default_rng(3)
    values = rng.lognormal(0.3, 0.3, 30)
    clusters = np.arange(30) // 3
    draws = rng.integers(0, 10, (4000, 10))
    medians = [np.median(values.reshape(10, 3)[draw]) for draw in draws]
    low, high = np.quantile(medians, [0.0086, 0.9914])  # Hesterberg's level for ten clusters
    found = ratio_interval(values.tolist(), clusters.tolist())
    assert found is not None
    # 4000 draws place a 0.9 % quantile within ±0.3 % of level, which is the next order statistic or two.
    spacing = float(np.median(np.diff(np.sort(values))))
    assert found.low == pytest.approx(low, abs=3 * spacing)
    assert found.high == pytest.approx(high, abs=3 * spacing)


def test_too_few_clusters_for_a_median_give_no_interval() -> None:
    assert ratio_interval([1.0, 2.0, 3.0], ["v"] * 3) == Estimate(2.0, None, None)
    few = MIN_CLUSTERS - 1
    assert ratio_interval([1.0] * few, range(few)) == Estimate(1.0, None, None)


def test_a_cluster_is_needed_for_every_value() -> None:
    with pytest.raises(ValueError, match="2 values need as many clusters, not 1"):
        accuracy_interval([1.0, 0.0], ["v"])


# Coverage. A true 95 % interval covers in 95 % ± 3·sqrt(0.95·0.05/RUNS) of RUNS (with probability 99.7 %). Ours may be
# wider than they claim, being made for few samples, but not much: hence 97 % in the upper limit.

RUNS = 600
LOW = 0.95 - 3 * math.sqrt(0.95 * 0.05 / RUNS)
HIGH = 0.97 + 3 * math.sqrt(0.97 * 0.03 / RUNS)


def covers(estimate: Estimate | None, truth: float) -> bool:
    assert estimate is not None
    assert estimate.low is not None
    assert estimate.high is not None
    return estimate.low <= truth <= estimate.high


@pytest.mark.parametrize(("n_videos", "per_video", "share", "correlation"), [(60, 3, 0.7, 0.3), (20, 10, 0.8, 0.2)])
def test_accuracy_covers_when_questions_share_a_video(
    n_videos: int, per_video: int, share: float, correlation: float
) -> None:
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(n_videos), per_video).tolist()
    strength = (1 - correlation) / correlation
    hits = 0
    for _ in range(RUNS):
        chance = rng.beta(share * strength, (1 - share) * strength, (n_videos, 1))
        right = rng.random((n_videos, per_video)) < chance
        hits += covers(accuracy_interval(right.ravel().astype(float).tolist(), clusters), share)
    assert LOW <= hits / RUNS <= HIGH


def test_a_paired_difference_covers_when_questions_share_a_video() -> None:
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(60), 3).tolist()
    hits = 0
    for _ in range(RUNS):
        luck = np.where(rng.random((60, 3)) < 0.5, rng.random((60, 1)), rng.random((60, 3))).ravel()
        gained, lost = (luck < 0.15).astype(float), (luck > 0.95).astype(float)
        hits += covers(paired_delta(gained.tolist(), lost.tolist(), clusters), 0.10)
    assert LOW <= hits / RUNS <= HIGH


def test_a_ratio_covers_when_samples_share_a_video() -> None:
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(25), 2).tolist()
    hits = 0
    for _ in range(RUNS):
        noise = rng.normal(0, 0.2, (25, 2)) + rng.normal(0, 0.2, (25, 1))
        hits += covers(ratio_interval((1.5 * np.exp(noise)).ravel().tolist(), clusters), 1.5)
    assert LOW <= hits / RUNS <= HIGH


# What others compute. The figures of statsmodels 0.15.0 are written down: it is no dependency for four numbers.

RIGHT = [int(each) for each in "011100001001010101111100010000011011100111111010100101111011"]
THREES = [number // 3 for number in range(60)]


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (7, 20, 0.18119182410108203, 0.5671457233147638),
        (0, 12, 0.0, 0.24249400665524096),
        (87, 100, 0.7901964855992356, 0.9224283257275949),
    ],
)
def test_wilson_is_statsmodels(successes: int, n: int, low: float, high: float) -> None:
    assert wilson(successes, n) == pytest.approx((successes / n, low, high), abs=1e-12)


def test_the_error_by_video_is_statsmodels_and_lmms_evals() -> None:
    """statsmodels' cluster-robust error of a mean, and equation 4 of Miller (2024), which lmms-eval computes.

    Ours has Student's quantile in it besides, since the clusters are few.
    """
    values = [float(each) for each in RIGHT]
    n, mean = len(values), sum(values) / len(values)
    error = math.sqrt(mean * (1 - mean) / effective_n(values, THREES)) / (t_quantile(19) / Z)
    assert error == pytest.approx(0.06522565, rel=1e-6)
    cross = sum(
        (values[i] - mean) * (values[j] - mean) for i in range(n) for j in range(n) if i != j and THREES[i] == THREES[j]
    )
    theirs = math.sqrt(mean * (1 - mean) / (n - 1) + cross / n**2)
    assert error == pytest.approx(theirs, rel=0.03)  # G / (G − 1) here, n / (n − 1) there


def test_students_quantile_is_scipys() -> None:
    degrees = [*range(1, 60), 500, 4999]
    assert [t_quantile(each) for each in degrees] == pytest.approx(
        [stdtrit(each, 0.975) for each in degrees], rel=1e-10
    )
