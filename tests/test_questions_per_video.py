"""``run --questions-per-video``: all ways in turns on one clock, an honest denominator, and a file that says all of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from vlmbench.backend import Outcome
from vlmbench.record import Timing
from vlmbench.session import Session

Cli = Callable[..., Any]
SCHEMA = Path(__file__).resolve().parents[1] / "docs" / "schema" / "questions-per-video.schema.json"
RUN = ("run", "--model", "dummy", "--suite", "synthvideo:length=32", "--timed", 2, "--repeats", 2)
WHOLE = {"full": 10.0, "pevlm": 5.0, "random": 2.0}
"""Seconds of a question that is prefilled whole; one behind a kept prefix takes 1."""


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every way that was timed, in order."""
    asked: list[str] = []

    def outcome(seconds: float) -> Outcome:
        return Outcome(timing=Timing(e2e_s=seconds), output_ids=[1, 2])

    def ask(self: Session, method: Any, sample: Any, *args: Any) -> Outcome:
        asked.append(method.name)
        return outcome(WHOLE[method.name])

    def ask_together(self: Session, method: Any, samples: Any, *args: Any) -> list[Outcome]:
        asked.append(f"{method.name}, reused")
        return [outcome(WHOLE[method.name]), *(outcome(1.0) for _ in samples[1:])]

    monkeypatch.setattr(Session, "ask", ask)
    monkeypatch.setattr(Session, "ask_together", ask_together)
    return asked


def stored(folder: Path) -> dict[str, Any]:
    (path,) = folder.rglob("questions-per-video-*.json")
    data = json.loads(path.read_text())
    jsonschema.validate(data, json.loads(SCHEMA.read_text()))
    return data


def test_full_attention_reuses_as_well_and_who_may_not_says_so(cli: Cli, tmp_path: Path, clock: list[str]) -> None:
    done = cli(*RUN, "--questions-per-video", 3, "--method", "pevlm", "--method", "random", "--out", tmp_path)
    assert done.code == 0
    rows = {row["method"]: row for row in stored(tmp_path)["rows"]}
    seconds = {name: (row["first_s"], row["next_s"], row["e2e_s"], row["separate_e2e_s"]) for name, row in rows.items()}
    assert seconds == {"full": (10, 1, 12 / 3, 10), "pevlm": (5, 1, 7 / 3, 5), "random": (2, 2, 2, 2)}
    assert {name: row["reuse"] for name, row in rows.items()} == {"full": True, "pevlm": True, "random": False}
    speedups = {name: (row["speedup_e2e"], row["speedup_reuse"]) for name, row in rows.items()}
    assert speedups == {
        "full": (1, 30 / 12),
        "pevlm": (pytest.approx(12 / 7), pytest.approx(15 / 7)),
        "random": (2, None),
    }
    assert {name: row["same_tokens"] for name, row in rows.items()} == {"full": 1, "pevlm": 1, "random": None}
    assert "`random`: each question separately" in done.out
    assert "| `full` | 10 | 1 | 4 | 10 | 2.50 | 1.00 | 1.00 |" in done.out


def test_all_ways_take_turns_and_warm_up_does_not_count(cli: Cli, tmp_path: Path, clock: list[str]) -> None:
    assert cli(*RUN, "--questions-per-video", 2, "--method", "pevlm", "--out", tmp_path).code == 0
    ways = [["full, reused"], ["full"] * 2, ["pevlm, reused"], ["pevlm"] * 2]
    turns = [each for turn in range(3) for way in ways[turn:] + ways[:turn] for each in way]
    assert clock == turns * 2  # two videos
    for row in stored(tmp_path)["rows"]:
        assert [len(video["rounds_s"]) for video in row["videos"]] == [2, 2]
        assert all(len(each) == 2 for video in row["videos"] for each in video["rounds_s"])


def test_questions_of_one_run_are_on_the_same_video(
    cli: Cli, tmp_path: Path, clock: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    together = Session.ask_together
    seen: list[Any] = []

    def ask_together(self: Session, method: Any, samples: Any, *args: Any) -> list[Outcome]:
        seen.append(samples)
        return together(self, method, samples, *args)

    monkeypatch.setattr(Session, "ask_together", ask_together)
    # A limit spreads over kinds of questions; the videos are chosen by it, their questions are not.
    assert cli(*RUN, "--questions-per-video", 3, "--limit", 2, "--out", tmp_path).code == 0
    assert {len(samples) for samples in seen} == {3}
    assert all(len({sample.media for sample in samples}) == 1 for samples in seen)
    assert all(len({sample.id for sample in samples}) == 3 for samples in seen)
    assert len({samples[0].cluster for samples in seen}) == 2


def test_a_method_that_fails_is_out_and_says_why(
    cli: Cli, tmp_path: Path, clock: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    together = Session.ask_together

    def ask_together(self: Session, method: Any, *args: Any) -> list[Outcome]:
        found = together(self, method, *args)
        return [Outcome(status="oom", error="no memory")] if method.name == "pevlm" else found

    monkeypatch.setattr(Session, "ask_together", ask_together)
    args = (*RUN, "--questions-per-video", 2, "--method", "pevlm", "--out", tmp_path)
    done = cli(*args)
    assert done.code == 0
    assert "`pevlm`: failed on 2 videos (oom: no memory)" in done.out
    assert clock.count("pevlm, reused") == 2  # once a video
    row = stored(tmp_path)["rows"][1]
    assert (row["n_videos"], row["n_failed"], row["e2e_s"], row["speedup_e2e"]) == (0, 2, None, None)
    assert cli(*args, "--strict").code == 1


def test_a_method_with_nothing_to_do_gets_no_speed_up(
    cli: Cli, tmp_path: Path, clock: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    together = Session.ask_together

    def ask_together(self: Session, method: Any, *args: Any) -> list[Outcome]:
        return [replace(each, applied=method.name != "pevlm") for each in together(self, method, *args)]

    monkeypatch.setattr(Session, "ask_together", ask_together)
    done = cli(*RUN, "--questions-per-video", 2, "--method", "pevlm", "--out", tmp_path)
    assert "`pevlm`: had nothing to do on 2 of 2 videos" in done.out
    assert [row["speedup_e2e"] for row in stored(tmp_path)["rows"]] == [1, None]


def test_it_runs_on_a_real_clock_and_the_answers_agree(cli: Cli, tmp_path: Path) -> None:
    """With a real model; seconds themselves are asserted of no machine."""
    done = cli(
        *("run", "--model", "mini-qwen2.5-vl@random", "--suite", "synthmixed:length=32", "--frames", 8),
        *("--timed", 1, "--repeats", 1, "--warmup", 0, "--max-new-tokens", 2, "--questions-per-video", 2),
        *("--method", "pevlm:sink=1,block=1", "--method", "random", "--method", "prior", "--out", tmp_path),
    )
    assert done.code == 0
    rows = stored(tmp_path)["rows"]
    assert [row["method"] for row in rows] == ["full", "pevlm", "random"]
    assert [row["same_tokens"] for row in rows] == [1, 1, None]
    assert all(row["n_failed"] == row["n_inactive"] == 0 for row in rows)
    assert "left out: `prior`, which calls no model" in done.out


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--questions-per-video", "1"), "--questions-per-video must be at least 2, not 1"),
        (("--questions-per-video", "99"), "those of synthvideo:length=32 have at most"),
        (("--questions-per-video", "2", "--latency-limit", "1"), "give one of them"),
        (("--questions-per-video", "2", "--mode", "accuracy"), "leave --mode accuracy out"),
        (("--questions-per-video", "2", "--no-baseline", "--method", "prior"), "needs a method that calls the model"),
    ],
)
def test_what_cannot_be_measured_is_exit_2(cli: Cli, tmp_path: Path, args: Any, said: str) -> None:
    done = cli(*RUN, "--out", tmp_path / "runs", *args)
    assert done.code == 2
    assert said in done.err
    assert not (tmp_path / "runs").exists()
