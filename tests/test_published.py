"""Published numbers name their source and standing, stand beside ours, and change none of ours."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.test_report import answered, fill
from vlmbench.published import STANDINGS, beside, read
from vlmbench.store import ResultStore
from vlmbench.tables import COLUMNS

Cli = Callable[..., Any]
ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "results" / "published.yaml"
ROW = "method: pevlm, model: m, task: suite, metric: accuracy, value: 50, unit: '%', source: paper, standing: paper"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    store = ResultStore(tmp_path / "runs")
    fill(store, answered([1.0] * 9 + [0.0]))
    fill(store, answered([1.0] * 8 + [0.0] * 2), method="pevlm", method_params={"sink": 8})
    return store.root


def written(tmp_path: Path, rows: str, head: str = "schema: 1\nsources: {paper: A paper}\n") -> Path:
    path = tmp_path / "published.yaml"
    path.write_text(f"{head}rows:\n{rows}")
    return path


def test_every_committed_number_has_its_source_and_standing() -> None:
    rows = read(FILE)
    assert {row["method"] for row in rows} == {"pevlm", "mminference", "turbo", "memvp", "corematching"}
    assert {row["standing"] for row in rows} == set(STANDINGS)
    assert all(row["source"] and row.get("column", "accuracy") in COLUMNS for row in rows)
    named = [(row["method"], row["model"], row["task"], row["metric"], row["source"]) for row in rows]
    assert len(set(named)) == len(named)


def test_the_ways_to_know_a_number_are_not_mixed_up() -> None:
    """What could not be seen at the source is never called read there."""
    for row in read(FILE):
        if row["method"] == "memvp":
            assert row["standing"] == "second-hand"  # the paper's body could not be had
        if row["standing"] == "paper":
            assert "summar" not in row["source"]


def test_published_rows_stand_beside_ours_and_ours_stay_as_they_are(cli: Cli, folder: Path) -> None:
    plain = cli("table", folder).out
    text = cli("table", folder, "--published", FILE).out
    assert text.startswith(plain.rstrip("\n"))
    below = text[len(plain.rstrip("\n")) :]
    assert "| `pevlm` | published | not verified; LongVideoBench | accuracy under a latency limit | 61.03 % |" in below
    assert "| `pevlm:sink=8` | here | tiny-llava-ov; colours:length=32 | accuracy | 80 % |  | measured here |" in below
    assert "mminference" not in below  # not in the folder
    data = json.loads(cli("table", folder, "--published", FILE, "--format", "json").out)
    jsonschema.validate(data, json.loads((ROOT / "docs" / "schema" / "table.schema.json").read_text()))
    assert data["rows"] == json.loads(cli("table", folder, "--format", "json").out)["rows"]
    assert {row["method"] for row in data["published"]} == {"pevlm"}


def test_a_file_of_ones_own_will_do(tmp_path: Path, folder: Path, cli: Cli) -> None:
    path = written(tmp_path, f"  - {{{ROW}, full: 60, column: accuracy, note: '<b> a note'}}\n")
    text = cli("table", folder, "--published", path).out
    assert "| 50 % | 60 % | read in the paper |" in text
    assert "- accuracy on suite: &lt;b> a note" in text
    assert beside(read(path), []) == []


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("  - 3\n", "row 0 is no mapping"),
        ("  - {method: pevlm}\n", "row 0 lacks model"),
        (f"  - {{{ROW.replace('50', 'many')}}}\n", "has value: 'many'"),
        (f"  - {{{ROW.replace('standing: paper', 'standing: sure')}}}\n", "standing 'sure', not one of paper, code"),
        (f"  - {{{ROW.replace('source: paper', 'source: hearsay')}}}\n", "'hearsay', which sources do not name"),
        (f"  - {{{ROW}, column: speed}}\n", "column 'speed', which no table has"),
        (f"  - {{{ROW}, colum: x}}\n", "has the unknown colum"),
        ("  - {\n", "cannot be read"),
        ("  - !!python/object/apply:os.system [ls]\n", "cannot be read"),  # a safe loader makes no objects
    ],
)
def test_a_malformed_file_is_one_sentence(cli: Cli, tmp_path: Path, folder: Path, rows: str, said: str) -> None:
    done = cli("table", folder, "--published", written(tmp_path, rows))
    assert (done.code, done.out, said in done.err, len(done.err.splitlines())) == (2, "", True, 1), done.err


def test_what_is_no_such_file_is_one_sentence(cli: Cli, tmp_path: Path, folder: Path) -> None:
    assert "cannot be read" in cli("table", folder, "--published", tmp_path / "none.yaml").err
    path = written(tmp_path, "  - {}\n", head="schema: 2\n")
    assert "of schema 1" in cli("table", folder, "--published", path).err
    done = cli("table", folder, "--published", FILE, "--format", "csv")
    assert (done.code, "leave --layout out, and csv" in done.err) == (2, True)
