"""However a run ends - killed, stopped, out of disk, fed with broken videos - the same command goes on and nothing is lost."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from vlmbench.record import peek
from vlmbench.suite import limited
from vlmbench.suites import synthvideo
from vlmbench.suites.synthvideo import SynthVideo
from vlmbench.video import Decoder

Cli = Callable[..., Any]
Records = dict[tuple[str, str, str], dict[str, Any]]

SUITE = "synthvideo:length=32"
DUMMY = ("--model", "dummy:delay_s=0.002", "--suite", SUITE, "--method", "blind", "--mode", "accuracy")
MINI = ("--model", "mini-llava-ov@random", "--suite", SUITE, "--mode", "accuracy")
KILLS = 190
PATIENCE_S = 120
"""After so long something hangs; everything waited for here takes a second, or ten where torch is loaded."""


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of the processes started here: this source, one thread, and rendered videos of their own."""
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "VLMBENCH_CACHE": str(tmp_path_factory.mktemp("cache")),
        "OMP_NUM_THREADS": "1",
    }


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(environment: dict[str, str]) -> Iterator[Start]:
    """``start(out, "--limit", 3)`` begins ``vlmbench run`` in a process of its own; none outlives the test."""
    begun: list[subprocess.Popen[str]] = []

    def begin(out: Path, *args: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "vlmbench", "run", "--out", str(out), *map(str, args)]
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
        )
        begun.append(process)
        return process

    yield begin
    for process in begun:
        if process.poll() is None:
            process.kill()
            process.communicate()


def finished(process: subprocess.Popen[str]) -> tuple[int, str]:
    """(exit code, stderr)."""
    _, said = process.communicate(timeout=PATIENCE_S)
    return process.returncode, said


def files(out: Path) -> list[Path]:
    return sorted(out.rglob("samples.jsonl"))


def size(out: Path) -> int:
    return sum(path.stat().st_size for path in files(out))


def wait_until(done: Callable[[], bool], process: subprocess.Popen[str]) -> bool:
    """False when the process ended before."""
    deadline = time.monotonic() + PATIENCE_S
    while not done():
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return True


def assert_whole_lines(out: Path) -> None:
    """Every line that has its newline has its checksum."""
    for path in files(out):
        for line in path.read_bytes().split(b"\n")[:-1]:
            peek(line)


def records(out: Path) -> Records:
    """(run, id, pass) -> all of a record but the process that wrote it. A key that comes twice must say the same twice."""
    found: Records = {}
    for path in files(out):
        data = path.read_bytes()
        assert not data or data.endswith(b"\n")
        for line in data.splitlines():
            peek(line)
            record = json.loads(line)
            for name in ("crc", "session"):
                del record[name]
            key = (path.parent.name, record["id"], record["pass"])
            assert found.setdefault(key, record) == record
    return found


def statuses(out: Path) -> set[str]:
    return {json.loads(path.read_text())["status"] for path in out.rglob("header.json")}


# Killed.


class Killer:
    """Kills one run after another at seeded moments until it has killed often enough, then lets the last one finish."""

    def __init__(self, start: Start, folder: Path, seed: int, undisturbed: Records) -> None:
        self.start, self.folder, self.undisturbed = start, folder, undisturbed
        self.random = random.Random(seed)
        self.killed = self.midway = self.torn = self.runs = 0

    def work(self, kills: int, *args: object) -> None:
        while self.killed < kills:
            self._once(*args)
        if self._out.exists():
            assert finished(self.start(self._out, *args))[0] == 0
            self._complete()

    @property
    def _out(self) -> Path:
        return self.folder / str(self.runs)

    def _once(self, *args: object) -> None:
        """One kill in four by the clock, which hits start-up too; the others when the files have grown by so many bytes."""
        before = size(self._out)
        moment = time.monotonic() + self.random.uniform(0.1, 0.5)
        grown = self.random.randrange(1, 12_000)  # up to some 20 records
        by_clock = self.random.random() < 0.25
        process = self.start(self._out, *args)

        def now() -> bool:
            return time.monotonic() >= moment if by_clock else size(self._out) >= before + grown

        if wait_until(now, process):
            process.kill()
        code, said = finished(process)
        assert_whole_lines(self._out)
        if code == 0:  # it was faster
            self._complete()
            return
        assert code == -signal.SIGKILL, said
        self.killed += 1
        self.midway += size(self._out) > before
        self._tear()

    def _tear(self) -> None:
        """Once in four times lose a part of the last line, as when the kill comes in the middle of the write."""
        if files(self._out) and self.random.random() < 0.25:
            path = self.random.choice(files(self._out))
            last = path.read_bytes().splitlines(keepends=True)[-1:]
            if last:
                os.truncate(path, path.stat().st_size - self.random.randrange(1, len(last[0])))
                self.torn += 1

    def _complete(self) -> None:
        assert records(self._out) == self.undisturbed
        assert statuses(self._out) == {"done"}
        self.runs += 1


@pytest.mark.slow
def test_a_run_that_is_killed_190_times_ends_with_the_records_of_one_that_was_not(start: Start, tmp_path: Path) -> None:
    args = (*DUMMY, "--limit", 150)
    assert finished(start(tmp_path / "undisturbed", *args))[0] == 0
    undisturbed = records(tmp_path / "undisturbed")
    assert len(undisturbed) == 300  # with the baseline
    killers = [Killer(start, tmp_path / str(seed), seed, undisturbed) for seed in range(2)]
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(killer.work, KILLS // 2, *args) for killer in killers]:
            done.result()
    assert sum(killer.killed for killer in killers) == KILLS
    # Kills by growth come after a record was written: three in four, and by the clock some more on a fast machine.
    assert sum(killer.midway for killer in killers) > KILLS / 2
    assert sum(killer.torn for killer in killers) > KILLS / 10
    assert sum(killer.runs for killer in killers) >= 2


@pytest.mark.slow
def test_a_real_model_that_is_killed_three_times_answers_as_if_it_had_not_been(start: Start, tmp_path: Path) -> None:
    args = (*MINI, "--method", "uniform", "--limit", 6, "--frames", 8)
    calm, out = tmp_path / "calm", tmp_path / "killed"
    undisturbed = start(calm, *args)
    for _ in range(3):
        before = size(out)
        process = start(out, *args)
        assert wait_until(lambda before=before: size(out) > before, process)  # type: ignore[misc]
        process.kill()
        assert finished(process)[0] == -signal.SIGKILL
        assert_whole_lines(out)
    assert finished(undisturbed)[0] == 0
    assert len(records(out)) < len(records(calm)) == 12
    assert finished(start(out, *args))[0] == 0
    assert records(out) == records(calm)
    assert statuses(out) == {"done"}


# Stopped.


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_that_is_stopped_says_so_and_goes_on_with_the_same_command(
    start: Start, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    out, args = tmp_path / "runs", (*DUMMY, "--limit", 60)
    process = start(out, *args)
    assert wait_until(lambda: size(out) > 0, process)
    process.send_signal(number)
    ended, said = finished(process)
    assert ended == code, said
    assert said.splitlines()[-1].endswith("the same command goes on from here.")
    assert "Traceback" not in said
    assert statuses(out) == {"interrupted"}
    assert 0 < len(records(out)) < 120
    assert finished(start(out, *args))[0] == 0
    assert finished(start(tmp_path / "undisturbed", *args))[0] == 0
    assert records(out) == records(tmp_path / "undisturbed")
    assert statuses(out) == {"done"}


def test_a_second_writer_is_turned_away_and_leaves_no_mark(start: Start, tmp_path: Path) -> None:
    out = tmp_path / "runs"
    slow = ("--model", "dummy:delay_s=30", *DUMMY[2:], "--no-baseline")
    first = start(out, *slow)
    assert wait_until(lambda: any(out.rglob("header.json")), first)
    [folder] = [path.parent for path in out.rglob("header.json")]
    code, said = finished(start(out, *DUMMY, "--limit", 5))
    assert code == 2
    error = said.splitlines()[-1]
    assert str(folder) in error
    assert f"process {first.pid}" in error
    # The baseline's folder was free and had been opened: nothing ran there, so it must not count as done.
    assert "done" not in statuses(out)
    first.kill()
    finished(first)
    assert finished(start(out, *DUMMY, "--limit", 5))[0] == 0
    assert len(records(out)) == 10


# Out of disk.


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "disk"
    path.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", path], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no right to mount a tmpfs")
    yield path
    subprocess.run(["umount", path], check=True)


def enlarge(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=16m", disk], check=True)


def test_a_full_disk_ends_the_run_in_a_sentence_and_room_lets_it_finish(
    start: Start, tiny_disk: Path, tmp_path: Path
) -> None:
    out, args = tiny_disk / "runs", (*DUMMY, "--limit", 60)
    code, said = finished(start(out, *args))
    assert code == 1
    error = said.splitlines()[-1]
    assert error.startswith("Error: ")
    assert str(out) in error
    assert "No space left on device" in error
    assert "Traceback" not in said
    assert_whole_lines(out)
    enlarge(tiny_disk)
    assert finished(start(out, *args))[0] == 0
    assert finished(start(tmp_path / "undisturbed", *args))[0] == 0
    assert records(out) == records(tmp_path / "undisturbed")
    assert statuses(out) == {"done"}


# Real videos on a small real model, in this process.

FEW = (*MINI, "--method", "blind", "--no-baseline", "--frames", 2)


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLMBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_cache_on_a_full_disk_ends_the_run_in_a_sentence_and_room_lets_it_finish(
    cli: Cli, tiny_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLMBENCH_CACHE", str(tiny_disk))
    out = tmp_path / "runs"
    done = cli("run", *FEW, "--limit", 6, "--out", out)
    assert done.code == 1
    assert str(tiny_disk) in done.err.splitlines()[-1]
    assert "cannot be written" in done.err.splitlines()[-1]
    kept = records(out)
    assert len(kept) < 6
    assert {record["status"] for record in kept.values()} <= {"ok", "parse_fail"}
    assert statuses(out) == {"failed"}
    enlarge(tiny_disk)
    assert cli("run", *FEW, "--limit", 6, "--out", out).code == 0
    assert len(records(out)) == 6
    assert kept.items() <= records(out).items()


def test_a_broken_video_costs_its_own_questions_only(
    cli: Cli, cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = SynthVideo(length=32)
    chosen = limited(suite.samples(), 6)
    text, cut, hangs, empty, folder, good = chosen
    for sample in (text, cut):
        suite.materialise(sample)
    path = {sample.id: sample.media[0].path for sample in chosen}
    path[text.id].write_bytes(b"this is no video")
    path[cut.id].write_bytes(path[cut.id].read_bytes()[:2000])
    path[empty.id].write_bytes(b"")  # is rendered again
    path[folder.id].mkdir()
    os.mkfifo(path[hangs.id])

    def ensure(scene: Any, path: Path, really: Any = synthvideo.ensure) -> None:
        if not path.is_fifo():  # which has no bytes either, but must stay here
            really(scene, path)

    def read(self: Decoder, path: Path, *args: Any, really: Any = Decoder.read, **more: Any) -> Any:
        self.timeout_s = 0.2 if path.is_fifo() else PATIENCE_S
        return really(self, path, *args, **more)

    monkeypatch.setattr(synthvideo, "ensure", ensure)
    monkeypatch.setattr(Decoder, "read", read)
    out = tmp_path / "runs"
    done = cli("run", *FEW, "--limit", 6, "--out", out)
    assert done.code == 0, done.err
    found = {id_: record for (_, id_, _), record in records(out).items()}
    assert [found[sample.id]["status"] for sample in (text, cut, hangs, folder)] == [
        "decode_error",
        "decode_error",
        "timeout",
        "decode_error",
    ]
    for sample in (text, cut, hangs, folder):
        assert found[sample.id]["error"].startswith(path[sample.id].name)
        assert found[sample.id]["score"] == 0
    for sample in (empty, good):
        assert found[sample.id]["status"] in ("ok", "parse_fail")
        assert [frame["index"] for frame in found[sample.id]["frames"]] == [0, 31]
    before = records(out)
    assert cli("run", *FEW, "--limit", 6, "--out", out, "--strict").code == 1
    assert records(out) == before


# Cannot start.


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--frames", 0), "--frames must be at least 1, not 0"),
        (("--limit", -1), "--limit must be at least 1, not -1"),
        (("--fps", 0), "--fps must be above 0 and at most 1000, not 0.0"),
        (("--sampler", "endpoint"), "--sampler must be one of endpoints, interior"),
        (("--method", "unifrom"), "Did you mean 'uniform'?"),
        (("--method", "uniform:ration=0.5"), "Did you mean 'ratio'?"),
        (("--suite", "synthvidoe"), "Did you mean 'synthvideo'?"),
        (("--suite", "synthvideo:lenght=32"), "Did you mean 'length'?"),
        (("--model", "mini-llava-vo@random"), "Did you mean 'mini-llava-ov'?"),
        (("--model", "dumy"), "Did you mean 'dummy'?"),
        (("--model", "dummy:delay=1"), "Did you mean 'delay_s'?"),
    ],
)
def test_what_cannot_start_is_one_line_with_the_remedy(
    cli: Cli, tmp_path: Path, args: tuple[object, ...], said: str
) -> None:
    # Of an option that comes twice the later counts; a second --method is one more.
    done = cli("run", "--model", "dummy", "--suite", SUITE, *args, "--out", tmp_path / "runs")
    assert done.code == 2
    [line] = done.err.splitlines()
    assert line.startswith("Error: ")
    assert said in line
    assert not (tmp_path / "runs").exists()


def test_a_hub_model_without_network_names_the_two_ways(cli: Cli, tmp_path: Path) -> None:
    model = "Qwen/Qwen2.5-VL-7B-Instruct"
    done = cli("run", "--model", model, "--suite", SUITE, "--offline", "--out", tmp_path / "runs")
    assert done.code == 2
    [line] = done.err.splitlines()
    assert all(part in line for part in (model, "give a local folder", "fill the hub cache"))
    assert not (tmp_path / "runs").exists()
