"""Merging by informativity: each property of the method, then the plain reference, then the published numbers."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from vlmbench.kernels.token_merge import (
    Importance,
    attention,
    cap,
    counts,
    fold,
    keep_text_side,
    match,
    merge,
    reference,
    schedule,
    unit_metric,
    unmerge,
    weight,
)
from vlmbench.kernels.token_merge.mass import augmented


def same(ours: Tensor, theirs: Tensor) -> None:
    """float64: the same sums in another order."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def keys_of(groups: int, n: int, *, heads: int = 3, d: int = 4, seed: int = 1) -> Tensor:
    """``[G, n, H, d]``"""
    return drawn(groups, n, heads, d, seed=seed)


def metric_of(keys: Tensor) -> Tensor:
    return unit_metric(keys[:, :, None])


def importances(groups: int, n: int, seed: int = 2) -> Tensor:
    return drawn(groups, n, seed=seed).softmax(-1)


CASES = [(8, 3, False), (9, 4, False), (9, 3, True), (10, 4, True), (7, 1, False)]


# Properties.


@pytest.mark.parametrize(("n", "r", "class_token"), CASES)
def test_masses_and_weighted_sums_are_kept_through_several_layers(n: int, r: int, class_token: bool) -> None:
    x, mass = drawn(2, n, 5), torch.ones(2, n, dtype=torch.float64)
    for layer in range(2):
        found = match(
            metric_of(keys_of(2, x.shape[1], seed=layer)),
            importances(2, x.shape[1]),
            min(r, cap(x.shape[1], class_token)),
            weight=3.0,
            class_token=class_token,
        )
        merged, masses = merge(x, mass, found)
        same(masses.sum(1), torch.full((2,), float(n), dtype=torch.float64))
        torch.testing.assert_close(
            (merged * masses[..., None]).sum(1), (x * mass[..., None]).sum(1), rtol=0, atol=1e-12
        )
        x, mass = merged, masses


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_merging_none_is_the_identity_to_the_last_bit_whatever_the_masses(dtype: torch.dtype) -> None:
    """x · s / s is not, in half precision."""
    x, mass = drawn(2, 9, 5, dtype=dtype), torch.full((2, 9), 3.0)
    found = match(metric_of(keys_of(2, 9)), None, 0)
    merged, masses = merge(x, mass, found)
    assert torch.equal(merged, x)
    assert torch.equal(masses, mass)


def test_who_takes_part_in_no_merge_comes_out_to_the_last_bit() -> None:
    x, mass = drawn(1, 12, 5, dtype=torch.float16), torch.full((1, 12), 3.0)
    found = match(metric_of(keys_of(1, 12)), None, 3)
    merged, _ = merge(x, mass, found)
    into = set(found.into.gather(1, found.source)[0].tolist())
    for new, old in enumerate(found.keep[0].tolist()):
        assert torch.equal(merged[0, new], x[0, old]) == (new not in into)


def test_attention_with_mass_is_attention_to_each_token_that_often() -> None:
    q, k, v = (drawn(2, 3, 5, 4, seed=seed) for seed in range(3))
    mass = torch.tensor([1, 3, 2, 1, 4])
    often = [tensor.repeat_interleave(mass, dim=2) for tensor in (k, v)]
    want = torch.softmax(q @ often[0].transpose(-1, -2) * 0.5, -1) @ often[1]
    log_mass = mass.double().log().expand(2, -1)
    kinds: list[Importance | None] = [None, "class", "column"]
    for importance in kinds:
        found = attention(q, k, v, scale=0.5, log_mass=log_mass, importance=importance)
        same(found.out, want)
    same(reference.attention(q, k, v, mass.double().expand(2, -1), 0.5)[0], want)


def test_mass_in_further_features_is_mass_in_a_mask() -> None:
    """As flash kernels take it; in bfloat16 the two parts leave log(mass) as exact as the logits themselves."""
    q, k, v = (drawn(2, 3, 7, 12, seed=seed) for seed in range(3))
    mass = torch.tensor([1.0, 3, 200, 1, 4, 17, 1]).double().expand(2, -1)
    want, _ = reference.attention(q, k, v, mass, 0.3)
    torch.testing.assert_close(augmented(q, k, v, 0.3, mass.log()), want, rtol=0, atol=1e-7)
    q, k, v = (tensor.bfloat16() for tensor in (q, k, v))
    rounded, _ = reference.attention(q.double(), k.double(), v.double(), mass, 0.3)
    found = augmented(q, k, v, 0.3, mass.log().float())
    torch.testing.assert_close(found.double(), rounded, rtol=0, atol=0.02)  # 8 bits of values up to 3


@pytest.mark.parametrize("class_token", [False, True])
def test_importance_is_read_off_the_attention_with_its_mass(class_token: bool) -> None:
    """Forgetting the mass on the class token's row is an old mistake."""
    q, k, v = (drawn(2, 3, 6, 4, seed=seed) for seed in range(3))
    mass = torch.tensor([1.0, 3, 2, 1, 4, 1]).double().expand(2, -1)
    _, probabilities = reference.attention(q, k, v, mass, 0.5)
    found = attention(q, k, v, scale=0.5, log_mass=mass.log(), importance="class" if class_token else "column")
    assert found.importance is not None
    want = torch.stack([reference.importance(each, class_token=class_token) for each in probabilities])
    same(found.importance, want)
    same(want.sum(-1), torch.ones(2, dtype=torch.float64))


def test_few_scores_at_once_are_all_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (drawn(5, 2, 6, 4, seed=seed) for seed in range(3))
    whole = attention(q, k, v, scale=0.5, importance="column")
    monkeypatch.setattr("vlmbench.kernels.token_merge.mass.SCORES", 2 * 2 * 36)
    parts = attention(q, k, v, scale=0.5, importance="column")
    assert whole.importance is not None
    assert parts.importance is not None
    same(parts.out, whole.out)
    same(parts.importance, whole.importance)


@pytest.mark.parametrize(("n", "r", "class_token"), CASES)
def test_importance_never_changes_where_a_token_goes(n: int, r: int, class_token: bool) -> None:
    metric, a = metric_of(keys_of(1, n)), importances(1, n)
    first, second = list(range(0, n, 2)), list(range(1, n, 2))
    nearest = (metric[0, first] @ metric[0, second].T).argmax(-1)
    for factor in (0.0, 1.0, 1e6):
        found = match(metric, a, r, weight=factor, class_token=class_token)
        for source in found.source[0].tolist():
            went = found.keep[0, found.into[0, source]]
            assert int(went) == second[int(nearest[first.index(source)])]


@pytest.mark.parametrize(("n", "r", "class_token"), CASES)
def test_a_large_weight_merges_the_least_attended_and_so_does_value_alone(n: int, r: int, class_token: bool) -> None:
    """Not the most attended: the sign is easy to invert."""
    metric, a = metric_of(keys_of(1, n)), importances(1, n)
    candidates = [i for i in range(0, n, 2) if not (class_token and i == 0)]
    want = set(sorted(candidates, key=lambda i: float(a[0, i]))[:r])
    for options in ({"weight": 1e9}, {"redundancy": False}):
        found = match(metric, a, r, class_token=class_token, **options)
        assert set(found.source[0].tolist()) == want


def test_the_class_token_stays_first_as_it_was_with_mass_one() -> None:
    x, mass = drawn(2, 9, 5), torch.ones(2, 9, dtype=torch.float64)
    first = x[:, 0].clone()
    for layer in range(3):
        n = x.shape[1]
        found = match(
            metric_of(keys_of(2, n, seed=layer)), importances(2, n), cap(n, 1), weight=100.0, class_token=True
        )
        x, mass = merge(x, mass, found)
        assert torch.equal(x[:, 0], first)
        assert mass[:, 0].tolist() == [1, 1]
        assert found.keep[:, 0].tolist() == [0, 0]


def test_without_a_class_token_the_first_token_may_merge_like_any_other() -> None:
    metric = torch.zeros(1, 6, 2, dtype=torch.float64)
    metric[0, :, 0] = torch.tensor([1.0, 1, -1, 0.5, 0.2, 0.1])
    assert match(metric, None, 1).source.tolist() == [[0]]
    assert match(metric, None, 1, class_token=True).source.tolist() != [[0]]


def test_duplicates_leave_the_distinct_rows_double_their_mass_and_attend_as_before() -> None:
    rows, queries = drawn(1, 4, 5), drawn(1, 2, 3, 5, seed=5)
    x = rows.repeat_interleave(2, 1)  # each even token's copy is at its side
    found = match(unit_metric(x[:, :, None, None]), None, 4)
    merged, mass = merge(x, torch.ones(1, 8, dtype=torch.float64), found)
    assert sorted(merged[0].tolist()) == sorted(rows[0].tolist())
    assert mass.tolist() == [[2, 2, 2, 2]]
    heads, left = (tensor[:, None].expand(1, 2, -1, -1) for tensor in (x, merged))
    before = attention(queries, heads, heads, scale=0.4).out
    after = attention(queries, left, left, scale=0.4, log_mass=mass.log()).out
    same(after, before)


def test_unmerging_gives_every_token_its_groups_value_in_raster_order() -> None:
    x, mass = drawn(3, 11, 5), torch.ones(3, 11, dtype=torch.float64)
    found = match(metric_of(keys_of(3, 11)), None, 4)
    merged, _ = merge(x, mass, found)
    back = unmerge(merged, found.into)
    assert back.shape == x.shape
    for sample in range(3):
        into = found.into[sample].tolist()
        for i, new in enumerate(into):
            assert torch.equal(back[sample, i], merged[sample, new])
            if into.count(new) == 1:
                assert torch.equal(back[sample, i], x[sample, i])


def test_a_batch_is_its_samples_one_by_one() -> None:
    x, mass, metric, a = drawn(4, 9, 5), torch.ones(4, 9).double(), metric_of(keys_of(4, 9)), importances(4, 9)
    together = merge(x, mass, match(metric, a, 3, weight=2.0))[0]
    alone = [
        merge(x[i : i + 1], mass[i : i + 1], match(metric[i : i + 1], a[i : i + 1], 3, weight=2.0))[0] for i in range(4)
    ]
    same(together, torch.cat(alone))


def test_frames_that_share_a_plan_merge_alike_by_their_mean_scores() -> None:
    metric, a = metric_of(keys_of(6, 8)), importances(6, 8)  # three frames of two windows
    found = match(metric, a, 3, weight=2.0, frames=3)
    by_frame = found.into.unflatten(0, (3, 2))
    assert (by_frame == by_frame[:1]).all()
    assert not torch.equal(by_frame[0, 0], by_frame[0, 1])
    similar = (metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)).unflatten(0, (3, 2)).mean(0)
    score = similar.max(-1).values - 2.0 * a[:, ::2].unflatten(0, (3, 2)).mean(0)
    assert [set(row) for row in (2 * score.topk(3).indices).tolist()] == [set(row) for row in found.source[:2].tolist()]


def test_shapes_follow_from_sizes_alone() -> None:
    """On tensors without data nothing could branch on it: what a CUDA graph needs."""
    x = torch.empty(2, 9, 5, device="meta")
    mass, metric, a = x.new_empty(2, 9), x.new_empty(2, 9, 4), x.new_empty(2, 9)
    merged, masses = merge(x, mass, match(metric, a, 3, weight=1.0, class_token=True))
    assert (merged.shape, masses.shape) == ((2, 6, 5), (2, 6))
    assert fold(x, mass, metric, a, 7, weight=1.0).x.shape == (2, 2, 5)


# The plain reference.


@pytest.mark.parametrize(("n", "r", "class_token"), CASES)
@pytest.mark.parametrize("factor", [0.0, 1.5])
def test_layers_in_a_row_are_the_reference_token_by_token(n: int, r: int, class_token: bool, factor: float) -> None:
    """The second layer's averages need the masses of the first: a plain mean agrees for one layer only."""
    keys = keys_of(2, n)
    x, mass = drawn(2, n, 5), torch.ones(2, n, dtype=torch.float64)
    plain = [(x[i], mass[i]) for i in range(2)]
    for layer in range(3):
        now = x.shape[1]
        a, merging = importances(2, now, seed=layer), min(r, cap(now, class_token))
        metric = metric_of(keys[:, :now])
        found = match(metric, a, merging, weight=factor, class_token=class_token)
        x, mass = merge(x, mass, found)
        for i, (values, masses) in enumerate(plain):
            h = reference.metric(keys[i, :now].transpose(0, 1))
            same(metric[i], h)
            want = reference.merge_layer(values, masses, h, a[i], r, weight=factor, class_token=class_token)
            same(x[i], want.x)
            same(mass[i], want.mass)
            plain[i] = want.x, want.mass


def tome(metric: Tensor, r: int) -> tuple[list[int], list[int]]:
    """ToMe (arXiv 2210.09461, section 3): (merged tokens in order, the token that each goes into)."""
    scores = metric[::2] @ metric[1::2].T
    best = [max((float(value), -j) for j, value in enumerate(row)) for row in scores]
    order = sorted(range(len(best)), key=lambda i: -best[i][0])[:r]
    return [2 * i for i in order], [2 * -best[i][1] + 1 for i in order]


def test_without_value_it_is_tome() -> None:
    metric = metric_of(keys_of(1, 12))
    found = match(metric, importances(1, 12), 4, weight=0.0)
    source, destination = tome(metric[0], 4)
    assert found.source[0].tolist() == source
    assert found.keep[0, found.into[0, source]].tolist() == destination
    assert torch.equal(found.into, match(metric, None, 4).into)


def test_heads_are_averaged_before_they_are_normalised() -> None:
    keys = keys_of(1, 4)
    after = torch.nn.functional.normalize(keys, dim=-1).mean(2)
    assert not torch.allclose(metric_of(keys), torch.nn.functional.normalize(after, dim=-1))


def test_folding_is_passes_of_half_with_metric_and_importance_averaged() -> None:
    x, metric, a = drawn(2, 9, 5), metric_of(keys_of(2, 9)), importances(2, 9)
    ones = torch.ones(2, 9, dtype=torch.float64)
    found = fold(x, ones, metric, a, 6, weight=2.0)
    one = match(metric, a, 4, weight=2.0)
    half, mass = merge(x, ones, one)
    h = torch.nn.functional.normalize(merge(metric, ones, one)[0], dim=-1)
    two = match(h, merge(a[..., None], ones, one)[0][..., 0], 2, weight=2.0)
    same(found.x, merge(half, mass, two)[0])
    same((found.x * found.mass[..., None]).sum(1), x.sum(1))
    assert (found.into.gather(1, found.keep) == torch.arange(3)).all()
    whole = fold(x, ones, metric, a, 8, weight=2.0)
    same(whole.x[:, 0], x.mean(1))  # all in one: the mean of all
    with pytest.raises(ValueError, match="one at least must be left"):
        fold(x, ones, metric, a, 9)


# Numbers.


@pytest.mark.parametrize(
    ("n", "r", "layers", "left"),
    [(577, 30, 12, 217), (577, 40, 12, 97), (901, 40, 12, 421), (901, 60, 12, 181), (577, 16, 24, 193)],
)
def test_published_settings_leave_the_published_counts(n: int, r: int, layers: int, left: int) -> None:
    assert counts(n, schedule(r, layers), protected=1, min_tokens=40)[-1] == left


def test_the_cap_and_the_least_number_of_tokens_end_the_merging() -> None:
    """ViT-L/16 at 384 pixels with r = 40: …, 97, 57, then half of 56, then below 40."""
    assert counts(577, schedule(40, 24), protected=1, min_tokens=40)[11:16] == (97, 57, 29, 29, 29)
    assert (cap(9), cap(9, 1), cap(10, 1), cap(1, 1)) == (4, 4, 4, 0)
    with pytest.raises(ValueError, match="at most 4, not 5"):
        match(metric_of(keys_of(1, 9)), None, 5)


@pytest.mark.parametrize(
    ("r", "inflection", "want"),
    [(4, 0.0, (4, 4, 4)), (4, 1.0, (0, 4, 8)), (4, -1.0, (8, 4, 0)), ((5, 2), 0.0, (5, 2, 0)), (3, 0.5, (1, 3, 5))],
)
def test_schedules(r: int | Sequence[int], inflection: float, want: tuple[int, ...]) -> None:
    assert schedule(r, 3, inflection) == want


def test_schedules_that_make_no_sense_are_refused() -> None:
    for bad, inflection in (((1, 2, 3, 4), 0.0), (-1, 0.0), (4, 1.5)):
        with pytest.raises(ValueError, match=r"longer|fewer than 0|from -1 to 1"):
            schedule(bad, 3, inflection)


def test_weights_and_the_text_side_are_the_authors() -> None:
    assert weight(5, 30) == weight(5, 30, layer=7) == 150
    assert weight(1, 10, layer=2, beta=0.5, gamma=1.0) == 5
    assert [keep_text_side(577, layer) for layer in (0, 5, 11, 12)] == [536, 334, 115, 115]
    assert reference.keep_most_attended(drawn(2, 3, 6).softmax(-1), 4).tolist() == sorted(
        drawn(2, 3, 6).softmax(-1).sum((0, 1)).topk(4).indices.tolist()
    )


def test_importance_that_is_needed_and_not_there_is_refused() -> None:
    for options in ({"weight": 1.0}, {"redundancy": False}):
        with pytest.raises(ValueError, match="needs the importance"):
            match(metric_of(keys_of(1, 8)), None, 2, **options)
