"""``compare`` pairs two runs sample by sample, and ``explain`` names what they differ in and nothing else."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.test_report import BASE, SPEC, answered, fill, scaled, timed
from vlmbench.record import Frame, Memory, Pass, SampleRecord
from vlmbench.spec import AnswerSpec
from vlmbench.store import ResultStore

Cli = Callable[..., Any]
SCHEMAS = Path(__file__).resolve().parents[1] / "docs" / "schema"
GOOD, FAIR = [1.0] * 18 + [0.0] * 2, [1.0] * 12 + [0.0] * 8
MEMORY: Pass = "memory"


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tested here is not how well an interval is known."""
    monkeypatch.setattr("vlmbench.stats.RESAMPLES", 200)


@pytest.fixture
def store(tmp_path: Path) -> ResultStore:
    return ResultStore(tmp_path / "runs")


def folder(store: ResultStore, **spec: Any) -> Path:
    answer: AnswerSpec = dataclasses.replace(SPEC, **spec)
    return store.root / answer.folder


def run(store: ResultStore, scores: Any, factor: float = 1.0, kv: int = 100, **spec: Any) -> Path:
    """One stored run, `factor` times as fast as `BASE`."""
    memory = [SampleRecord(f"s{i}", MEMORY, f"v{i}", "ok", memory=Memory(10 * kv, kv, kv)) for i in range(3)]
    fill(store, [*answered(scores), *timed([scaled(BASE, factor)], [BASE], session="one"), *memory], **spec)
    return folder(store, **spec)


def told(cli: Cli, command: str, *folders: Path) -> dict[str, dict[str, Any]]:
    """Rows of the JSON by quantity or field, after its schema was checked."""
    done = cli(command, *folders, "--format", "json")
    assert done.code == 0, done.err
    data = json.loads(done.out)
    jsonschema.validate(data, json.loads((SCHEMAS / f"{command}.schema.json").read_text()))
    return {row.get("quantity") or row["field"]: row for row in data["rows"]}


def test_everything_is_b_against_a_on_the_same_samples(cli: Cli, store: ResultStore) -> None:
    a, b = run(store, GOOD), run(store, FAIR, 2.0, kv=50, method="turbo")
    found = told(cli, "compare", a, b)
    assert (found["accuracy"]["a"], found["accuracy"]["b"], found["accuracy"]["n"]) == (0.9, 0.6, 20)
    assert found["accuracy"]["value"] == pytest.approx(-0.3)
    assert found["accuracy"]["low"] < -0.3 < found["accuracy"]["high"] < 0
    assert found["accuracy_bootstrap"]["value"] == pytest.approx(-0.3)
    assert found["mcnemar_p"]["value"] == pytest.approx(2 / 2**6)
    assert (found["only_a"]["value"], found["only_b"]["value"]) == (6, 0)
    assert found["agreement"]["value"] == pytest.approx(14 / 20)
    assert found["speedup_e2e"]["value"] == pytest.approx(2)
    assert (found["speedup_e2e"]["a"], found["speedup_e2e"]["note"]) == (pytest.approx(7), "in turns")
    assert (found["kv_bytes"]["a"], found["kv_bytes"]["value"]) == (100, 0.5)


def test_turning_the_runs_round_turns_the_result_round(cli: Cli, store: ResultStore) -> None:
    a, b = run(store, GOOD), run(store, FAIR, 2.0, method="turbo")
    there, back = told(cli, "compare", a, b), told(cli, "compare", b, a)
    assert back["accuracy"]["value"] == pytest.approx(-there["accuracy"]["value"])
    assert back["accuracy"]["low"] == pytest.approx(-there["accuracy"]["high"])
    assert back["speedup_e2e"]["value"] == pytest.approx(1 / there["speedup_e2e"]["value"])
    for same in ("mcnemar_p", "agreement"):
        assert back[same]["value"] == there[same]["value"]


def test_times_of_two_sessions_are_marked(cli: Cli, store: ResultStore) -> None:
    a = run(store, GOOD)
    fill(store, [*answered(GOOD), *timed([scaled(BASE, 2)], [BASE], session="two")], method="turbo")
    found = told(cli, "compare", a, folder(store, method="turbo"))
    assert (found["speedup_e2e"]["value"], found["speedup_e2e"]["note"][:14]) == (pytest.approx(2), "measured apart")


def test_only_common_samples_count_and_there_must_be_one(cli: Cli, store: ResultStore) -> None:
    a, b = run(store, GOOD), run(store, GOOD[:5], method="turbo")
    assert told(cli, "compare", a, b)["accuracy"]["n"] == 5
    fill(store, [SampleRecord("other", "accuracy", "v", "ok", score=1.0)], method="apart")
    done = cli("compare", a, folder(store, method="apart"))
    assert (done.code, "hold no sample in common" in done.err) == (2, True)
    done = cli("compare", a, run(store, GOOD, suite="shapes"))
    assert (done.code, "other questions cannot be paired" in done.err) == (2, True)


def test_a_run_may_be_named_by_the_beginning_of_its_folder(cli: Cli, store: ResultStore) -> None:
    a, b = run(store, GOOD), run(store, FAIR, method="turbo")
    assert cli("compare", a.parent / "full", b.parent / "turbo-").code == 0
    done = cli("compare", store.root, b)
    assert (done.code, "holds 2 runs (" in done.err) == (2, True)
    for missing in (store.root / "nowhere", a.parent / "nothing"):
        done = cli("explain", missing, b)
        assert (done.code, "holds no results" in done.err) == (2, True)


def test_a_results_folder_and_a_method_name_a_run(cli: Cli, store: ResultStore) -> None:
    """As the README has it: nobody types the folders of suite and model that lie between, nor the hash."""
    a, b = run(store, GOOD), run(store, FAIR, method="turbo")
    (store.root / "full-notes.txt").write_text("no run")
    short = told(cli, "compare", store.root / "full", store.root / "turbo")
    assert short == told(cli, "compare", a, b)
    run(store, FAIR, method="prior+full")
    assert told(
        cli, "compare", store.root / "full", store.root / "prior+full"
    )  # as tables print it, not as folders are called
    run(store, FAIR, method="turbo", frames=8)
    done = cli("compare", store.root / "full", store.root / "turbo")
    assert (done.code, "holds 2 runs (" in done.err) == (2, True)


def test_the_text_says_what_the_runs_differ_in(cli: Cli, store: ResultStore) -> None:
    a, b = run(store, GOOD), run(store, FAIR, 2.0, method="turbo", frames=8)
    text = cli("compare", a, b).out
    assert "| accuracy | 0.9 | 0.6 | -0.300 [" in text
    assert "| e2e, s (in turns) | 7 | 3.5 | 2.00× [2.00, 2.00] | 8 |" in text
    assert "- A and B differ in method, frames; `vlmbench explain A B`" in text
    assert "the same id" not in text
    other = run(store, FAIR, suite_version="2")
    warning = "the same id may be another question (another suite_version): run one of them again"
    assert f"- **{warning}**" in cli("compare", a, other).out
    assert json.loads(cli("compare", a, other, "--format", "json").out)["warnings"] == [warning]
    assert json.loads(cli("compare", a, b, "--format", "json").out)["warnings"] == []


# What differs.


@pytest.mark.parametrize(
    ("field", "value", "changes"),
    [
        ("frames", 8, "both"),
        ("sampler", "interior", "answers"),
        ("decoder", "pyav", "answers"),
        ("max_pixels", 1000, "both"),
        ("attention", "eager", "both"),
        ("dtype", "float32", "both"),
        ("prompt_style", "other", "answers"),
        ("max_new_tokens", 99, "both"),
        ("seed", 1, "both"),
        ("weights_hash", "x", "both"),
        ("suite_version", "2", "answers"),
    ],
)
def test_one_difference_is_one_row_with_its_effect(
    cli: Cli, store: ResultStore, field: str, value: Any, changes: str
) -> None:
    a, b = run(store, GOOD), run(store, GOOD, **{field: value})
    found = told(cli, "explain", a, b)
    assert list(found) == [field]
    assert (found[field]["b"], found[field]["changes"]) == (str(value), changes)
    assert found[field]["effect"]


def test_versions_of_packages_and_frames_as_decoded_are_compared(cli: Cli, store: ResultStore) -> None:
    a, b = run(store, GOOD), run(store, GOOD, method="turbo")
    header = json.loads((b / "header.json").read_text())
    for session in header["sessions"]:
        session["versions"] |= {"transformers": "4.0", "obscure": "1"}
        session["measure"]["threads"] = 64
    (b / "header.json").write_text(json.dumps(header))
    found = told(cli, "explain", a, b)
    assert set(found) == {"method", "transformers", "obscure", "threads"}
    assert (found["obscure"]["a"], found["obscure"]["effect"]) == ("none", "no effect of it is known")
    assert list(found)[-1] == "threads"  # what cannot change answers stands last
    shown = answered(GOOD[:1], frames=[Frame(0, 0.0), Frame(9, 1.0)], size=(64, 48))
    fill(store, shown, method="frames")
    found = told(cli, "explain", a, folder(store, method="frames"))
    assert (found["decoded_frames"]["b"], found["frame_size"]["b"]) == ("2 of s0 (0 to 9)", "64 × 48")


def test_nothing_to_explain_is_one_sentence(cli: Cli, store: ResultStore) -> None:
    a = run(store, GOOD)
    assert cli("explain", a, a).out.endswith("differ in nothing that is recorded.\n")


def test_a_header_without_what_is_needed_is_one_sentence(cli: Cli, store: ResultStore) -> None:
    a, b = run(store, GOOD), run(store, GOOD, method="turbo")
    header = json.loads((b / "header.json").read_text())
    del header["kernels"]
    (b / "header.json").write_text(json.dumps(header))
    done = cli("compare", a, b)
    assert (done.code, "a header without kernels" in done.err) == (2, True)
    for command in (("table",), ("table", "--layout", "efficiency")):
        done = cli(*command, store.root)
        assert (done.code, "lack" in done.err, len(done.err.splitlines())) == (2, True, 1)
    header["schema"] = 2
    (b / "header.json").write_text(json.dumps(header))
    assert "written by another version" in cli("table", store.root).err


def test_a_score_that_is_no_number_is_one_sentence(cli: Cli, store: ResultStore) -> None:
    run(store, [1.0, float("nan")])
    for command in (["table", store.root], ["compare", store.root, store.root]):
        done = cli(*command)
        assert (done.code, len(done.err.splitlines())) == (2, 1)
        assert "the accuracy record of s1 cannot be used (its score is None, not a number); delete its line" in done.err
