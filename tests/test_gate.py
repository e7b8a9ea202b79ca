"""``gate`` fails only on what the data prove, says when they prove nothing, and refuses what cannot be compared."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml  # type: ignore[import-untyped]
from hypothesis import given
from hypothesis import strategies as st

from tests.test_report import BASE, answered, fill, scaled, timed
from vlmbench.gate import measured, verdict
from vlmbench.stats import Estimate
from vlmbench.store import ResultStore

Cli = Callable[..., Any]
DOCS = Path(__file__).resolve().parents[1] / "docs"
RIGHT = [1.0] * 80 + [0.0] * 20


def schema(name: str) -> Any:
    return json.loads((DOCS / "schema" / f"{name}.schema.json").read_text())


def results(root: Path, factor: float = 1.5, n: int = 10, scores: Any = RIGHT, jitter: float = 0.01) -> Path:
    """Full attention and `turbo`, which is `factor` faster, give or take `jitter`, on each of `n` videos."""
    store = ResultStore(root)
    fill(store, [*answered(RIGHT), *timed([BASE], [BASE], n=n)])
    records = [timed([scaled(BASE, factor * (1 + jitter * (i % 5 - 2)))], [BASE], n=n)[i] for i in range(n)]
    fill(store, [*answered(scores), *records], method="turbo", method_params={"r": 8, "mode": "drop"})
    return root


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tested here is not how well an interval is known."""
    monkeypatch.setattr("vlmbench.stats.RESAMPLES", 200)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return results(tmp_path / "runs")


# The verdict.


@pytest.mark.parametrize(
    ("estimate", "floor", "said"),
    [
        ((1.50, 1.49, 1.51), 1.4, "pass"),
        ((1.50, 1.49, 1.51), 1.505, "pass"),  # narrow, and not wholly below
        ((1.50, 1.49, 1.51), 1.52, "fail"),
        ((1.50, 1.20, 1.80), 1.4, "inconclusive"),
        ((1.50, 1.20, 1.80), 1.1, "pass"),  # wide, but wholly above
        ((1.50, 1.20, 1.80), 1.9, "fail"),  # wide, but wholly below
        ((9.0, None, None), 1.0, "inconclusive"),  # too few videos prove nothing, however fast
    ],
)
def test_only_a_whole_interval_below_the_floor_fails(estimate: Any, floor: float, said: str) -> None:
    assert verdict(Estimate(*estimate), floor, relative=True) == said


@given(st.floats(0.1, 10), st.floats(0, 1), st.floats(0, 1), st.floats(0.1, 10))
def test_what_reaches_the_floor_never_fails(value: float, below: float, above: float, floor: float) -> None:
    estimate = Estimate(value, value * (1 - below), value * (1 + above))
    said = verdict(estimate, floor, relative=True)
    assert said != "fail" or value < floor
    assert (said == "fail") == (estimate.high is not None and estimate.high < floor)


def test_exit_codes_are_the_contracts(cli: Cli, folder: Path, tmp_path: Path) -> None:
    assert cli("gate", folder, "--min-speedup", "turbo=1.4").code == 0
    assert cli("gate", folder, "--min-speedup", "turbo=1.6").code == 1
    noisy = results(tmp_path / "noisy", jitter=0.2)
    assert cli("gate", noisy, "--min-speedup", "turbo=1.5").code == 3
    assert cli("gate", noisy, "--min-speedup", "turbo=1.5", "--min-speedup", "turbo=9").code == 1
    assert cli("gate", tmp_path / "nowhere", "--min-speedup", "turbo=1.5").code == 2
    few = results(tmp_path / "few", n=5)
    assert cli("gate", few, "--min-speedup", "turbo=1.1").code == 3


def test_a_loss_of_accuracy_fails_and_running_out_of_memory_is_one(cli: Cli, tmp_path: Path) -> None:
    drop = ("--max-accuracy-drop", "turbo=0.1")
    assert cli("gate", results(tmp_path / "same"), *drop).code == 0
    assert cli("gate", results(tmp_path / "worse", scores=[1.0] * 50 + [0.0] * 50), *drop).code == 1
    assert cli("gate", results(tmp_path / "oom", scores=["oom"] * 30 + RIGHT[30:]), *drop).code == 1


def test_a_method_is_named_by_its_spec(cli: Cli, folder: Path) -> None:
    for name in ("turbo", "turbo:r=8", "turbo:mode=drop,r=8"):
        assert cli("gate", folder, "--min-speedup", f"{name}=1.4").code == 0
    done = cli("gate", folder, "--min-speedup", "turbo:r=9=1.4")
    assert done.code == 2
    assert "names turbo:r=9, which the folder does not hold; it holds turbo:r=8,mode=drop" in done.err


def test_the_span_is_end_to_end_unless_others_are_named(cli: Cli, folder: Path) -> None:
    found = json.loads(cli("gate", folder, "--min-speedup", "turbo=1", "--format", "json").out)
    assert [row["metric"] for row in found["rows"]] == ["speedup_e2e"]
    spans = ("--span", "prefill", "--span", "decode")
    found = json.loads(cli("gate", folder, *spans, "--min-speedup", "turbo=1", "--format", "json").out)
    assert [row["metric"] for row in found["rows"]] == ["speedup_prefill", "speedup_decode"]


# The baseline.


def test_a_baseline_passes_what_it_was_made_from_and_fails_a_quarter_less(
    cli: Cli, folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "gate.json"
    assert cli("gate", folder, "--baseline", path, "--update-baseline").code == 0
    jsonschema.validate(json.loads(path.read_text()), schema("gate-baseline"))
    assert cli("gate", folder, "--baseline", path).code == 0
    slower = results(tmp_path / "slower", factor=1.5 / 1.25)
    done = cli("gate", slower, "--baseline", path)
    assert done.code == 1
    assert "### vlmbench gate: regressed" in done.out
    assert "| `turbo:r=8,mode=drop` | end to end × | 1.35× | 1.20× [" in done.out
    assert cli("gate", slower, "--baseline", path, "--min-speedup", "turbo=1.1").code == 0  # what is typed stands


def test_an_update_keeps_other_rows_and_writes_floors_as_typed(cli: Cli, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "gate.json"
    update = ("--baseline", path, "--update-baseline")
    assert cli("gate", folder, *update).code == 0
    data = json.loads(path.read_text())
    other = {**data["rows"][0], "card": "Other"}
    path.write_text(json.dumps({"schema": 1, "rows": [other, *data["rows"]]}))
    assert cli("gate", folder, *update, "--min-speedup", "turbo=1.25").code == 0
    rows = {row["card"]: row["floors"] for row in json.loads(path.read_text())["rows"]}
    assert rows == {"Other": other["floors"], "GPU": {**other["floors"], "speedup_e2e": 1.25}}
    before = path.read_bytes()
    assert cli("gate", folder, *update, "--min-speedup", "turbo=9").code == 1
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir() if each.suffix == ".part"] == []


def test_a_baseline_of_another_machine_needs_ratios_only(cli: Cli, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "gate.json"
    assert cli("gate", folder, "--baseline", path, "--update-baseline").code == 0
    for field, value in (("card", "NVIDIA T4"), ("driver", "550.54"), ("torch", "1.0")):
        data = json.loads(path.read_text())
        there = {**data["rows"][0], field: value}
        other = tmp_path / "other.json"
        other.write_text(json.dumps({"schema": 1, "rows": [there]}))
        done = cli("gate", folder, "--baseline", other)
        assert done.code == 2
        assert f"of another machine ({field} {value} against " in done.err
        done = cli("gate", folder, "--baseline", other, "--ratios-only")
        assert done.code == 0
        assert "floors are of another machine" in done.out


def test_a_method_of_the_baseline_must_be_there(cli: Cli, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "gate.json"
    assert cli("gate", folder, "--baseline", path, "--update-baseline").code == 0
    path.write_text(path.read_text().replace("r=8", "r=4"))
    done = cli("gate", folder, "--baseline", path)
    assert (done.code, "floor for turbo:r=4,mode=drop (" in done.err) == (2, True)


def test_a_method_without_a_floor_is_named(cli: Cli, folder: Path) -> None:
    fill(ResultStore(folder), timed([BASE], [BASE]), method="random")
    done = cli("gate", folder, "--min-speedup", "turbo=1.4")
    assert done.code == 0
    assert "- without a floor: `random`\n" in done.out


# Bad input: one sentence each.


ROW = (
    '{"card": "a", "driver": null, "torch": null, "model": "m", "suite": "s", "method": "f", "params": "", "shape": "x"'
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "cannot be read"),
        ("[]", "is no baseline of schema 1"),
        ('{"schema": 2, "rows": []}', "is no baseline of schema 1"),
        ('{"schema": 1, "rows": []}', "holds no floors"),
        ('{"schema": 1, "rows": [3]}', "row 0 lacks"),
        ('{"schema": 1, "rows": [{"card": "a"}]}', "row 0 lacks 'floors'"),
        (f'{{"schema": 1, "rows": [{ROW}, "updated": "", "floors": {{"speed": 1}}}}]}}', "has the floor 'speed': 1"),
        (f'{{"schema": 1, "rows": [{ROW}, "updated": "", "floors": {{"speedup_e2e": NaN}}}}]}}', "'speedup_e2e': nan"),
        (None, "is not there; --update-baseline writes it"),
    ],
)
def test_a_malformed_baseline_is_one_sentence(
    cli: Cli, folder: Path, tmp_path: Path, text: str | None, said: str
) -> None:
    path = tmp_path / "gate.json"
    if text is not None:
        path.write_text(text)
    done = cli("gate", folder, "--baseline", path)
    assert (done.code, done.out) == (2, "")
    assert said in done.err
    assert len(done.err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((), "nothing to compare with"),
        (("--update-baseline", "--min-speedup", "turbo=1"), "needs a file to write"),
        (("--min-speedup", "turbo"), "must be METHOD=NUMBER with a number above 0, not 'turbo'"),
        (("--min-speedup", "turbo=nan"), "not 'turbo=nan'"),
        (("--min-speedup", "turbo=0"), "not 'turbo=0'"),
        (("--max-accuracy-drop", "turbo=2"), "a number from 0 to 1, not 'turbo=2'"),
        (("--min-speedup", "turbo=1", "--span", "whole"), "--span must be one of"),
        (("--min-speedup", "full=1"), "names full, which the folder does not hold"),
        (("--baseline", "x.json", "--update-baseline", "--tolerance", "1"), "--tolerance must be"),
    ],
)
def test_what_cannot_be_judged_is_exit_2(cli: Cli, folder: Path, args: Any, said: str) -> None:
    done = cli("gate", folder, *args)
    assert (done.code, done.out) == (2, "")
    assert said in done.err


def test_a_folder_that_cannot_be_gated_says_why(cli: Cli, tmp_path: Path) -> None:
    ask = ("--min-speedup", "turbo=1")
    (tmp_path / "empty").mkdir()
    assert "holds no results" in cli("gate", tmp_path / "empty", *ask).err
    fill(ResultStore(tmp_path / "alone"), answered(RIGHT))
    assert "holds no method beside full" in cli("gate", tmp_path / "alone", *ask).err
    fill(ResultStore(tmp_path / "untimed"), answered(RIGHT), method="turbo")
    done = cli("gate", tmp_path / "untimed", *ask)
    assert (done.code, "has no speedup_e2e (no interleaved times)" in done.err) == (2, True)
    done = cli("gate", tmp_path / "untimed", "--max-accuracy-drop", "turbo=0.1")
    assert (done.code, "no accuracy beside full's" in done.err) == (2, True)


def test_an_unfinished_or_damaged_run_is_refused(cli: Cli, folder: Path) -> None:
    path = next(each for each in folder.rglob("header.json") if "turbo" in str(each))
    header = json.loads(path.read_text())
    path.write_text(json.dumps({**header, "status": "interrupted"}))
    done = cli("gate", folder, "--min-speedup", "turbo=1")
    assert (done.code, "is not complete (interrupted)" in done.err) == (2, True)
    del header["device"]
    path.write_text(json.dumps(header))
    done = cli("gate", folder, "--min-speedup", "turbo=1")
    assert (done.code, "lack something ('device')" in done.err) == (2, True)


def test_runs_of_two_machines_are_refused(cli: Cli, folder: Path) -> None:
    fill(ResultStore(folder), timed([BASE], [BASE]), method="random")
    path = next(each for each in folder.rglob("header.json") if "random" in str(each))
    path.write_text(path.read_text().replace('"name": "GPU"', '"name": "Other"'))
    done = cli("gate", folder, "--min-speedup", "turbo=1")
    assert (done.code, "several machines (" in done.err) == (2, True)


# What is printed, and the workflow.


def test_a_pass_says_which_loss_so_many_questions_cannot_show(cli: Cli, folder: Path) -> None:
    done = cli("gate", folder, "--max-accuracy-drop", "turbo=0.01")
    assert done.code == 0
    assert "- `turbo:r=8,mode=drop`: a loss of less than 0." in done.out
    assert "may pass unseen" not in cli("gate", folder, "--max-accuracy-drop", "turbo=0.5").out
    (row,) = json.loads(cli("gate", folder, "--max-accuracy-drop", "turbo=0.01", "--format", "json").out)["rows"]
    assert (row["mcnemar_p"], 0.01 < row["detectable_delta"] < 0.5) == (1, True)


def test_json_fits_its_schema(cli: Cli, folder: Path) -> None:
    found = json.loads(
        cli("gate", folder, "--min-speedup", "turbo=1.6", "--max-accuracy-drop", "turbo=0.1", "--format", "json").out
    )
    jsonschema.validate(found, schema("gate"))
    assert found["verdict"] == "fail"
    assert {row["metric"]: row["verdict"] for row in found["rows"]} == {"speedup_e2e": "fail", "accuracy_delta": "pass"}
    assert measured(folder)[0].n == 100


@pytest.mark.parametrize(
    ("codes", "ends", "rounds"), [((0,), 0, 1), ((3, 3, 1), 1, 3), ((3, 0), 0, 2), ((3,) * 4, 0, 4)]
)
def test_the_workflow_times_more_videos_until_the_gate_decides(
    tmp_path: Path, codes: tuple[int, ...], ends: int, rounds: int
) -> None:
    workflow = yaml.safe_load((DOCS / "ci" / "gate.yml").read_text())
    (step,) = (each for each in workflow["jobs"]["gate"]["steps"] if each.get("name") == "gate")
    stand_in = tmp_path / "vlmbench"
    (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
    stand_in.write_text(
        '#!/bin/sh\necho "$@" >> asked\n[ "$1" = gate ] || exit 0\necho summary\n'
        "code=$(head -1 codes); sed -i 1d codes; exit $code\n"
    )
    stand_in.chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "GITHUB_STEP_SUMMARY": str(tmp_path / "summary")}
    done = subprocess.run(
        ["bash", "-e", "-c", step["run"]], cwd=tmp_path, env=variables | workflow["jobs"]["gate"]["env"]
    )
    assert done.returncode == ends
    asked = (tmp_path / "asked").read_text().splitlines()
    assert len([line for line in asked if line.startswith("gate runs/gate --baseline")]) == rounds
    assert (tmp_path / "summary").read_text() == "summary\n"
