"""Time against density: where a curve breaks even, what the report says of it, and that the command can be rehearsed."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer import Typer
from typer.testing import CliRunner

from vlmbench import density
from vlmbench.errors import RunError


def timed(ratio: float | None, pairs_limit: float | None = 4.0, **more: Any) -> dict[str, Any]:
    """A row as `bench` gives it."""
    known = {"ratio": ratio, "ratio_low": ratio and ratio * 0.9, "ratio_high": ratio and ratio * 1.1}
    other = {"pairs_limit": pairs_limit, "dense_rounds_s": [1.0] * 3, "marks": ["cpu"], "tokens": 4096, "device": "cpu"}
    return known | other | {"dtype": "float32", "heads": 4, "kv_heads": 2, "head_dim": 128} | more


def points(over: str, *pairs: tuple[float, float | None]) -> list[dict[str, Any]]:
    return [{over: x, "time": time} for x, time in pairs]


def test_a_row_is_time_over_dense_time_at_its_density() -> None:
    row = density.row(timed(2.0, 4.0), "grid", 0.5)
    assert (row["density"], row["time"], row["share"]) == (0.25, 0.5, 0.5)
    assert row["time_low"] == pytest.approx(1 / 2.2)
    assert row["time_high"] == pytest.approx(1 / 1.8)
    empty = density.row(timed(None, None), "grid", 0.5)
    assert (empty["density"], empty["time"], empty["share"]) == (None, None, None)


def test_break_even_lies_between_what_was_timed() -> None:
    at, faster = density.densest(points("density", (0.6, 2.0), (0.2, 0.5), (0.9, None)))
    assert at == pytest.approx(0.4)  # halfway in the logarithm of time
    assert faster == "up to"
    at, faster = density.shortest(points("tokens", (1000, 2.0), (4000, 0.5)))
    assert at == pytest.approx(2000)
    assert faster == "from"


def test_a_curve_that_goes_back_and_forth_promises_only_what_holds() -> None:
    at, _ = density.densest(points("density", (0.1, 0.5), (0.3, 2.0), (0.5, 0.5), (0.7, 2.0)))
    assert at is not None
    assert at < 0.3
    at, _ = density.shortest(points("tokens", (1000, 0.5), (2000, 2.0), (4000, 0.5)))
    assert at is not None
    assert at > 2000


@pytest.mark.parametrize(("time", "said"), [(0.5, "everywhere"), (2.0, "nowhere"), (None, "untimed")])
def test_without_a_crossing_nothing_is_made_up(time: float | None, said: str) -> None:
    assert density.densest(points("density", (0.2, time), (0.5, time))) == density.BreakEven(None, said)


def test_without_a_density_a_row_is_no_point_of_that_curve() -> None:
    rows = [{"density": None, "time": 0.5}, *points("density", (0.2, 0.5), (0.6, 2.0))]
    assert density.densest(rows).at == pytest.approx(0.4)


def test_a_row_that_fails_is_one_sentence_and_keeps_what_was_timed(tmp_path: Path, monkeypatch: Any) -> None:
    def bench(op: str, spec: str, shape: Any, **options: Any) -> dict[str, Any]:
        if "pattern=vs" in spec:
            raise RunError("A row is wrong.")
        return timed(2.0)

    monkeypatch.setattr(density.bench, "bench", bench)
    out = tmp_path / "kernels.json"
    options = ["--tokens", "400", "--pattern", "grid/vs", "--budget", "1", "--device", "cpu", "--out", str(out)]
    done = CliRunner().invoke(command(), options)
    assert str(done.exception) == "A row is wrong."
    assert [row["pattern"] for row in json.loads(out.read_text(encoding="utf-8"))["rows"]] == ["grid"]


def test_a_budget_that_adds_no_pairs_is_no_point_of_the_curve() -> None:
    limits = iter((8.0, 2.0, 1.0, 1.0))
    rows = density.curve(
        "vs", (4.0, 0.25, 1.0, 2.0), SimpleNamespace(frame_tokens=64), lambda spec: timed(1.0, next(limits))
    )
    assert [row["budget"] for row in rows] == [0.25, 1.0, 2.0]


def test_the_report_says_where_each_pattern_breaks_even_and_leaves_rehearsals_out() -> None:
    rows = [
        density.row(timed(ratio, limit, tokens=tokens), "grid", budget)
        for ratio, limit, tokens, budget in ((2.0, 8.0, 4096, 0.5), (0.5, 2.0, 4096, 2.0), (4.0, 8.0, 16384, 0.5))
    ]
    text = density.to_markdown({"rows": rows})
    assert "- 4096 tokens: faster up to a density of 0.31" in text
    assert "- 16384 tokens: faster at everything that was timed" in text
    assert "- budget 2: faster at nothing that was timed" in text
    assert "| 4096 | 0.5 | 0.125 | 0.500 [0.455, 0.556] | 2.00 | 0.25 | cpu |" in text
    smoke = [row | {"marks": ["cpu", "smoke"]} for row in rows]
    assert "Nothing was timed." in density.to_markdown({"rows": smoke})


def test_rows_of_a_gpus_workloads_are_points_of_the_same_curves(tmp_path: Path) -> None:
    """Published sizes from gpu-mm and other budgets from gpu-density; whatever else is there is none."""
    params = {"pattern": "grid", "boundary": "none", "budget": 1.0}
    points = [
        timed(ratio, limit, op="attention", params=params | {"budget": budget}, workload=name, shape=None, dense_s=1.0)
        for name, budget, ratio, limit in (
            ("gpu-mm-grid-64k", 1.0, 2.0, 8.0),
            ("gpu-density-grid-64k-4", 4.0, 0.5, 2.0),
        )
    ]
    other = [
        points[0] | {"op": "prefill"},
        points[0] | {"params": {"sink": 4}},
        points[0] | {"params": params | {"boundary": "q"}},
    ]
    rows = density.of_bench([*reversed(points), *other])
    assert [(row["budget"], row["density"]) for row in rows] == [(1.0, 0.125), (4.0, 0.5)]
    assert "faster up to a density of 0.31" in density.to_markdown({"file": "rows.jsonl", "rows": rows})
    assert "Written from `rows.jsonl`" in density.to_markdown({"file": "rows.jsonl", "rows": rows})


def command() -> Typer:
    app = Typer()
    app.command()(density.main)
    return app


def test_the_command_can_be_rehearsed(tmp_path: Path) -> None:
    """Real rows of two patterns, each compared with float64 before it is timed."""
    options = (
        "--tokens 400 --pattern grid/vs --budget 0.5/4 --frame-tokens 16 --head-dim 32 --rounds 1 --smoke --device cpu"
    )
    done = CliRunner().invoke(command(), [*options.split(), "--out", str(tmp_path / "kernels.json")])
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "kernels.json").read_text(encoding="utf-8"))["rows"]
    assert {row["pattern"] for row in rows} == {"grid", "vs"}
    assert all(0 < row["density"] <= 1 and row["time"] > 0 and "smoke" in row["marks"] for row in rows)
    assert set(rows[0]) >= set(density.COLUMNS)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--pattern ring", "--pattern must be of"),
        ("--budget half", "not 'half'"),
        ("--budget 0/1", "not '0/1'"),
        ("--tokens 3", "--tokens must be"),
        ("--heads 3", "multiple"),
    ],
)
def test_what_cannot_be_timed_is_one_sentence(options: str, words: str) -> None:
    done = CliRunner().invoke(command(), [*options.split(), "--device", "cpu"])
    assert done.exit_code != 0
    assert words in str(done.exception)
