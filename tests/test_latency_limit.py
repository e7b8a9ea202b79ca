"""``run --latency-limit``: the most frames in time for each method, and the accuracy there as an ordinary run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmbench.backend import Outcome
from vlmbench.latency_limit import Climb, Step, ladder
from vlmbench.methods.full import Full
from vlmbench.record import Timing
from vlmbench.session import Session
from vlmbench.store import ResultStore

Cli = Callable[..., Any]
SCHEMA = Path(__file__).resolve().parents[1] / "docs" / "schema" / "latency-limit.schema.json"
SUITE = "synthvideo:length=32"
SECONDS_A_FRAME = {"full": 1.0, "pevlm": 0.5, "block": 100.0, "star": 0.1}
RUN = ("run", "--model", "mini-llava-ov@random", "--suite", SUITE, "--limit", 4, "--timed", 2, "--repeats", 2)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(method, frames) of every timed answer, which takes `SECONDS_A_FRAME`; decoding adds milliseconds to that."""
    asked: list[tuple[str, int]] = []

    def ask(
        self: Session, method: Any, sample: Any, clips: Any, pass_: str, *args: Any, really: Any = Session.ask
    ) -> Any:
        if pass_ != "latency":
            return really(self, method, sample, clips, pass_, *args)
        frames = len(clips[0].indices)
        asked.append((method.name, frames))
        return Outcome(timing=Timing(e2e_s=frames * SECONDS_A_FRAME[method.name]))

    monkeypatch.setattr(Session, "ask", ask)
    return asked


@given(st.integers(1, 5000))
def test_the_ladder_doubles_and_ends_with_the_videos_own_length(native: int) -> None:
    steps = ladder(native)
    assert steps[-1] == native
    assert steps[:-1] == [2**i for i in range(len(steps) - 1)]
    assert len(steps) == 1 or steps[-2] < native <= 2 * steps[-2]


def climb(*seconds: float | None) -> Climb:
    steps = [
        Step(2**i, ((s, s, s),) if s is not None else (), "" if s is not None else "oom") for i, s in enumerate(seconds)
    ]
    return Climb(Full(), 1.0, steps)


def chosen(*seconds: float | None) -> int | None:
    step = climb(*seconds).chosen
    return None if step is None else step.frames


def test_the_largest_count_in_time_is_chosen_and_one_slow_step_does_not_end_the_climb() -> None:
    assert chosen(0.1, 0.2, 0.9, 1.1) == 4
    assert chosen(0.1, 3.0, 0.9) == 4
    assert chosen(0.1, 1.0) == 2
    assert chosen(1.1, 2.0) is None
    assert chosen(0.5, None) == 1
    assert climb(0.1, 3.0).climbing
    assert climb(3.0).climbing
    assert not climb(0.1, 3.0, 3.0).climbing
    assert not climb(0.1, 3.0, None).climbing


def test_a_step_is_the_median_over_videos_of_medians_over_rounds() -> None:
    assert Step(4, ((1.0, 9.0, 2.0), (5.0, 4.0, 3.0), (9.0, 9.0, 9.0))).median_s == 4.0
    assert Step(4, ((1.0,),), "error: no").median_s is None


def test_each_method_gets_its_own_count_and_an_ordinary_run_there(
    cli: Cli, tmp_path: Path, clock: list[tuple[str, int]]
) -> None:
    methods = ("--method", "pevlm", "--method", "star", "--method", "block", "--method", "prior")
    done = cli(*RUN, "--latency-limit", 10, *methods, "--out", tmp_path)
    assert done.code == 0
    frames = {view.header["spec"]["method"]: view.header["spec"]["frames"] for view in ResultStore(tmp_path).runs()}
    assert frames == {"full": 8, "pevlm": 16, "star": None}  # all of them is the suite's own number
    for view in ResultStore(tmp_path).runs():
        assert len(view.records.of("accuracy")) == 4
        assert not view.records.of("latency")
        assert view.header["status"] == "done"
    (path,) = tmp_path.rglob("latency-limit-10s-*.json")
    data = json.loads(path.read_text())
    jsonschema.validate(data, json.loads(SCHEMA.read_text()))
    rows = {row["method"]: row for row in data["rows"]}
    assert {name: row["frames"] for name, row in rows.items()} == {"full": 8, "pevlm": 16, "star": 32, "block": None}
    assert all((path.parent / row["run"]).is_dir() for row in rows.values() if row["run"])
    assert rows["full"]["seconds"] == pytest.approx(8, abs=1)
    assert [step["frames"] for step in rows["full"]["ladder"]] == [1, 2, 4, 8, 16, 32]
    assert [step["frames"] for step in rows["block"]["ladder"]] == [1, 2]  # missed twice
    assert all(len(r) == 2 for step in rows["full"]["ladder"] for r in step["rounds_s"])
    assert "| `full` | 8 | " in done.out
    assert "| `block:block=8` | meets the limit at no frame count (at 1 it takes 100" in done.out
    assert "- left out: `prior`, which calls no model" in done.out
    assert "| `star` | 32 | " in done.out


def test_rounds_are_interleaved_over_the_methods(cli: Cli, tmp_path: Path, clock: list[tuple[str, int]]) -> None:
    assert cli(*RUN, "--latency-limit", 100, "--method", "pevlm", "--frames", 2, "--out", tmp_path).code == 0
    per_video = [[name for name, frames in clock[i : i + 6]] for i in range(0, len(clock), 6)]
    assert per_video == [["full", "pevlm", "pevlm", "full", "full", "pevlm"]] * 4  # two videos at 1 and at 2 frames


def test_frames_is_the_top_of_the_ladder(cli: Cli, tmp_path: Path, clock: list[tuple[str, int]]) -> None:
    assert (
        cli(*RUN, "--latency-limit", 100, "--frames", 6, "--no-baseline", "--method", "star", "--out", tmp_path).code
        == 0
    )
    assert {frames for _, frames in clock} == {1, 2, 4, 6}
    (view,) = ResultStore(tmp_path).runs()
    assert view.header["spec"]["frames"] == 6


def test_the_same_command_again_answers_nothing_twice(cli: Cli, tmp_path: Path, clock: list[tuple[str, int]]) -> None:
    args = (*RUN, "--latency-limit", 10, "--out", tmp_path)
    first = cli(*args).out
    (path,) = tmp_path.rglob("samples.jsonl")
    before = path.read_bytes()
    second = cli(*args).out
    assert path.read_bytes() == before
    assert first.count("\n") == second.count("\n")


def test_a_method_that_fails_misses_and_says_why(
    cli: Cli, tmp_path: Path, clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = Session.ask

    def ask(self: Session, method: Any, sample: Any, clips: Any, pass_: str, *args: Any) -> Any:
        found = answer(self, method, sample, clips, pass_, *args)  # type: ignore[arg-type]
        return replace(found, status="oom", error="no memory", timing=None) if method.name == "pevlm" else found

    monkeypatch.setattr(Session, "ask", ask)
    done = cli(*RUN, "--latency-limit", 10, "--method", "pevlm", "--out", tmp_path)
    assert done.code == 0
    assert "meets the limit at no frame count (oom: no memory)" in done.out


def test_a_video_that_fails_without_a_word_misses_too(
    cli: Cli, tmp_path: Path, clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips = Session.clips

    def silent(self: Session, *args: Any, timed: bool = False, **options: Any) -> Any:
        return None if timed else clips(self, *args, **options)

    monkeypatch.setattr(Session, "clips", silent)
    done = cli(*RUN, "--latency-limit", 10, "--out", tmp_path)
    assert done.code == 0, done.err
    assert "| `full` | meets the limit at no frame count (failed)" in done.out


def test_what_distinguishes_two_commands_distinguishes_their_files(cli: Cli, tmp_path: Path, clock: Any) -> None:
    others: tuple[Any, ...] = (
        (),
        ("--frames", 2),
        ("--method", "star"),
        ("--method", "pevlm"),
        ("--method", "pevlm:block=4"),
        ("--dtype", "bfloat16"),
        ("--repeats", 1),
    )
    for number, options in enumerate((*others, others[0]), 1):
        assert cli(*RUN, "--latency-limit", 1, "--limit", 1, *options, "--out", tmp_path).code == 0
        assert len(list(tmp_path.rglob("latency-limit-1s-*.json"))) == min(number, len(others))


def test_it_runs_on_a_real_clock_too(cli: Cli, tmp_path: Path) -> None:
    """With a limit that nothing misses; seconds themselves are asserted of no machine."""
    done = cli(*RUN, "--latency-limit", 1000, "--method", "pevlm:sink=1,block=4", "--frames", 16, "--out", tmp_path)
    assert done.code == 0
    (path,) = tmp_path.rglob("latency-limit-1000s-*.json")
    data = json.loads(path.read_text())
    jsonschema.validate(data, json.loads(SCHEMA.read_text()))
    assert [row["frames"] for row in data["rows"]] == [16, 16]
    assert cli("table", tmp_path).code == 0


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--latency-limit", "0"), "--latency-limit must be above 0 seconds, not 0"),
        (("--latency-limit", "nan"), "--latency-limit must be above 0 seconds, not nan"),
        (("--latency-limit", "1", "--mode", "latency"), "leave --mode latency out"),
        (("--latency-limit", "1", "--fps", "1"), "leave --fps out"),
        (("--latency-limit", "1", "--no-baseline", "--method", "prior"), "needs a method that calls the model"),
        (("--latency-limit", "1", "--suite", "synthimage"), "--latency-limit needs videos"),
    ],
)
def test_what_has_no_frame_count_to_choose_is_exit_2(cli: Cli, tmp_path: Path, args: Any, said: str) -> None:
    done = cli(*RUN, "--out", tmp_path / "runs", *args)
    assert done.code == 2
    assert said in done.err
    assert not (tmp_path / "runs").exists()
