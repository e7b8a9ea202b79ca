"""The command line: help is instant, an error is one sentence with a remedy, and every ending has its exit code."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlmbench.errors import RunError, UsageError
from vlmbench.reference import SHIPPED

Cli = Callable[..., Any]
HEAVY = ("torch", "torchvision", "transformers", "pandas", "numpy", "rich", "datasets")


def cpu_s(*command: str) -> float:
    """CPU seconds of a child process, the least of several runs."""

    def once() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *command], stdout=subprocess.DEVNULL, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    return min(once() for _ in range(5))


def test_help_costs_a_fifth_of_a_second_at_most() -> None:
    assert cpu_s("-m", "vlmbench", "--help") - cpu_s("-c", "pass") <= 0.2


@pytest.mark.parametrize(
    "args", [["--help"], ["run", "--help"], ["fit", "--help"], ["list"], ["list", "models", "--format", "json"]]
)
def test_help_and_listing_import_nothing_heavy(args: list[str]) -> None:
    code = (
        "import sys; from vlmbench.cli import main\n"
        f"code = main({args})\n"
        f"found = [name for name in {HEAVY} if name in sys.modules]\n"
        "sys.exit(f'imported {found}' if found else code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


def test_listing_names_everything_for_people_and_for_programs(cli: Cli) -> None:
    listed = cli("list", "--format", "json")
    data = json.loads(listed.out)
    assert data["schema"] == 1
    assert {row["kind"] for row in data["rows"]} == {"method", "suite", "model"}
    assert {"full", "synthvideo", "mini-llava-ov@random", "dummy", *SHIPPED} <= {row["name"] for row in data["rows"]}
    shown = cli("list").out
    assert all(row["name"] in shown for row in data["rows"])


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--method", "pevml"], "Did you mean 'pevlm'?"),
        (["--suite", "synthvideos"], "Did you mean 'synthvideo'?"),
        (["--method", "pevlm:snik=3"], "Did you mean 'sink'?"),
        (["--model", "mini-lava-ov@random"], "Did you mean 'mini-llava-ov'?"),
        (["--mode", "acuracy"], "Did you mean 'accuracy'?"),
        (["--frames", "0"], "--frames must be at least 1, not 0"),
        (["--limit", "-1"], "--limit must be at least 1, not -1"),
        (["--limt", "3"], "--limit"),
        (["--limit", "three"], "integer"),
    ],
)
def test_what_cannot_start_is_exit_2_with_the_remedy_and_no_traceback(
    cli: Cli, tmp_path: Path, args: list[str], said: str
) -> None:
    done = cli("run", "--out", tmp_path / "runs", *args)
    assert done.code == 2
    assert said in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "runs").exists()


def test_an_unknown_command_is_exit_2(cli: Cli) -> None:
    done = cli("tabel", "runs")
    assert (done.code, "tabel" in done.err) == (2, True)


def test_a_table_of_nothing_is_exit_2_and_names_the_folder(cli: Cli, tmp_path: Path) -> None:
    for command in ("table", "rescore"):
        done = cli(command, tmp_path / "nowhere")
        assert (done.code, "nowhere" in done.err) == (2, True)


def raising(error: BaseException) -> Callable[..., int]:
    def run(*_: object) -> int:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UsageError("No such thing; name another."), 2, "No such thing; name another."),
        (RunError("The disk is full; free some."), 1, "The disk is full; free some."),
        (ValueError("odd\nvalue"), 1, "ValueError: odd value"),
    ],
)
def test_every_ending_has_its_exit_code_and_one_sentence(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, said: str
) -> None:
    monkeypatch.setattr("vlmbench.runner.run", raising(error))
    done = cli("run")
    assert done.code == code
    assert said in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert "Traceback" in cli("run", "--debug").err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_has_its_exit_code_and_the_handler_is_put_back(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int
) -> None:
    def run(*_: object) -> int:
        os.kill(os.getpid(), number)
        time.sleep(5)
        return 0

    before = signal.getsignal(number)
    monkeypatch.setattr("vlmbench.runner.run", run)
    done = cli("run")
    assert (done.code, done.err) == (code, f"Error: Stopped by {number.name}; the same command goes on from here.\n")
    assert signal.getsignal(number) is before


def test_a_command_that_starts_again_does_not_promise_to_go_on(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fit(*_: object, **__: object) -> int:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
        return 0

    monkeypatch.setattr("vlmbench.fitting.fit", fit)
    done = cli("fit", "--method", "pevlm", "--suite", "synthvideo:length=32", "--out", tmp_path / "a.json")
    assert (done.code, done.err) == (130, "Error: Stopped by SIGINT.\n")


def test_the_options_reach_the_runner_and_its_exit_code_comes_back(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[Any] = []

    def run(request: Any, progress: Any) -> int:
        seen.append(request)
        return 1

    monkeypatch.setattr("vlmbench.runner.run", run)
    args = ["--model", "dummy", "--method", "pevlm:sink=4", "--method", "full", "--limit", 3, "--mode", "accuracy"]
    assert cli("run", *args, "--no-baseline", "--strict", "--out", tmp_path).code == 1
    assert (seen[0].model, seen[0].methods, seen[0].limit) == ("dummy", ("pevlm:sink=4", "full"), 3)
    assert (seen[0].mode, seen[0].baseline, seen[0].strict, seen[0].out) == ("accuracy", False, True, tmp_path)
    assert cli("run").code == 1  # the demo
    assert seen[1].methods
    assert (seen[1].limit, seen[1].suite) == (11, "synthvideo:length=384")


def test_the_doctor_reports_and_never_fails(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlmbench import doctor

    monkeypatch.setattr(doctor, "_weights", raising(OSError("cache unreadable")))
    done = cli("doctor", "--format", "json")
    assert done.code == 0
    rows = json.loads(done.out)["rows"]
    assert {row["check"] for row in rows} >= {"version", "device", "decoder", "attention", "network", "disk"}
    [failed] = [row for row in rows if row["check"] == "weights"]
    assert (failed["ok"], failed["detail"]) == (False, "OSError: cache unreadable")
    assert [row["ok"] for row in rows if row["name"] == "cpu math"] == [True]
    assert "cache unreadable" in cli("doctor").out


def test_progress_without_a_terminal_is_a_line_at_each_end_of_a_pass(capsys: pytest.CaptureFixture[str]) -> None:
    from vlmbench.progress import Progress

    with Progress() as progress:
        progress.start(2, "accuracy · pevlm")
        for _ in range(2):
            progress.stage("prefill")
            progress.advance()
        progress.start(5, "latency · pevlm")
        progress.note("a line")
    first, second, third, note, last = capsys.readouterr().err.splitlines()
    assert first == "accuracy · pevlm: 2 samples"
    assert second.startswith("accuracy · pevlm: 2/2 in ")
    assert (third, note) == ("latency · pevlm: 5 samples", "a line")
    assert last.startswith("latency · pevlm: 0/5 in ")


def test_progress_on_a_terminal_names_method_sample_and_stage(capsys: pytest.CaptureFixture[str]) -> None:
    from vlmbench.progress import Progress

    with Progress(terminal=True) as progress:
        progress.start(12, "accuracy · pevlm")
        progress.stage("prefill")
        progress.note("[kept] as it is")
    shown = capsys.readouterr().err
    assert "accuracy · pevlm · sample 1/12 · prefill" in shown
    assert "[kept] as it is" in shown


def test_a_repeated_method_is_a_row_each_or_refused(cli: Callable[..., Any]) -> None:
    both = ("--method", "full", "--method", "uniform:ratio=0.5")
    planned = cli("plan", "--model", "mini-qwen2.5-vl@random", *both, "--device", "h200", "--format", "json")
    assert planned.code == 0, planned.err
    assert [row["method"] for row in json.loads(planned.out)["rows"]] == ["full"] * 3 + ["uniform"] * 3
    refused = cli("check", "contract", "--model", "mini-qwen2.5-vl@random", *both)
    assert refused.code == 2
    assert "takes one --method, not 2 (full, uniform:ratio=0.5)" in refused.err
