"""The store loses at most the line being written, says what it repaired, has one writer, and opens fast."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmbench.backend import Identity
from vlmbench.errors import RunError, UsageError
from vlmbench.header import make_header
from vlmbench.record import Frame, Memory, Pass, SampleRecord, Timing, peek
from vlmbench.spec import AnswerSpec, MeasureSpec
from vlmbench.store import ResultStore, Run

ROOT = Path(__file__).resolve().parents[1]
SCHEMAS = ROOT / "docs" / "schema"
SPEC = AnswerSpec(
    model="dummy",
    revision=None,
    weights_hash="0",
    method="full",
    method_params={},
    suite="synthvideo",
    suite_version="1",
    suite_params={"length": 32},
    prompt_style="default",
    frames=None,
    sampler="endpoints",
    fps=None,
    max_pixels=None,
    min_pixels=None,
    decoder="none",
    attention="dummy",
    dtype="float32",
    device_type="cpu",
    max_new_tokens=8,
    seed=0,
)
HEADER = make_header(
    SPEC,
    MeasureSpec(mode="all", warmup=1, repeats=3, threads=2, device_name="none"),
    Identity(
        "dummy", None, "0", "float32", "cpu", "none", "dummy", "dummy", "dummy", {"driver": "1.2", "stand_in": True}
    ),
    {"method": "full"},
)

ACCURACY: Pass = "accuracy"

numbers = st.floats(0, 1e6).map(lambda x: float(f"{x:.7g}"))  # as many digits as are stored
timings = st.builds(Timing, prefill_s=numbers, decode_s=st.lists(numbers, max_size=3).map(tuple), e2e_s=numbers)
names = st.text(st.characters(codec="utf-8"), max_size=12)
records = st.builds(
    SampleRecord,
    id=names,
    pass_=st.sampled_from(["accuracy", "latency", "memory"]),
    cluster=names,
    status=st.sampled_from(["ok", "parse_fail", "oom", "decode_error", "timeout", "error"]),
    strata=st.dictionaries(names, names, max_size=2),
    prediction=st.none() | names,
    raw_text=names,
    output_ids=st.lists(st.integers(0, 2**17), max_size=3),
    first_token=st.none() | st.just({"ids": [1, 2], "logprobs": [-0.5, -1.5], "tail": None}),
    score=st.floats(0, 1).map(lambda x: float(f"{x:.7g}")),
    timing=st.none() | timings,
    rounds=st.lists(timings, max_size=2),
    memory=st.none() | st.builds(Memory, peak_bytes=st.integers(0, 2**50), stages=st.just({"prefill": 7})),
    frames=st.lists(st.builds(Frame, index=st.integers(0, 10**6), time_s=numbers), max_size=2),
    size=st.none() | st.just((480, 640)),
    tokens=st.just({"prompt": 9, "visual": 4}),
)


def record(id_: str, status: Any = "ok", pass_: Pass = ACCURACY, **more: Any) -> SampleRecord:
    return SampleRecord(id=id_, pass_=pass_, cluster=id_, status=status, **more)


@pytest.fixture
def store(tmp_path: Path) -> ResultStore:
    return ResultStore(tmp_path / "runs")


@pytest.fixture
def samples(store: ResultStore) -> Path:
    """The file of a finished run with the samples a, b, c."""
    with store.open(SPEC, HEADER) as run:
        for name in "abc":
            run.append(record(name))
    return run.folder / "samples.jsonl"


def reopened(store: ResultStore) -> Run:
    run = store.open(SPEC, HEADER)
    run.close()
    return run


@given(records)
def test_a_record_comes_back_as_it_was_written(one: SampleRecord) -> None:
    line = one.to_line()
    assert SampleRecord.from_line(line) == one
    assert tuple(peek(line.encode())) == (one.id, one.pass_, one.status)
    jsonschema.validate(json.loads(line), json.loads((SCHEMAS / "record.schema.json").read_text()))


@given(records, st.data())
def test_a_flipped_bit_never_goes_unnoticed(one: SampleRecord, data: st.DataObject) -> None:
    line = bytearray(one.to_line().encode())
    line[data.draw(st.integers(0, len(line) - 2))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(ValueError, match="checksum"):
        peek(bytes(line))


def test_seven_digits_are_kept_and_nan_becomes_null() -> None:
    assert SampleRecord.from_line(record("a", score=1 / 3).to_line()).score == 0.3333333
    assert json.loads(record("a", first_token={"tail": float("-inf")}).to_line())["first_token"] == {"tail": None}


def test_the_record_schema_names_every_field() -> None:
    schema = json.loads((SCHEMAS / "record.schema.json").read_text())
    fields = {field.name.rstrip("_") for field in dataclasses.fields(SampleRecord)} | {"schema", "crc"}
    assert set(schema["properties"]) == set(schema["required"]) == fields


def check_cut(store: ResultStore, written: list[SampleRecord], cut: int) -> None:
    """A file cut after `cut` bytes opens with every record whose line is whole, and ends with the last of them."""
    lines = [dataclasses.replace(each, session="s").to_line().encode() for each in written]
    whole = b"".join(lines)[:cut]
    (view,) = store.runs()
    path = view.folder / "samples.jsonl"
    path.write_bytes(whole)
    run = store.reopen(view)
    run.close()
    kept = lines[: whole.count(b"\n")]
    assert [each.to_line().encode() for each in run.records.values()] == kept
    assert path.read_bytes() == b"".join(kept)
    assert bool(run.repaired) == (len(whole) > sum(map(len, kept)))


def test_cutting_the_file_at_any_byte_loses_at_most_the_last_record(store: ResultStore) -> None:
    written = [record("a", raw_text="é\n"), record('"', "oom")]
    reopened(store)
    for cut in range(sum(len(each.to_line()) for each in written) + 2):
        check_cut(store, written, cut)


@settings(deadline=None)
@given(st.lists(records, min_size=1, max_size=4, unique_by=lambda each: (each.id, each.pass_)), st.data())
def test_that_holds_for_any_records(
    tmp_path_factory: pytest.TempPathFactory, written: list[SampleRecord], data: st.DataObject
) -> None:
    store = ResultStore(tmp_path_factory.mktemp("cut"))
    reopened(store)
    check_cut(store, written, data.draw(st.integers(0, sum(len(each.to_line()) for each in written) + 1)))


def test_a_torn_line_is_cut_off_and_reported_and_the_run_goes_on(store: ResultStore, samples: Path) -> None:
    samples.write_bytes(samples.read_bytes()[:-5])
    with store.open(SPEC, HEADER) as run:
        assert "torn" in run.repaired
        assert run.done("accuracy") == {"a", "b"}
        run.append(record("c"))
    assert not reopened(store).repaired
    assert reopened(store).done("accuracy") == {"a", "b", "c"}


def test_a_damaged_line_is_skipped_and_reported_and_its_bytes_stay(store: ResultStore, samples: Path) -> None:
    first, second, third = samples.read_bytes().splitlines(keepends=True)
    damaged = first + second.replace(b'"cluster":"b"', b'"cluster":"x"') + third
    samples.write_bytes(damaged)
    run = reopened(store)
    assert "1 damaged line(s) (2)" in run.repaired
    assert run.done("accuracy") == {"a", "c"}
    assert samples.read_bytes() == damaged


def test_the_later_of_two_records_wins(store: ResultStore, samples: Path) -> None:
    with store.open(SPEC, HEADER) as run:
        run.append(record("b", "error", attempts=2))
        assert run.records["b", "accuracy"].attempts == 2
    assert reopened(store).records["b", "accuracy"].status == "error"


def test_only_errors_are_run_again_and_only_on_request(store: ResultStore) -> None:
    statuses = ("ok", "parse_fail", "oom", "decode_error", "timeout", "error")
    with store.open(SPEC, HEADER) as run:
        for status in statuses:
            run.append(record(status, status))
        assert run.done("accuracy") == set(statuses)
        assert run.done("accuracy", retry_errors=True) == set(statuses) - {"error"}
        assert run.done("latency") == set()


def test_every_process_that_wrote_has_an_entry_in_the_header(store: ResultStore, samples: Path) -> None:
    before = json.loads((samples.parent / "header.json").read_text())
    with store.open(SPEC, {**HEADER, "versions": {"torch": "99"}, "session": "later"}) as run:
        run.append(record("d"))
    (view,) = store.runs()
    assert view.header["created"] == before["created"]
    assert [each["status"] for each in view.header["sessions"]] == ["done", "done"]
    assert view.header["sessions"][0]["versions"] == HEADER["versions"]
    assert view.header["sessions"][1]["versions"] == view.header["versions"] == {"torch": "99"}
    assert view.records["a", "accuracy"].session == HEADER["session"]
    assert view.records["d", "accuracy"].session == "later"
    jsonschema.validate(before, json.loads((SCHEMAS / "header.schema.json").read_text()))
    jsonschema.validate(view.header, json.loads((SCHEMAS / "header.schema.json").read_text()))


def test_the_header_tells_what_ran_where() -> None:
    assert HEADER["spec"] == dataclasses.asdict(SPEC)
    assert HEADER["driver"] == "1.2"
    assert HEADER["facts"] == {"stand_in": True}
    assert HEADER["versions"]["python"].startswith(f"{sys.version_info.major}.")
    assert HEADER["device"]["cores"] >= 1


@pytest.mark.parametrize(
    ("raised", "status"),
    [(None, "done"), (KeyboardInterrupt, "interrupted"), (SystemExit, "interrupted"), (OSError, "failed")],
)
def test_the_status_says_how_the_run_ended(store: ResultStore, raised: type[BaseException] | None, status: str) -> None:
    try:
        with store.open(SPEC, HEADER) as run:
            assert store.runs()[0].header["status"] == "started"
            if raised:
                raise raised
    except BaseException as error:
        if type(error) is not raised:
            raise
    assert store.runs()[0].header["status"] == status
    assert store.runs()[0].folder == run.folder


def test_a_finished_run_stays_finished_when_a_later_command_fails_before_it_writes(store: ResultStore) -> None:
    with store.open(SPEC, HEADER) as run:
        run.append(record("a"))
    with pytest.raises(OSError), store.open(SPEC, HEADER):  # noqa: PT011 (any will do)
        raise OSError
    with store.open(SPEC, HEADER) as run:
        assert run.header["sessions"][-2]["status"] == "done"
    with pytest.raises(OSError), store.open(SPEC, HEADER) as run:  # noqa: PT011, PT012
        run.append(record("b"))
        raise OSError
    assert store.runs()[0].header["status"] == "failed"


def test_fresh_starts_again(store: ResultStore, samples: Path) -> None:
    with store.open(SPEC, HEADER, fresh=True) as run:
        assert not run.records
        assert len(run.header["sessions"]) == 1


def test_maintenance_leaves_status_and_sessions_alone(store: ResultStore) -> None:
    with pytest.raises(ZeroDivisionError), store.open(SPEC, HEADER):
        raise ZeroDivisionError
    with store.reopen(store.runs()[0]) as run:
        run.append(record("a"))
    (view,) = store.runs()
    assert (view.header["status"], len(view.header["sessions"]), len(view.records)) == ("failed", 1, 1)


def test_a_reader_sees_whole_lines_while_somebody_writes(store: ResultStore) -> None:
    with store.open(SPEC, HEADER) as run:
        run.append(record("a"))
        path = run.folder / "samples.jsonl"
        path.write_bytes(path.read_bytes() + b'{"schema":1,"id"')
        assert set(store.runs()[0].records) == {("a", "accuracy")}
        assert path.read_bytes().endswith(b'"id"')


@pytest.mark.parametrize("content", [b"{", b'{"schema": 99}', b"[]"])
def test_a_header_that_cannot_be_read_is_a_sentence(store: ResultStore, samples: Path, content: bytes) -> None:
    (samples.parent / "header.json").write_bytes(content)
    with pytest.raises(UsageError, match=r"header\.json"):
        store.open(SPEC, HEADER)
    store.open(SPEC, HEADER, fresh=True).close()


def test_an_empty_directory_holds_no_results(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no results"):
        ResultStore(tmp_path).runs()


def test_an_output_that_is_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        ResultStore(tmp_path / "runs").open(SPEC, HEADER)


# One writer.


def test_a_second_writer_is_refused_and_told_who_is_first(store: ResultStore) -> None:
    with store.open(SPEC, HEADER), pytest.raises(UsageError, match=f"written by process {os.getpid()}; wait"):
        store.open(SPEC, HEADER)
    store.open(SPEC, HEADER).close()


def test_a_child_that_outlives_its_parent_does_not_hold_the_lock(store: ResultStore) -> None:
    run = store.open(SPEC, HEADER)
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.write(writer, b"up")
        signal.pause()
        os._exit(0)
    try:
        os.read(reader, 2)
        run.close()
        reopened(store)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


WRITER = """
    import sys
    sys.path[:0] = [{root!r}, {tests!r}]
    from test_store import HEADER, SPEC, ResultStore, record
    with ResultStore({store!r}).open(SPEC, HEADER) as run:
        for number in range(100_000):
            run.append(record(str(number), raw_text="x" * 5000))
            print(number, flush=True)
"""


def test_a_killed_writer_keeps_every_finished_sample_and_no_lock(store: ResultStore) -> None:
    script = textwrap.dedent(WRITER).format(root=str(ROOT), tests=str(Path(__file__).parent), store=str(store.root))
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout
        said = [writer.stdout.readline() for _ in range(50)]
        with pytest.raises(UsageError, match=str(writer.pid)):
            store.open(SPEC, HEADER)
        writer.kill()
        said += writer.stdout.readlines()
    run = reopened(store)
    assert {number.strip() for number in said if number.endswith("\n")} <= run.done("accuracy")
    assert len(run.records) <= len(said) + 1
    assert not run.records.damaged
    assert run.header["sessions"][0]["status"] == "started"


# A full disk.


def fill(run: Run) -> None:
    """Append until the disk refuses."""
    for number in range(1000):
        run.append(record(str(number), raw_text="x" * 3000))


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


def test_a_full_disk_keeps_what_is_finished(tiny_disk: Path) -> None:
    store = ResultStore(tiny_disk / "runs")
    with pytest.raises(RunError, match=os.strerror(errno.ENOSPC)), store.open(SPEC, HEADER) as run:
        fill(run)
    (view,) = store.runs()
    assert view.header["status"] in ("started", "failed")
    assert view.records.torn_bytes == 0
    assert view.records.done("accuracy") == run.done("accuracy")
    assert len(view.records) > 5
    ballast = view.folder / "samples.jsonl"
    os.truncate(ballast, len(ballast.read_bytes().splitlines(keepends=True)[0]))  # somebody makes room
    with store.open(SPEC, HEADER) as run:
        run.append(record("more"))
    assert reopened(store).done("accuracy") == {"0", "more"}


def test_a_line_that_was_written_in_part_is_taken_back(store: ResultStore) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    run = store.open(SPEC, HEADER)
    run.append(record("big", raw_text="x" * 1_000_000))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_010_000, hard))  # the kernel then writes a part, as on a full disk
    try:
        with pytest.raises(RunError, match=r"everything finished is kept.*resumes"):
            fill(run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    run.append(record("after"))
    run.close()
    assert reopened(store).done("accuracy") == {"big", "0", "1", "after"}
    assert not reopened(store).repaired


def test_it_syncs_at_most_once_a_second(store: ResultStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with store.open(SPEC, HEADER) as run:
        synced: list[int] = []
        clock = itertools.count(time.monotonic(), 0.1)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", synced.append)
            patch.setattr(time, "monotonic", lambda: next(clock))
            for number in range(20):  # two seconds by this clock
                run.append(record(str(number)))
        assert 1 <= len(synced) <= 2


# Speed.


def test_ten_thousand_records_open_within_a_second(store: ResultStore) -> None:
    frames = [Frame(index, index / 2) for index in range(128)]
    first_token = {"ids": list(range(64)), "logprobs": [-1.23456] * 64, "tail": -9.0}
    line = record("number-0", raw_text="an answer", frames=frames, first_token=first_token).to_line().encode()
    body = line.rpartition(b',"crc":')[0]
    path = reopened(store).folder / "samples.jsonl"
    with path.open("wb") as file:
        for number in range(10_000):
            each = body.replace(b"number-0", b"number-%d" % number)
            file.write(each + b',"crc":%d}\n' % zlib.crc32(each))
    started = time.process_time()  # not wall clock: the machine is shared
    run = reopened(store)
    assert len(run.done("accuracy")) == 10_000
    assert time.process_time() - started < 1
