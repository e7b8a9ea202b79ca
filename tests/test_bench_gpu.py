"""``make bench-gpu``: rows at once, a crash costs itself, the time is kept, and nothing is needed that a GPU machine lacks."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from vlmbench import bench_gpu, bench_gpu_worker, dense
from vlmbench.bench import COLUMNS, OPS, make_methods
from vlmbench.bench_gpu_workloads import PREFETCHED, RANKED, TEXT

ROOT = Path(__file__).resolve().parents[1]
LACKING = ("scipy", "av", "decord", "datasets", "jsonschema", "lmms_eval", "matplotlib")
"""What the smoke must do without."""


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """``make bench-gpu SMOKE=1`` with what a GPU machine may lack made unimportable."""
    folder = tmp_path_factory.mktemp("smoke")
    block = f"import sys\nfor name in {LACKING}: sys.modules[name] = None\n"
    (folder / "sitecustomize.py").write_text(block)
    command = [sys.executable, "-m", "vlmbench.bench_gpu", "--smoke", "--out", str(folder / "out")]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}", "VLMBENCH_COMMIT": "0123456789ab"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return folder / "out", done


def test_the_rehearsal_writes_a_marked_row_for_every_workload(rehearsed: tuple[Path, Any]) -> None:
    out, done = rehearsed
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (out / bench_gpu.ROWS).read_text().splitlines()]
    expected = [each.name for each in bench_gpu.SMOKE if each.part == 1]
    # One with a limit on memory has a second row, and its own name comes last: until then nothing counts as measured.
    assert [row["workload"] for row in rows if not row["workload"].endswith(PREFETCHED)] == expected
    names = [row["workload"] for row in rows]
    assert names.index("smoke-core-12gb") == names.index("smoke-core-12gb-prefetched") + 1
    assert all(list(row) == ["workload", "commit", *COLUMNS] for row in rows)
    assert {row["commit"] for row in rows} == {"0123456789ab"}  # as given: what was copied there is no checkout
    assert all("smoke" in row["marks"] and row["device"] == "cpu" for row in rows)
    assert set(rows[0]["method_kernels_s"]) >= {"blocks", "flex", "varlen"}
    for pattern in ("grid", "vs", "a_shape"):  # compared with float64 before they are timed
        (row,) = (row for row in rows if row["workload"] == f"smoke-mm-{pattern}")
        assert set(row["method_kernels_s"]) == {"own", "flex"}, row["method_refused"]
    assert not any("eager" in row["marks"] for row in rows), [row["note"] for row in rows]  # all was recorded
    assert json.loads((out / bench_gpu.MACHINE).read_text())["torch"] == torch.__version__
    assert sorted(path.name for path in out.iterdir()) == sorted((bench_gpu.ROWS, bench_gpu.LOG, bench_gpu.MACHINE))
    assert f"{len(expected)} of {len(expected)} workloads have a row" in done.stdout


def test_smoke_rows_are_in_no_table(rehearsed: tuple[Path, Any]) -> None:
    from vlmbench.publish import bench_rows

    assert bench_rows(rehearsed[0]) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has one")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: Any) -> None:
    assert bench_gpu.main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().out == "No CUDA device is here; SMOKE=1 rehearses the same on a CPU.\n"


def watched(tmp_path: Path, monkeypatch: Any, code: str, budget_s: float) -> tuple[int, str]:
    """`Watch` over workers that run `code` with the names of their workloads in ``names``."""
    script = tmp_path / "worker.py"
    script.write_text(f"import os, sys, time\nnames = sys.argv[sys.argv.index('--worker') + 1:]\n{code}")
    start = subprocess.Popen

    def worker(command: list[str], **options: Any) -> Any:
        return start([sys.executable, "-u", str(script), *command[3:]], **options)

    monkeypatch.setattr(subprocess, "Popen", worker)
    log = io.StringIO()
    watch = bench_gpu.Watch(tmp_path, log, time.monotonic() + budget_s, smoke=True)
    return watch.run([bench_gpu.Workload(name, "attention") for name in "abc"]), log.getvalue()


def test_a_crash_costs_itself_and_the_others_go_on(tmp_path: Path, monkeypatch: Any) -> None:
    code = "for name in names:\n    print('» ' + name, flush=True)\n    if name == 'b': os._exit(9)\n"
    returned, log = watched(tmp_path, monkeypatch, code, 60)
    assert returned == 1
    assert "b ended its worker (exit code 9)" in log
    assert log.index("» c") > log.index("b ended")
    assert "Failed b" in log


def test_a_worker_that_asks_for_a_fresh_one_gets_it_and_nothing_failed(tmp_path: Path, monkeypatch: Any) -> None:
    code = "for name in names:\n    print('» ' + name, flush=True)\n    if name == 'b': os._exit(3)\n"
    returned, log = watched(tmp_path, monkeypatch, code, 60)
    assert returned == 0
    assert [line for line in log.splitlines() if line.startswith("» ")] == ["» a", "» b", "» c"]
    assert "Failed" not in log


def test_after_tests_that_were_cut_off_the_measurements_go_on_in_a_fresh_worker(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    """Their own processes would go on using the card beside what is timed; they end with the worker's group."""

    def cut_off(*args: Any, **options: Any) -> Any:
        raise subprocess.TimeoutExpired("pytest", options["timeout"])

    monkeypatch.setattr(subprocess, "run", cut_off)
    monkeypatch.setattr(bench_gpu_worker, "_machine", lambda *_: None)
    monkeypatch.setenv("VLMBENCH_DEADLINE", str(time.time() + 500))
    workloads = [bench_gpu.Workload("gpu-tests", "tests"), bench_gpu.Workload("next", "attention")]
    assert bench_gpu_worker.work(tmp_path, workloads, True) == bench_gpu_worker.FRESH
    said = capsys.readouterr().out
    assert "failed gpu-tests: not done after 100 s" in said
    assert "next" not in said


def test_what_has_its_row_is_not_measured_again(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / bench_gpu.ROWS).write_text('{"workload": "a"}\n{"workload": "c"}\n{"workl')  # torn by a kill
    code = "for name in names:\n    print('» ' + name, flush=True)\n"
    returned, log = watched(tmp_path, monkeypatch, code, 60)
    assert returned == 0
    assert "2 workloads have their row in" in log
    assert [line for line in log.splitlines() if line.startswith("» ")] == ["» b"]


def test_what_held_an_earlier_call_up_comes_last(tmp_path: Path, monkeypatch: Any) -> None:
    """Else a compiler that hangs would end every call that is to go on behind it."""
    (tmp_path / bench_gpu.LOG).write_text("» a (500 s left)\n» b (400 s left)\n", encoding="utf-8")
    (tmp_path / bench_gpu.ROWS).write_text('{"workload": "a"}\n')
    code = "for name in names:\n    print('» ' + name, flush=True)\n"
    _, log = watched(tmp_path, monkeypatch, code, 60)
    assert [line for line in log.splitlines() if line.startswith("» ")] == ["» c", "» b"]


def test_the_time_is_kept_and_what_was_not_reached_is_named(tmp_path: Path, monkeypatch: Any) -> None:
    returned, log = watched(tmp_path, monkeypatch, "print('» a', flush=True); time.sleep(60)", 2)
    assert returned == 0
    for name in "abc":
        assert f"Skipped {name}: the time was up" in log


def test_at_the_deadline_what_a_worker_started_ends_with_it(tmp_path: Path, monkeypatch: Any) -> None:
    """The worker's child holds the pipe to the watcher: while it lives the log does not end."""
    code = (
        "import subprocess\nprint('» a', flush=True)\n"
        "subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    )
    begin = time.monotonic()
    returned, _ = watched(tmp_path, monkeypatch, code, 3)
    assert returned == 0
    assert time.monotonic() - begin < 30


def test_every_workload_can_be_named_and_asks_for_what_there_is() -> None:
    names = [each.name for each in (*bench_gpu.WORKLOADS, *bench_gpu.SMOKE)]
    assert len(set(names)) == len(names)
    for each in (*bench_gpu.WORKLOADS, *bench_gpu.SMOKE):
        assert each.op in (*OPS, "tests")
        make_methods([each.method])
        _, options = each.split()
        known = {"check", "rounds", "layers", "steps", "rivals", "graphs", "alone"}
        limited = {"rounds", "steps", "memory_gb", "resident", "graphs"}
        assert set(options) <= (limited if "memory_gb" in options else known)
    assert bench_gpu.WORKLOADS[0].op == "tests"
    # All that the contract fixes is there, and what comes first is rehearsed.
    mm = {
        f"gpu-mm-{p}-{n}"
        for p in ("grid", "vs", "a_shape", "mix")
        for n in ("16k", "64k", "128k", "360k", "720k", "1m")
    }
    other = {"gpu-pevlm", "gpu-turbo", "gpu-turbo-siglip", "gpu-core", "gpu-core-12gb", "gpu-memvp"}
    assert mm | other <= set(names)
    kinds = {
        first: {(each.op, each.method.partition(":")[0]) for each in some if each.part == 1 and each.op in OPS}
        for first, some in (("card", bench_gpu.WORKLOADS), ("rehearsed", bench_gpu.SMOKE))
    }
    assert kinds["card"] <= kinds["rehearsed"]
    # With the start of the machine's python it must end inside the ten minutes of a command.
    assert sum(each.about_s for each in bench_gpu.WORKLOADS if each.part == 1) <= bench_gpu.BUDGET_S < 600
    assert max(each.about_s for each in bench_gpu.WORKLOADS) < bench_gpu.BUDGET_S  # else it would never start


def test_a_guess_is_no_less_than_what_dense_attention_takes_by_arithmetic() -> None:
    """At a million tokens and 600 TFLOP/s one call of one layer takes 12 s: warm-up and rounds alone are half a minute."""
    from vlmbench.madeup import Shape

    for each in bench_gpu.WORKLOADS:
        shape, options = each.split()
        if each.op == "attention":
            call = 4 * shape.heads * shape.head_dim * shape.tokens * (shape.tokens + 1) / 2 / 600e12
            assert each.about_s > (1 + options.get("rounds", 7)) * call, each.name
    assert Shape(1, 1, 1, 1, 1).text_tokens == TEXT
    assert RANKED == dense.RANKED


def test_the_workloads_hold_the_curves_of_time_over_density() -> None:
    """Five budgets at every length, with the rows of published sizes; three at a million tokens."""
    points: dict[tuple[str, int], set[float]] = {}
    for each in bench_gpu.WORKLOADS:
        if each.name.startswith(("gpu-mm-", "gpu-density-")) and each.op == "attention":
            (method,) = make_methods([each.method])
            points.setdefault((method.pattern, each.split()[0].tokens), set()).add(method.budget)  # type: ignore[attr-defined]
    for pattern in ("grid", "vs", "a_shape"):
        found = {tokens: budgets for (name, tokens), budgets in points.items() if name == pattern}
        assert len(found) == 6
        assert max(found) > 999_000
        assert sorted(map(len, found.values())) == [1, 3, 5, 5, 5, 5]
