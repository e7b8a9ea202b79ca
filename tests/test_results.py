"""What is published is what the code does: the README's table, the committed accuracies, and the harness's own cost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlmbench.publish import insert, machine_texts, table
from vlmbench.tables import COLUMNS

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "results" / "cpu" / "demo.json"


@pytest.fixture(scope="module")
def committed() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(DEMO.read_text())["rows"]
    return rows


def test_the_readme_shows_the_committed_results(committed: list[dict[str, Any]]) -> None:
    text = (ROOT / "README.md").read_text()
    assert insert(text, "demo", table(committed)) == text


def test_bench_tables_show_the_committed_rows() -> None:
    texts = machine_texts(ROOT / "results")
    assert ROOT / "results" / "cpu" / "bench.md" in texts
    for path, text in texts.items():
        assert path.read_text() == text


def test_the_folders_readme_quotes_the_committed_rows() -> None:
    folder = ROOT / "results" / "cpu"
    text = " ".join((folder / "README.md").read_text().split())
    named = {"a_shape": "A-shape", "grid": "Grid", "vs": "Vertical-Slash", "mix": "their mix"}
    for pattern, name in named.items():
        rows = json.loads((folder / f"attention-mm-{pattern}.json").read_text())["rows"]
        low, *_, high = sorted(row["ratio"] / row["pairs_limit"] for row in rows)
        assert f"{low:.2f} to {high:.2f} {'of what its pairs allow ' * (pattern == 'a_shape')}with {name}" in text
    for file, limit in (
        ("attention-A", "pairs"),
        ("attention-B", "pairs"),
        ("vision-turbo", "flops"),
        ("decode-core", "bytes"),
    ):
        ((row, *_),) = (json.loads((folder / f"{file}.json").read_text())["rows"],)
        digits = 1 if limit == "pairs" else 2
        assert f"{row['ratio']:.{digits}f}×" in text, file
        assert f"allow {row[f'{limit}_limit']:.{digits}f}×" in text, file


def test_markers_must_be_there_once() -> None:
    with pytest.raises(ValueError, match="not 0 times"):
        insert("no markers", "demo", "x")


def test_a_fresh_demo_gives_the_committed_accuracies(
    committed: list[dict[str, Any]], cli: Callable[..., Any], tmp_path: Path
) -> None:
    assert cli("run", "--mode", "accuracy", "--out", tmp_path).code == 0
    fresh = {
        (row["method"], row["params"]): row
        for row in json.loads(cli("table", tmp_path, "--format", "json").out)["rows"]
    }
    assert set(fresh) == {(row["method"], row["params"]) for row in committed}
    for row in committed:
        assert set(row) == set(COLUMNS)
        now = fresh[row["method"], row["params"]]
        for name in ("model", "suite", "n", "n_failed", "frames", "n_visual_tokens", "dtype"):
            assert now[name] == row[name]
        # Another processor may round a near tie the other way: one answer of n, no more.
        assert abs(now["accuracy"] - row["accuracy"]) <= 1 / row["n"] + 1e-9


def test_the_harness_costs_no_more_than_it_promises() -> None:
    """The committed measurement, not a fresh one: time is never asserted of the machine that happens to run the tests."""
    rows = json.loads((ROOT / "results" / "cpu" / "overhead.json").read_text())["rows"]
    assert {row["tokens"] for row in rows} == {2, 32}
    for row in rows:
        assert row["other_s"] <= row["bound_s"]
        assert row["difference_s"] <= row["bound_s"]
