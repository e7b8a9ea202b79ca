"""How near answers are to full attention's: a divergence is never overstated, and what nobody generated tells nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.test_report import answered, fill, table
from vlmbench.engine import first_token
from vlmbench.fidelity import MANY, common_prefix, divergences, fidelity, kl, recall
from vlmbench.record import Pass, SampleRecord
from vlmbench.store import ResultStore

logits = st.lists(st.floats(-8, 8), min_size=100, max_size=100)
RED = {"ids": [7, 8], "logprobs": [math.log(0.9), math.log(0.1)], "tail": None}
BLUE = {"ids": [8, 7], "logprobs": [math.log(0.9), math.log(0.1)], "tail": None}


def record(text: str, ids: list[int], token: dict[str, Any] | None = None, **more: Any) -> SampleRecord:
    accuracy: Pass = "accuracy"
    fields: dict[str, Any] = {"prediction": text, "raw_text": text, "output_ids": ids, "first_token": token, **more}
    return SampleRecord("s", accuracy, "v", "ok", **fields)


@given(logits, logits)
def test_the_stored_divergence_is_at_least_zero_and_at_most_the_true_one(a: list[float], b: list[float]) -> None:
    """100 tokens, of which 64 are stored: the others can only hide some of it. 64 rounded numbers add up to 1e-3."""
    own, other = (torch.tensor(each).log_softmax(0) for each in (a, b))
    true = float((own.exp() * (own - other)).sum())
    found = kl(first_token(own), first_token(other))
    assert 0 <= found <= true + 1e-3
    assert kl(first_token(own), first_token(own)) < 1e-6


@given(logits.map(lambda each: each[:50]), logits.map(lambda each: each[:50]))
def test_a_vocabulary_that_is_stored_whole_gives_the_true_divergence(a: list[float], b: list[float]) -> None:
    own, other = (torch.tensor(each).log_softmax(0) for each in (a, b))
    true = float((own.exp() * (own - other)).sum())
    assert kl(first_token(own), first_token(other)) == pytest.approx(true, abs=2e-3)  # stored to five digits


def test_a_token_outside_the_others_list_is_a_finite_divergence() -> None:
    elsewhere = {"ids": [1], "logprobs": [0.0], "tail": None}
    assert kl(RED, elsewhere) == pytest.approx(math.log(1e7))  # float32's resolution stands for nothing


def test_many_at_once_give_the_same_as_one_by_one() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = [first_token(row) for row in 4 * torch.randn(2 * MANY + 1, 100, generator=generator)]
    whole = [{**each, "tail": None} for each in tokens]
    disjoint = [{**each, "ids": [1000 + id_ for id_ in each["ids"]]} for each in tokens]
    for others in (tokens[::-1], whole[::-1], disjoint, tokens):
        one_by_one = [kl(p, q) for p, q in zip(tokens, others, strict=True)]
        assert divergences(tokens, others) == pytest.approx(one_by_one, abs=1e-9)


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_a_prefix_is_common_and_the_longest(a: list[int], b: list[int]) -> None:
    n = common_prefix(a, b)
    assert a[:n] == b[:n]
    assert n == min(len(a), len(b)) or a[n] != b[n]


def test_means_over_pairs() -> None:
    full = [record("red", [1, 2, 3], RED), record("blue", [1, 2, 3], RED)]
    own = [record("red", [1, 2, 3], RED), record("green", [1, 9], BLUE)]
    found = fidelity(list(zip(own, full, strict=True)))
    assert found == pytest.approx(
        {
            "agreement": 0.5,
            "first_token_match": 0.5,
            "first_token_kl": (0.9 - 0.1) * math.log(9) / 2,
            "greedy_prefix": 2,
        }
    )
    assert fidelity([]) == {}


def test_a_method_that_never_calls_the_model_has_no_tokens_to_compare() -> None:
    assert fidelity([(record("red", []), record("red", [1], RED))]) == {"agreement": 1}
    ended_at_once = (record("", [], BLUE), record("red", [1], RED))
    assert fidelity([ended_at_once])["greedy_prefix"] == 0


@pytest.mark.parametrize(
    ("said", "expected"),
    [(0.5, 0.5), ([0.4, 0.6], 0.5), ({"0": [0.2, 0.4], "1": 0.7}, 0.5), (None, None), ([], None), (True, None)],
)
def test_recall_is_a_number_or_one_for_each_layer(said: Any, expected: float | None) -> None:
    found = recall(record("red", [1], trace={"recall": said}))
    assert found == (None if expected is None else pytest.approx(expected))


def test_the_table_shows_the_test_and_what_it_could_have_seen(tmp_path: Path) -> None:
    store = ResultStore(tmp_path / "runs")
    fill(store, answered([1.0] * 10, first_token=RED, output_ids=[1, 2]))
    fill(store, answered([0.0] * 8 + [1.0] * 2, first_token=BLUE, output_ids=[1]), method="turbo")
    fill(store, answered([0.3] * 10), method="graded")
    row = table(store)["turbo"]
    assert row["mcnemar_p"] == pytest.approx(2 / 2**8)
    assert 0.5 < row["detectable_delta"] <= 1
    assert (row["first_token_match"], row["greedy_prefix"]) == (0, 1)
    assert table(store)["graded"]["mcnemar_p"] is None  # a test of right and wrong
    assert table(store)["full"]["mcnemar_p"] is None
