"""McNemar's test is exact, the detectable difference is detected, and 95 % intervals cover in 93 to 97 % of the cases."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from vlmbench.significance import detectable, mcnemar, paired_bootstrap
from vlmbench.stats import Estimate, accuracy_interval, paired_delta, ratio_interval, wilson

answers = st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 5)), min_size=1, max_size=12)


def columns(pairs: list[tuple[bool, bool, int]]) -> tuple[list[float], list[float], list[int]]:
    return [float(a) for a, _, _ in pairs], [float(b) for _, b, _ in pairs], [cluster for _, _, cluster in pairs]


@given(answers)
def test_one_question_a_video_is_the_binomial_test(pairs: list[tuple[bool, bool, int]]) -> None:
    a, b, _ = columns(pairs)
    gained, lost = sum(x > y for x, y in zip(a, b, strict=True)), sum(x < y for x, y in zip(a, b, strict=True))
    expected = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert mcnemar(a, b, range(len(a))) == pytest.approx(expected)


@given(answers)
def test_videos_keep_their_questions_together(pairs: list[tuple[bool, bool, int]]) -> None:
    """All sign patterns, one by one."""
    a, b, clusters = columns(pairs)
    gains = [sum(x - y for x, y, c in zip(a, b, clusters, strict=True) if c == cluster) for cluster in set(clusters)]
    signs = list(product((-1, 1), repeat=len(gains)))
    extreme = [abs(sum(s * g for s, g in zip(sign, gains, strict=True))) >= abs(sum(gains)) for sign in signs]
    assert mcnemar(a, b, clusters) == pytest.approx(sum(extreme) / len(signs))
    assert mcnemar(b, a, clusters) == pytest.approx(sum(extreme) / len(signs))


def test_mcnemars_example_of_many_pairs() -> None:
    a, b = [1.0] * 121 + [0.0] * 59 + [1.0] * 900, [0.0] * 121 + [1.0] * 59 + [1.0] * 900
    assert mcnemar(a, b, range(1080)) == pytest.approx(binomtest(121, 180).pvalue, rel=1e-9)


@pytest.mark.parametrize(("gained", "lost", "p"), [(15, 4, 0.0192108154296875), (3, 9, 0.14599609375)])
def test_mcnemar_is_statsmodels(gained: int, lost: int, p: float) -> None:
    """Its exact test, version 0.15.0."""
    a, b = [1.0] * gained + [0.0] * lost + [1.0] * 20, [0.0] * gained + [1.0] * lost + [1.0] * 20
    assert mcnemar(a, b, range(len(a))) == pytest.approx(p, abs=1e-12)


def test_what_mcnemar_cannot_say() -> None:
    assert mcnemar([], [], []) is None
    assert mcnemar([0.3], [1.0], ["v"]) is None  # a score between right and wrong
    assert mcnemar([1.0], [0.0], ["v"]) == 1  # one pair proves nothing
    assert mcnemar([1.0] * 9, [0.0] * 9, ["v"] * 9) == 1  # nor does one video
    assert mcnemar([1.0] * 9, [1.0] * 9, range(9)) == 1


@pytest.mark.parametrize("n", [1, 5])
def test_few_pairs_detect_nothing(n: int) -> None:
    found = detectable([1.0] * n, [1.0] * n, range(n))
    assert found is not None
    assert found > 0.8


def test_more_pairs_detect_less_and_one_video_nothing() -> None:
    found = [detectable([1.0] * n + [0.0], [1.0] * n + [1.0], range(n + 1)) for n in (20, 100, 1000, 10000)]
    assert found == sorted(found, reverse=True)  # type: ignore[type-var]
    assert detectable([1.0, 0.0] * 50, [1.0] * 100, ["v"] * 100) == 1
    assert detectable([], [], []) is None


@pytest.mark.parametrize(("n", "share"), [(200, 0.2), (1000, 0.1)])
def test_the_detectable_difference_is_found_in_four_of_five(n: int, share: float) -> None:
    """By the interval that tables print: it excludes 0 about as often as Connor's formula says, within 5 %."""
    half = round(n * share / 2)
    a = [1.0] * half + [0.0] * half + [1.0] * (n - 2 * half)
    b = [0.0] * half + [1.0] * half + [1.0] * (n - 2 * half)
    delta = detectable(a, b, range(n))
    assert delta is not None
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(1000):
        gained, lost, _ = rng.multinomial(n, [(share + delta) / 2, (share - delta) / 2, 1 - share])
        own = [1.0] * gained + [0.0] * (n - gained)
        other = [0.0] * gained + [1.0] * lost + [0.0] * (n - gained - lost)
        found = paired_delta(own, other, range(n))
        hits += found is not None and found.low is not None and found.low > 0
    assert 0.75 <= hits / 1000 <= 0.85


def test_the_bootstrap_and_the_printed_interval_agree_where_there_is_enough_to_see() -> None:
    rng = np.random.default_rng(0)
    own, other = ((rng.random(600) < share).astype(float).tolist() for share in (0.8, 0.7))
    clusters = np.repeat(np.arange(200), 3).tolist()
    boot, printed = paired_bootstrap(own, other, clusters), paired_delta(own, other, clusters)
    assert boot is not None
    assert printed is not None
    assert boot == pytest.approx(printed, abs=0.01)  # a fifth of the half-width
    assert boot == paired_bootstrap(own, other, clusters)


def test_what_a_bootstrap_cannot_say() -> None:
    assert paired_bootstrap([], [], []) is None
    assert paired_bootstrap([1.0] * 5, [0.0] * 5, range(5)) == Estimate(1.0, None, None)
    assert paired_bootstrap([1.0] * 9, [0.0] * 9, ["v"] * 9) == Estimate(1.0, None, None)
    assert paired_bootstrap([1.0] * 9, [1.0] * 9, range(9)) == Estimate(0, 0, 0)  # why tables print another


# Coverage, simulated with fixed seeds. 2000 cases place a coverage of 95 % within ±1 % (twice its error).

CASES = 2000


def coverage(found: list[Estimate | None], truth: float) -> float:
    known = [each for each in found if each is not None and each.low is not None and each.high is not None]
    assert len(known) == len(found)
    return sum(each.low <= truth <= each.high for each in known) / len(known)  # type: ignore[operator]


@pytest.mark.parametrize(("n", "share"), [(100, 0.7), (40, 0.5), (300, 0.9)])
def test_wilson_covers_in_95_of_100(n: int, share: float) -> None:
    hits = np.random.default_rng(1).binomial(n, share, CASES)
    assert 0.93 <= coverage([wilson(int(hit), n) for hit in hits], share) <= 0.97


def test_accuracy_by_video_covers_in_95_of_100() -> None:
    rng = np.random.default_rng(1)
    clusters = np.repeat(np.arange(50), 3).tolist()
    found = []
    for _ in range(CASES):
        chance = rng.beta(0.7 * 3, 0.3 * 3, (50, 1))  # questions on one video correlate by 1 / 4
        right = rng.random((50, 3)) < chance
        found.append(accuracy_interval(right.ravel().astype(float).tolist(), clusters))
    assert 0.93 <= coverage(found, 0.7) <= 0.97


def test_a_paired_difference_covers_in_95_of_100() -> None:
    rng = np.random.default_rng(1)
    found = []
    for _ in range(CASES):
        luck = rng.random(150)
        gained, lost = (luck < 0.15).astype(float), (luck > 0.95).astype(float)
        found.append(paired_delta(gained.tolist(), lost.tolist(), range(150)))
    assert 0.93 <= coverage(found, 0.10) <= 0.97


def test_a_median_ratio_covers_in_95_of_100() -> None:
    rng = np.random.default_rng(1)
    noise = rng.normal(0, 0.2, (400, 31))  # 400 cases: each is a bootstrap of its own
    found = [ratio_interval((1.5 * np.exp(each)).tolist(), range(31)) for each in noise]
    assert 0.93 <= coverage(found, 1.5) <= 0.97
    assert math.isclose(1.5, float(np.median([each.value for each in found if each])), rel_tol=0.02)
