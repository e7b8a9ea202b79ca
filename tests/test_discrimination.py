"""The suite tells methods apart: whatever throws information away loses (here on short videos, in a small form)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from vlmbench.reference import SHIPPED
from vlmbench.reference.build import LLAVA
from vlmbench.reference.discrimination import LOSSES, Loss, measure, measured_on, rows, to_markdown, verdict


@pytest.mark.parametrize("model", sorted(SHIPPED))
def test_methods_that_throw_information_away_lose(model: str, tmp_path: Path) -> None:
    """66 questions on short videos: enough for the losses that are asked for."""
    short = [replace(loss, lengths=(32,)) for loss in LOSSES if 32 in loss.lengths]
    for loss in short:
        measure(model, loss, 32, tmp_path, limit=66)
    table = rows(tmp_path, [model], short)
    for row in table:
        assert row["holds"] == (row["loss"] >= row["least"] and row["loss_low"] > 0)
        assert row["holds"], row
    assert to_markdown({"rows": table}).count("| MISSING |") == 0
    (said,) = measured_on(tmp_path, [model])
    assert "threads; vlmbench" in said
    assert said in to_markdown({"rows": table, "measured_on": [said]})


@pytest.mark.parametrize(
    ("least", "low", "high", "said"),
    [
        (0.2, 0.2, 0.4, "held"), (0.2, 0.1, 0.4, "open"), (0.2, 0.05, 0.1, "MISSING"), (0.2, -0.1, 0.4, "MISSING"),
        (0.0, 0.01, 0.2, "held"), (0.0, -0.1, 0.2, "open"), (0.0, -0.2, 0.0, "MISSING"),
    ],
)  # fmt: skip
def test_a_loss_is_held_only_when_its_whole_interval_is(least: float, low: float, high: float, said: str) -> None:
    assert verdict({"least": least, "loss_low": low, "loss_high": high}) == said


def test_a_loss_that_is_not_there_is_seen(tmp_path: Path) -> None:
    """A method that keeps nine tokens in ten loses little, and the table says that the loss it was to show is missing."""
    harmless = Loss("uniform:ratio=0.9", 0.2, lengths=(32,))
    measure(LLAVA, harmless, 32, tmp_path, limit=22)
    (row,) = rows(tmp_path, [LLAVA], [harmless])
    assert row["loss"] < 0.2
    assert not row["holds"]


def test_the_committed_table_shows_every_loss_at_every_length() -> None:
    folder = Path(__file__).parents[1] / "results" / "cpu"
    data = json.loads((folder / "discrimination.json").read_text())
    table = data["rows"]
    assert (folder / "discrimination.md").read_text() == to_markdown(data)
    told = {(row["model"], row["method"], row["length"]) for row in table}
    for model in SHIPPED:
        for loss in LOSSES:
            name = loss.method + (f" --frames {loss.frames}" if loss.frames else "")
            assert {(model, name, length) for length in loss.lengths} <= told
    assert [row for row in table if not row["holds"]] == []
