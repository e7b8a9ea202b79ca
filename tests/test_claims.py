"""PEVLM's claims in miniature: every verdict follows from its numbers, nothing is run twice, what is missing is said."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmbench import claims
from vlmbench.claims_accuracy import BLOCK, BLOCKS, SINKS, _loss_more
from vlmbench.claims_study import Answers, Scale, accuracies, asks, contrast, difference
from vlmbench.claims_text import PARTS, to_markdown
from vlmbench.claims_text_accuracy import _largest
from vlmbench.claims_verdict import Verdict, above, idle, near
from vlmbench.errors import UsageError
from vlmbench.publish import machine_texts
from vlmbench.record import SampleRecord
from vlmbench.suite import Sample
from vlmbench.suites.synthvideo import SynthVideo

SMALL = Scale(lengths=(32,), limit=2, timed=1, repeats=1, latency_limit_s=100.0, longest_prefill_s=1e-9, threads=1)
"""Everything once, on a model with random weights: what is tested is what is done with the numbers."""
MODEL = "mini-qwen2.5-vl@random"


class Measured(NamedTuple):
    runs: Path
    out: Path

    @property
    def data(self) -> dict[str, Any]:
        data: dict[str, Any] = json.loads((self.out / "pevlm.json").read_text())
        return data

    def rows(self, part: str) -> list[dict[str, Any]]:
        return [row for row in self.data["rows"] if row["part"] == part]


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SynthVideo, "max_new_tokens", 2)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    folder = tmp_path_factory.mktemp("claims")
    found = Measured(folder / "runs", folder / "out")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(SynthVideo, "max_new_tokens", 2)
        claims.measure([MODEL], list(PARTS), found.runs, found.out, SMALL)
    return found


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.name != "header.json" and path.is_file()}


# Verdicts.

ends = st.floats(-1, 1)


@given(st.tuples(ends, ends, ends).map(sorted), ends)
def test_held_and_denied_are_what_the_whole_interval_says(values: list[float], least: float) -> None:
    low, value, high = values
    row = {"x": value, "x_low": low, "x_high": high}
    verdict = above(row, "x", least)
    assert (verdict is Verdict.HELD) == all(each > least for each in values)
    assert (verdict is Verdict.FAILED) == all(each < least for each in values)
    turned = above({"x": -value, "x_low": -high, "x_high": -low}, "x", -least)
    other = {Verdict.HELD: Verdict.FAILED, Verdict.FAILED: Verdict.HELD, Verdict.OPEN: Verdict.OPEN}
    assert turned is other[verdict]


@given(st.tuples(ends, ends, ends).map(sorted))
def test_two_points_and_five_points_are_both_asked(values: list[float]) -> None:
    low, value, high = values
    verdict = near({"x": value, "x_low": low, "x_high": high}, "x", 0.02, 0.05)
    assert (verdict is Verdict.HELD) == (value >= -0.02 and low > -0.05)
    assert (verdict is Verdict.FAILED) == (high < -0.02)


def test_without_an_interval_nothing_is_decided_and_without_a_value_nothing_is_measured() -> None:
    for verdict in (above, lambda row, name: near(row, name, 0.02, 0.05)):
        assert verdict({"x": 0.9, "x_low": None, "x_high": None}, "x") is Verdict.OPEN
        assert verdict({"x": None, "x_low": None, "x_high": None}, "x") is Verdict.MISSING


# Numbers.


def record(id_: str, score: float, **more: Any) -> SampleRecord:
    return SampleRecord(id_, "accuracy", more.pop("cluster", id_), more.pop("status", "ok"), score=score, **more)


def answered(*scores: float) -> dict[str, SampleRecord]:
    return {str(i): record(str(i), score) for i, score in enumerate(scores)}


@given(st.lists(st.tuples(*[st.integers(0, 1)] * 4), min_size=1, max_size=12))
def test_what_cuts_cost_is_the_difference_of_two_differences(scores: list[tuple[int, ...]]) -> None:
    own_few, full_few, own_many, full_many = (answered(*each) for each in zip(*scores, strict=True))
    none, many = (
        Answers([], {"pevlm": own, "full": full}, {}) for own, full in ((own_few, full_few), (own_many, full_many))
    )
    ids = list(own_few)
    found = _loss_more(none, many, "pevlm", ids, ids)
    expected = sum((c - d) - (a - b) for a, b, c, d in scores) / len(scores)
    assert found["effect"] == pytest.approx(expected)
    assert found["effect_low"] <= found["effect"] <= found["effect_high"]


def test_a_contrast_is_of_means_over_settings() -> None:
    one, two, three = answered(1, 1, 0), answered(1, 0, 0), answered(0, 0, 0)
    found = contrast("effect", [one, two], [three], list(one))
    assert found["effect"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert contrast("effect", [one], [one], list(one))["effect"] == 0


def test_what_failed_is_wrong_and_counted() -> None:
    own = {"a": record("a", 1), "b": record("b", 1, status="oom"), "c": record("c", 0, applied=False)}
    found = accuracies(own, list(own))
    assert (found["n"], found["n_failed"], found["n_inactive"]) == (3, 1, 1)
    assert found["accuracy"] == pytest.approx(1 / 3)
    assert difference("delta", own, answered_as(own, 1), list(own))["delta"] == pytest.approx(-2 / 3)


def answered_as(like: dict[str, SampleRecord], score: float) -> dict[str, SampleRecord]:
    return {id_: record(id_, score) for id_ in like}


def test_every_question_is_of_order_or_not() -> None:
    kinds = ("colour", "count", "first", "after", "list", "which_first")
    assert [kind for kind in kinds if asks("order", kind)] == ["first", "after", "list", "which_first"]
    assert all(asks("order", kind) != asks("other", kind) and asks("all", kind) for kind in kinds)


@pytest.mark.parametrize(("length", "questions"), [(16, 132), (32, 132), (64, 66), (384, 33), (3072, 33)])
def test_longer_videos_are_asked_less_unless_a_limit_is_given(length: int, questions: int) -> None:
    assert Scale().questions(length) == questions
    assert Scale(limit=7).questions(length) == 7


# The command.


def test_every_part_has_its_rows_its_table_and_its_verdicts(measured: Measured) -> None:
    text = (measured.out / "pevlm.md").read_text()
    sections = dict(zip(PARTS, text.split("\n## ")[1:-1], strict=True))
    for name, part in PARTS.items():
        assert measured.rows(name), name
        assert sections[name].startswith(part.title)
        assert "| ---" in sections[name]
        assert any(f"- **{verdict}**" in sections[name] for verdict in Verdict)
        assert f"{name} of {MODEL}" in text.rpartition("## Measured on")[2]
    assert text == to_markdown(measured.data)


def test_a_second_call_runs_nothing_and_writes_the_same(measured: Measured) -> None:
    before = files(measured.runs), files(measured.out)
    claims.measure([MODEL], list(PARTS), measured.runs, measured.out, SMALL)
    assert (files(measured.runs), files(measured.out)) == before


def test_one_part_leaves_the_others_as_they_were(measured: Measured, tmp_path: Path) -> None:
    (tmp_path / "pevlm.json").write_text(json.dumps(measured.data))
    claims.measure([MODEL], ["better"], measured.runs, tmp_path, Scale(lengths=(32,), limit=1, threads=1))
    after = json.loads((tmp_path / "pevlm.json").read_text())

    def others(data: dict[str, Any]) -> list[Any]:
        return [row for row in data["rows"] if row["part"] != "better"]

    assert others(after) == others(measured.data)
    assert {row["n"] for row in after["rows"] if row["part"] == "better" and row["kind"] == "group"} == {1}


def test_a_model_that_is_not_shipped_is_said_and_measures_nothing(
    measured: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "SHIPPED", {})
    data = claims.measure(["tiny-qwen2.5-vl"], list(PARTS), tmp_path / "runs", tmp_path, SMALL)
    assert data["rows"] == []
    text = (tmp_path / "pevlm.md").read_text()
    assert "`tiny-qwen2.5-vl` is not shipped in this checkout: nothing of it is measured." in text
    assert text.count("**tiny-qwen2.5-vl**: not measured.") == len(PARTS)
    assert not (tmp_path / "runs").exists()


def test_rows_of_other_weights_of_the_same_name_are_dropped(measured: Measured, tmp_path: Path) -> None:
    data = measured.data
    data["models"][0]["weights_hash"] = "other"
    (tmp_path / "pevlm.json").write_text(json.dumps(data))
    after = claims.measure([MODEL], ["better"], measured.runs, tmp_path, SMALL)
    assert {row["part"] for row in after["rows"]} == {row["part"] for row in after["measured_on"]} == {"better"}


def test_what_cannot_be_asked_for_is_a_sentence(tmp_path: Path) -> None:
    def refused(**more: Any) -> str:
        given_ = {
            "model": ["none"],
            "part": None,
            "limit": None,
            "length": None,
            "runs": tmp_path,
            "out": tmp_path,
        } | more
        rest: dict[str, Any] = {"timed": 6, "latency_limit": 1.0, "longest_prefill": 1.0, "threads": None}
        with pytest.raises(UsageError) as raised:
            claims.main(**(rest | given_))
        return str(raised.value)

    assert refused(part=["ladder,grids"]).endswith("not 'grids'. Did you mean 'grid'?")
    assert "--length must be at least 16 frames, two blocks of PEVLM, not 8" in refused(length=[8, 32])
    assert "--limit must be above 0, not 0" in refused(limit=0)
    (tmp_path / "pevlm.json").write_text("{")
    assert "cannot be read" in refused()


# What the parts measure.


def test_the_ladder_climbs_from_blocks_of_tokens_that_end_in_a_frame_to_pevlm(measured: Measured) -> None:
    """On M-RoPE there is a rung below: all axes flattened, as the authors' prototype did."""
    rows = [row for row in measured.rows("ladder") if row["questions"] == "all"]
    assert [row["step"] for row in rows] == ["0, axes flattened", "0", "1", "2", "3"]
    blocks = rows[2]["method"]
    assert [row["method"] for row in rows] == [
        f"{blocks},positions=reused-1d",
        f"{blocks},positions=reused",
        blocks,
        f"pevlm:sink=0,block={BLOCK}",
        "pevlm",
    ]
    tokens = int(blocks.rpartition("=")[2])
    a_frame = tokens * 2 / (2 * BLOCK + 1)
    assert a_frame == round(a_frame)
    assert tokens % a_frame == a_frame / 2
    assert [row["gain"] is None for row in rows] == [True, False, False, False, False]


def test_a_step_on_which_the_method_had_nothing_to_do_is_not_judged(measured: Measured) -> None:
    """Sixteen units of Qwen-VL are one block of the default, which equals full attention: that is no gain of the sink's."""
    (last,) = [row for row in measured.rows("ladder") if (row["step"], row["questions"]) == ("3", "all")]
    assert idle(last)
    assert "- **Not judged**: at 32 frames, frames in the sink: one side had nothing to do" in to_markdown(
        measured.data
    )


def test_the_grid_has_every_setting_and_its_pairs(measured: Measured) -> None:
    cells = [row for row in measured.rows("grid") if (row["kind"], row["questions"]) == ("cell", "all")]
    assert [(row["sink"], row["block"]) for row in cells] == [(s, b) for s in SINKS for b in BLOCKS]
    assert all(0 < row["pairs_relative"] <= 1 for row in cells)
    assert {row["pairs_relative"] == 1 for row in cells if row["n_inactive"]} == {True}


def test_the_machine_stops_where_the_next_length_would_take_too_long(measured: Measured) -> None:
    *_, full, own, end = measured.rows("lengths")
    assert (full["length"], own["length"], end["length"], end["reason"]) == (32, 32, 64, "slow")
    assert end["predicted_s"] == pytest.approx(4 * full["prefill_s"])
    assert full["speedup_prefill"] == 1


def test_under_a_limit_that_all_meet_each_method_sees_all_frames(measured: Measured) -> None:
    rows = measured.rows("latency")
    assert {row["frames"] for row in rows} == {32}
    assert rows[0]["delta"] == 0
    assert "**Open**: in that time PEVLM sees more frames than full attention: 32 against 32" in to_markdown(
        measured.data
    )


def test_who_may_keep_a_videos_keys_gives_the_same_tokens(measured: Measured) -> None:
    rows = {row["method"]: row for row in measured.rows("questions")}
    assert {method for method, row in rows.items() if row["reuse"]} == {"full", "pevlm", "block", "ape", "star"}
    assert rows["random:ratio=0.25"]["same_tokens"] is None


# What the text says of other numbers.


def told(measured: Measured, part: str, **numbers: Any) -> str:
    """The part's sentences when every row has these numbers, where it has such a column, and nothing was inactive."""
    data = deepcopy(measured.data)
    for row in data["rows"]:
        row |= {key: value for key, value in ({"n_inactive": 0} | numbers).items() if key in row}
    own = next(each for name, each in zip(PARTS, to_markdown(data).split("\n## ")[1:], strict=False) if name == part)
    return "\n".join(line for line in own.splitlines() if line.startswith("- **"))


def interval(name: str, low: float, value: float, high: float) -> dict[str, float]:
    return {f"{name}_low": low, name: value, f"{name}_high": high}


@pytest.mark.parametrize(
    ("part", "name", "held", "denied"),
    [
        ("ladder", "gain", (0.1, 0.2, 0.3), (-0.3, -0.2, -0.1)),
        ("rivals", "delta", (0.1, 0.2, 0.3), (-0.3, -0.2, -0.1)),
        ("cuts", "effect", (-0.04, 0.0, 0.1), (-0.3, -0.2, -0.1)),
        ("latency", "delta", (0.1, 0.2, 0.3), (-0.3, -0.2, -0.1)),
        ("speed", "share", (0.81, 0.9, 0.95), (0.5, 0.6, 0.79)),
        ("speed", "delta", (-0.04, -0.01, 0.02), (-0.09, -0.05, -0.03)),
        ("questions", "speedup_e2e", (1.1, 1.2, 1.3), (0.7, 0.8, 0.9)),
    ],
)
def test_other_numbers_give_another_sentence(
    measured: Measured, part: str, name: str, held: tuple[float, ...], denied: tuple[float, ...]
) -> None:
    good, bad = (told(measured, part, **interval(name, *numbers)) for numbers in (held, denied))
    assert good.count(f"- **{Verdict.HELD}**") > bad.count(f"- **{Verdict.HELD}**")
    assert bad.count(f"- **{Verdict.FAILED}**") > good.count(f"- **{Verdict.FAILED}**")


def test_an_effect_of_either_sign_makes_accuracy_depend_on_a_parameter(measured: Measured) -> None:
    for numbers in ((0.1, 0.2, 0.3), (-0.3, -0.2, -0.1)):
        assert (
            told(measured, "grid", **interval("effect", *numbers)).count("**Held**") == 4
        )  # two parameters, all and order
    assert "**Held**" not in told(measured, "grid", **interval("effect", -0.1, 0.1, 0.3))


def test_better_needs_more_than_the_chance_of_many_groups(measured: Measured) -> None:
    won = {"only_own": 9, "only_full": 1}
    assert "**Held**" in told(measured, "better", p=0.001, **won)
    assert "**Open**" in told(measured, "better", p=0.04, **won)
    lost = {"only_own": 1, "only_full": 9} | interval("delta", -0.5, -0.4, -0.3)
    assert "**Did not hold**" in told(measured, "better", p=0.001, **lost)


@pytest.mark.parametrize(("first", "verdict"), [(0, Verdict.FAILED), (1, Verdict.FAILED), (2, Verdict.HELD)])
def test_the_largest_gain_needs_intervals_that_do_not_overlap(first: int, verdict: Verdict) -> None:
    apart = [interval("gain", 0.1 * i, 0.1 * i + 0.03, 0.1 * i + 0.05) for i in range(3)]
    assert _largest(apart[first], apart[:first] + apart[first + 1 :]) is verdict
    wide = [interval("gain", 0.1 * i, 0.1 * i + 0.03, 0.1 * i + 0.25) for i in range(3)]
    assert _largest(wide[first], wide[:first] + wide[first + 1 :]) is Verdict.OPEN


def test_two_models_best_settings_stand_side_by_side(measured: Measured) -> None:
    data = measured.data
    data["models"].append({"model": "b", "weights_hash": "b"})
    data["rows"] += [{**row, "model": "b"} for row in measured.rows("grid")]
    assert "the same setting for all models." in to_markdown(data)
    next(r for r in data["rows"] if (r["model"], r.get("sink"), r.get("block")) == ("b", 16, 32))["accuracy"] = 2.0
    assert "not the same setting for all models." in to_markdown(data)


def test_published_claims_are_made_from_their_rows(measured: Measured, tmp_path: Path) -> None:
    """`make tables` writes them, and the test of committed results compares them, from the day they are committed."""
    folder = tmp_path / "cpu"
    folder.mkdir()
    (folder / "pevlm.json").write_text(json.dumps(measured.data))
    assert machine_texts(tmp_path) == {folder / "pevlm.md": (measured.out / "pevlm.md").read_text()}


def test_answers_are_of_the_questions_in_order() -> None:
    kinds = ("first", "colour", "list")
    asked = [Sample(kind, kind, (), "", "", "", {"type": kind}) for kind in kinds]
    found = Answers(asked, {}, {})
    assert (found.ids(), found.ids("order"), found.ids("other")) == (list(kinds), ["first", "list"], ["colour"])
