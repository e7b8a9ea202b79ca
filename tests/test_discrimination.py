"""The suite tells methods apart: whatever throws information away loses, here in a small form and in the committed table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from vlmbench.reference import SHIPPED
from vlmbench.reference.build import LLAVA
from vlmbench.reference.discrimination import LENGTHS, LOSSES, MODELS, Loss, measure, rows, to_markdown

COMMITTED = Path(__file__).parents[1] / "results" / "cpu" / "discrimination.json"


@pytest.mark.skipif(not COMMITTED.exists(), reason="not measured yet")
def test_the_committed_table_holds_for_both_models_at_all_lengths() -> None:
    table = json.loads(COMMITTED.read_text())["rows"]
    assert {(row["model"], row["length"]) for row in table} == {(m, length) for m in MODELS for length in LENGTHS}
    for row in table:
        assert row["holds"] == (row["loss"] >= row["least"] and row["loss_low"] > 0)
        assert row["holds"], row
    assert COMMITTED.with_suffix(".md").read_text() == to_markdown(table)


@pytest.mark.parametrize("model", sorted(SHIPPED))
def test_methods_that_throw_information_away_lose(model: str, tmp_path: Path) -> None:
    """66 questions on short videos: enough for the losses that are asked for."""
    short = [replace(loss, lengths=(32,)) for loss in LOSSES if 32 in loss.lengths]
    for loss in short:
        measure(model, loss, 32, tmp_path, limit=66)
    for row in rows(tmp_path, [model], short):
        assert row["holds"], row


def test_a_loss_that_is_not_there_is_seen(tmp_path: Path) -> None:
    """A method that keeps nine tokens in ten loses little, and the table says that the loss it was to show is missing."""
    harmless = Loss("uniform:ratio=0.9", 0.2, lengths=(32,))
    measure(LLAVA, harmless, 32, tmp_path, limit=22)
    (row,) = rows(tmp_path, [LLAVA], [harmless])
    assert row["loss"] < 0.2
    assert not row["holds"]
