"""Pictures hold what the table holds: one point a run, on a front that nothing beats, the same file for the same results."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.test_report import BASE, answered, fill, scaled, timed
from vlmbench.plot import KINDS, _with_full, plot
from vlmbench.plot_figures import Point, front, labels, pareto, scaling, stages
from vlmbench.record import Memory, Pass, SampleRecord
from vlmbench.report import loaded_rows
from vlmbench.store import ResultStore

Cli = Callable[..., Any]
MEMORY: Pass = "memory"


def run(store: ResultStore, method: str, right: int, factor: float = 1.0, size: int = 1, **spec: Any) -> None:
    """One run of 20 questions, `size` times as long a prompt; `factor` times as fast as full attention."""
    base = scaled(BASE, 1 / size)
    rounds = [scaled(base, factor * (1 + 0.02 * (i % 3 - 1))) for i in range(3)]
    held = [SampleRecord(f"s{i}", MEMORY, f"v{i}", "ok", memory=Memory(size << 30, 1, 1)) for i in range(3)]
    records = [*answered([1.0] * right + [0.0] * (20 - right), visual=100 * size), *timed(rounds, [base] * 3), *held]
    fill(store, records, method=method, **spec)


def length(frames: int, **more: Any) -> dict[str, Any]:
    return {"suite_params": {"length": frames, "type": None, **more}}


def fill_all(root: Path) -> Path:
    """Runs for every kind of picture."""
    store = ResultStore(root)
    for size in (1, 4, 12):
        run(store, "full", 18, size=size, **length(32 * size))
        run(store, "pevlm", 17, 1 + size / 4, size=size, **length(32 * size))
        run(store, "uniform", 14, 2 + size / 2, size=size, **length(32 * size))
    for frames in (32, 128):
        for depth in (0.0, 0.5, 1.0):
            run(store, "full", 19, **length(frames, depth=depth))
            run(store, "pevlm", int(19 - 12 * depth), 2.0, **length(frames, depth=depth))
    return root


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tested here is not how well an interval is known."""
    monkeypatch.setattr("vlmbench.stats.RESAMPLES", 100)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill_all(tmp_path_factory.mktemp("plot") / "runs")


@pytest.fixture
def points(filled: Path) -> list[Point]:
    return [Point(loaded, row) for loaded, row in loaded_rows(filled)]


def of(points: list[Point], frames: int) -> list[Point]:
    return [each for each in points if each.length == frames and each.depth is None]


place = st.tuples(st.floats(0.01, 100), st.floats(0, 100))


@given(st.lists(place, min_size=1))
def test_the_front_is_what_none_beats_in_both(places: list[tuple[float, float]]) -> None:
    best = front(places)
    for x, y in places:
        beaten = any(a <= x and b >= y and (a, b) != (x, y) for a, b in places)
        assert beaten != ((x, y) in [places[i] for i in best])
    assert [places[i] for i in best] == sorted(places[i] for i in best)


def test_every_kind_is_drawn_in_both_formats_and_reads_as_a_picture(cli: Cli, filled: Path, tmp_path: Path) -> None:
    done = cli("plot", filled, "--out", tmp_path)
    assert done.code == 0, done.err
    paths = [Path(line) for line in done.out.splitlines()]
    assert {path.name.split("-")[0] for path in paths} == set(KINDS)
    assert sorted(paths) == sorted(tmp_path.iterdir())
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG" if path.suffix == ".png" else b"<?xml")
        if path.suffix == ".svg":
            ElementTree.parse(path)  # noqa: S314 (our own file)


def test_the_same_results_give_the_same_file(filled: Path, tmp_path: Path) -> None:
    once, again = (plot(filled, tmp_path / name, ["needle"]) for name in ("a", "b"))
    assert [path.read_bytes() for path in once] == [path.read_bytes() for path in again]


def test_points_and_intervals_are_the_tables(points: list[Point]) -> None:
    group = of(points, 32)
    (axes,) = pareto(group).axes
    drawn = {each.get_label(): each for each in axes.containers}
    assert set(drawn) == {"full", "pevlm", "uniform"}
    for each in group:
        data, _, bars = drawn[each.name].lines  # type: ignore[attr-defined]
        assert data.get_xydata()[0] == pytest.approx((each.row["e2e_s"], 100 * each.row["accuracy"]))
        (_, low), (_, high) = bars[1].get_segments()[0]
        assert (low, high) == pytest.approx([100 * each.row[f"accuracy_{end}"] for end in ("low", "high")])
        (left, _), (right, _) = bars[0].get_segments()[0]
        dense = next(other.row["e2e_s"] for other in group if other.name == "full")
        spans = [dense / each.row[f"speedup_e2e_{end}"] for end in ("high", "low")]
        assert (left, right) == pytest.approx(spans, rel=0.03)  # the median of ratios is not the ratio of medians
    assert "s a sample" in axes.get_xlabel()
    assert "%" in axes.get_ylabel()


def test_lengths_are_full_attentions_visual_tokens_on_log_axes(points: list[Point]) -> None:
    known = _with_full([each for each in points if each.depth is None])
    latency, memory = scaling(known).axes
    for axes, unit in ((latency, ", s"), (memory, ", GiB")):
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
        assert unit in axes.get_ylabel()
    lines = [list(zip(*map(list, line.get_data()), strict=True)) for line in memory.lines]  # type: ignore[arg-type]
    assert lines == [[(100, 1), (400, 4), (1200, 12)]] * 3


def test_stages_add_up_to_the_whole(points: list[Point]) -> None:
    group = of(points, 32)
    (axes,) = stages(group).axes
    for place_, each in enumerate(group):
        bars: list[Any] = list(axes.patches)
        widths = [bar.get_width() for bar in bars if round(bar.get_y() + bar.get_height() / 2) == place_]
        parts = [record.timing for record in each.run.latency.values() if record.timing]
        assert sum(widths) == pytest.approx(parts[0].e2e_s)


def test_a_label_names_only_what_differs(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    for r in (4, 8):
        run(store, "turbo", 10, method_params={"r": r, "mode": "drop"})
    run(store, "full", 10)
    run(store, "odd$\x1b[31m", 10)
    found = labels([Point(loaded, row) for loaded, row in loaded_rows(tmp_path)])
    assert set(found.values()) == {"full", "turbo:r=4", "turbo:r=8", "odd\\$\N{REPLACEMENT CHARACTER}[31m"}


def test_what_cannot_be_drawn_is_one_sentence(cli: Cli, tmp_path: Path) -> None:
    store = ResultStore(tmp_path / "runs")
    fill(store, answered([1.0]))
    for args, said in (
        (("--kind", "needle"), "has nothing for a needle picture"),
        (("--kind", "pareto"), "accuracy and times of two methods"),
        ((), "has nothing to draw"),
    ):
        done = cli("plot", tmp_path / "runs", "--out", tmp_path / "plots", *args)
        assert (done.code, said in done.err, len(done.err.splitlines())) == (2, True, 1)
    assert not (tmp_path / "plots").exists()
    done = cli("plot", tmp_path / "nowhere")
    assert (done.code, "holds no results" in done.err) == (2, True)
    run(store, "full", 10, dtype="float32")
    run(store, "turbo", 10)
    done = cli("plot", tmp_path / "runs", "--out", tmp_path / "plots")
    assert (done.code, "differ in dtype (" in done.err, "--split" in done.err) == (2, True, False)
    file = tmp_path / "file"
    file.write_text("")
    done = cli("plot", fill_all(tmp_path / "all"), "--out", file / "plots", "--kind", "stages")
    assert (done.code, "cannot be written" in done.err) == (1, True)


def test_a_run_without_intervals_is_drawn_without_bars(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    for method in ("full", "turbo"):
        fill(store, [*answered([1.0, 0.0]), *timed([dataclasses.replace(BASE)], [BASE], n=2)], method=method)
    assert {path.name.split("-")[0] for path in plot(tmp_path, tmp_path / "plots", formats=["svg"])} == {
        "pareto",
        "stages",
    }
