"""What a run does: each pass by its rules, failed samples again, and nothing twice."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlmbench.kernels.block_attention import SlowPath, blocks
from vlmbench.progress import Progress
from vlmbench.record import Timing
from vlmbench.request import RunRequest
from vlmbench.runner import _faster_dense, median_timing, run
from vlmbench.session import Session
from vlmbench.store import ResultStore

SUITE = "synthvideo:length=32"


def views(out: Path) -> dict[str, Any]:
    return {view.header["spec"]["method"]: view for view in ResultStore(out).runs()}


def request(out: Path, **options: Any) -> RunRequest:
    given: dict[str, Any] = {"model": "dummy", "suite": SUITE, "limit": 12, "out": out, **options}
    return RunRequest(**given)


def test_every_pass_leaves_its_own_records_and_the_baseline_comes_along(tmp_path: Path) -> None:
    assert run(request(tmp_path, methods=("blind",), timed=3), Progress(terminal=False)) == 0
    found = views(tmp_path)
    assert set(found) == {"full", "blind"}
    for view in found.values():
        assert {pass_: len(view.records.of(pass_)) for pass_ in ("accuracy", "latency", "memory")} == {
            "accuracy": 12,
            "latency": 3,
            "memory": 3,
        }
        for record in view.records.of("latency").values():
            assert record.prediction is None  # a latency pass feeds no accuracy
            assert len(record.rounds) == len(record.baseline_rounds) == 3
            assert record.timing == median_timing(record.rounds)


def test_the_same_command_again_writes_nothing(tmp_path: Path) -> None:
    asked = request(tmp_path, methods=("pevlm",))
    run(asked, Progress(terminal=False))
    before = {name: (view.folder / "samples.jsonl").read_bytes() for name, view in views(tmp_path).items()}
    run(asked, Progress(terminal=False))
    assert {name: (view.folder / "samples.jsonl").read_bytes() for name, view in views(tmp_path).items()} == before


def test_a_larger_limit_only_adds(tmp_path: Path) -> None:
    run(request(tmp_path, mode="accuracy"), Progress(terminal=False))
    few = views(tmp_path)["full"].records.of("accuracy")
    run(request(tmp_path, mode="accuracy", limit=30), Progress(terminal=False))
    more = views(tmp_path)["full"].records.of("accuracy")
    assert len(more) == 30
    assert all(more[id_] == record for id_, record in few.items())


def test_a_sample_that_failed_is_tried_again_and_counted(tmp_path: Path) -> None:
    asked = request(tmp_path, model="dummy:fail=0.5", mode="accuracy")
    assert run(asked, Progress(terminal=False)) == 0
    failed = [r for r in views(tmp_path)["full"].records.values() if r.status == "error"]
    assert 0 < len(failed) < 12
    assert {record.attempts for record in failed} == {1}
    run(asked, Progress(terminal=False))
    again = views(tmp_path)["full"].records
    assert {again[r.id, r.pass_].attempts for r in failed} == {2}
    assert {r.attempts for r in again.values() if r.status != "error"} == {1}


def test_strict_turns_a_failed_sample_into_exit_code_1(tmp_path: Path) -> None:
    asked = request(tmp_path, model="dummy:oom=0.5", mode="accuracy", strict=True)
    assert run(asked, Progress(terminal=False)) == 1


@pytest.mark.parametrize("limit", [(), ("--latency-limit", 1000)], ids=["passes", "ladder"])
@pytest.mark.parametrize(("strict", "code"), [((), 0), (("--strict",), 1)], ids=["", "strict"])
def test_strict_accepts_no_masked_path(
    cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: Any, strict: Any, code: int
) -> None:
    right = blocks.block_attention

    def slow(*args: Any, **options: Any) -> Any:
        warnings.warn("No kernel. The masked reference stands in, as slow as dense.", SlowPath, stacklevel=1)
        return right(*args, **options)

    monkeypatch.setattr(blocks, "block_attention", slow)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SlowPath)
        called = cli(
            *("run", "--model", "mini-llava-ov@random", "--suite", SUITE, "--limit", 1, "--timed", 1, "--repeats", 1),
            *("--method", "pevlm:sink=1,block=1", "--frames", 4, "--out", tmp_path, *limit, *strict),
        )
    assert called.code == code


def test_timed_videos_go_round_the_lengths(tmp_path: Path) -> None:
    session = Session(request(tmp_path, suite="synthvideo", limit=None, timed=6), Progress(terminal=False))
    timed = session.timed_samples()
    assert sorted(sample.strata["length"] for sample in timed) == ["128", "128", "32", "32", "384", "384"]
    assert len({sample.cluster for sample in timed}) == 6


def test_the_denominator_is_the_faster_dense_kernel() -> None:
    slow, fast = [Timing(e2e_s=2.0)] * 3, [Timing(e2e_s=1.0)] * 3
    assert _faster_dense({"best": slow, "own": fast}) == "own"
    assert _faster_dense({"best": fast, "own": slow}) == "best"
    assert _faster_dense({"best": [], "own": fast}) == "own"
    assert _faster_dense({"best": fast}) == "best"


def test_a_method_that_never_acts_is_an_error_not_a_result(cli: Callable[..., Any], tmp_path: Path) -> None:
    called = cli(
        *("run", "--model", "mini-llava-ov@random", "--suite", SUITE, "--limit", 2, "--mode", "accuracy"),
        *("--method", "pevlm:block=1000", "--out", tmp_path),
    )
    assert called.code == 1
    assert "pevlm had nothing to do on any of 2 records (one block: equals full attention)" in called.err


@pytest.mark.parametrize("option", ["--data-root", "--sampler"])
def test_options_that_mean_nothing_here_are_refused(cli: Callable[..., Any], tmp_path: Path, option: str) -> None:
    called = cli("run", "--model", "dummy", "--suite", SUITE, "--out", tmp_path, option, "fps")
    assert called.code == 2
    assert option in called.err


def test_a_changed_method_file_is_said_when_its_old_records_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = request(tmp_path, methods=("blind",), mode="accuracy")
    run(asked, Progress(terminal=False))
    assert "--fresh starts again" not in capsys.readouterr().err
    other = tmp_path / "other.py"
    other.write_text("# another version of the method")
    monkeypatch.setattr("vlmbench.session.inspect.getsourcefile", lambda cls: str(other))
    run(asked, Progress(terminal=False))
    assert "before blind's code changed; --fresh starts again" in capsys.readouterr().err
