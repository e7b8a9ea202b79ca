"""The project's gate on its own work notices every count that moves, and the study of `gate` does what CI does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import load_mini
from vlmbench import gate_study, work_gate
from vlmbench.gate import Judged
from vlmbench.gate_study import Repeat, repeat, slowed, to_markdown
from vlmbench.patch import fingerprint
from vlmbench.request import RunRequest
from vlmbench.session import make_methods
from vlmbench.stats import Estimate
from vlmbench.work_gate import FILE, counted, differences, settled

COMMITTED = Path(__file__).resolve().parents[1] / FILE
MODEL = "mini-llava-ov@random"


@pytest.fixture(scope="module")
def fresh() -> list[dict[str, Any]]:
    methods = make_methods(["full", "uniform:ratio=0.5", "pevlm:sink=1,block=1"])
    return list(counted(load_mini(MODEL), MODEL, methods))


def test_counts_are_repeatable_and_say_what_the_method_saves(fresh: list[dict[str, Any]]) -> None:
    again = list(counted(load_mini(MODEL), MODEL, make_methods(["full", "uniform:ratio=0.5", "pevlm:sink=1,block=1"])))
    assert differences(fresh, again) == []
    full, uniform, pevlm = fresh
    assert uniform["visual_tokens"] * 2 == full["visual_tokens"]
    assert all(uniform[name] < full[name] for name in ("tokens", "pairs", "flops", "kv_bytes"))
    assert pevlm["pairs"] < full["pairs"]
    assert pevlm["tokens"] == full["tokens"]


def test_committed_counts_are_those_of_the_code(fresh: list[dict[str, Any]]) -> None:
    """The cheap part of ``python -m vlmbench.work_gate``, which `.ci/run` does for every method and family."""
    rows = {(row["model"], row["method"]): row for row in json.loads(COMMITTED.read_text())["rows"]}
    assert rows[MODEL, "full"] == fresh[0]


@pytest.mark.parametrize("name", ["tokens", "pairs", "neurons", "flops", "kv_bytes", "kv_reserved_bytes"])
def test_a_count_that_moved_by_one_is_named(fresh: list[dict[str, Any]], name: str) -> None:
    moved = [{**fresh[0], name: fresh[0][name] + 1}, *fresh[1:]]
    assert differences(fresh, moved) == [f"{MODEL} full: {name} {fresh[0][name]} → {fresh[0][name] + 1}"]


def test_rows_that_come_and_go_are_named(fresh: list[dict[str, Any]]) -> None:
    assert differences(fresh[1:], fresh) == [f"{MODEL} full: not in the committed file"]
    assert differences(fresh, fresh[1:]) == [f"{MODEL} full: no longer there"]
    assert differences(fresh[:1], [{**fresh[0], "more": 1}]) == [f"{MODEL} full: more None → 1"]


def test_figures_that_weights_decide_are_left_out_and_all_others_compared(fresh: list[dict[str, Any]]) -> None:
    other = [{**fresh[0], "tokens": fresh[0]["tokens"] + 1}, *fresh[1:]]
    found = settled([fresh, other, fresh])
    assert found == [{**fresh[0], "tokens": None}, *fresh[1:]]
    assert differences(found, other) == differences(found, fresh) == []
    moved = [{**other[0], "pairs": 0}, *fresh[1:]]
    assert differences(found, moved) == [f"{MODEL} full: pairs {fresh[0]['pairs']} → 0"]
    assert settled([fresh]) == fresh


def test_the_committed_file_leaves_out_what_corematchings_knee_decides_and_nothing_of_fixed_methods() -> None:
    rows = json.loads(COMMITTED.read_text())["rows"]
    free = {(row["model"], row["method"]) for row in rows if None in row.values()}
    choosing = {
        (row["model"], row["method"])
        for row in rows
        if row["method"].startswith("corematching")
        and "mode=paper" in row["method"]
        and "part=neurons" not in row["method"]
    }
    assert len(choosing) == 9
    assert free >= choosing
    assert not [
        method for _, method in free if method.startswith(("full", "uniform", "random", "turbo", "pevlm", "block"))
    ]


def test_the_slowed_method_is_the_same_method_and_leaves_nothing(clip: Any) -> None:
    from vlmbench.check_promises import Subject

    full, method = make_methods(["full", "uniform:ratio=0.5"])
    planted = slowed(method, 1.5)
    assert (planted.name, repr(planted)) == (method.name, repr(method))
    subject = Subject(load_mini(MODEL), method, full, 6)
    own = subject.answer(method, [clip(6)])
    before = fingerprint(subject.adapter.model)
    names = set(vars(subject.adapter))
    assert subject.answer(planted, [clip(6)]).done.token_ids == own.done.token_ids
    assert (fingerprint(subject.adapter.model), set(vars(subject.adapter))) == (before, names)


@pytest.mark.parametrize(
    ("verdicts", "videos"), [(["pass"], 8), (["inconclusive", "fail"], 16), (["inconclusive"] * 4, 64)]
)
def test_a_repeat_times_more_videos_until_the_gate_decides(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, verdicts: list[Any], videos: int
) -> None:
    timed: list[int] = []
    left = list(verdicts)

    def gate(*_: Any, **__: Any) -> Any:
        return [Judged(None, "speedup_e2e", 1.0, "baseline", Estimate(1.2, 1.1, 1.3), left.pop(0))], []  # type: ignore[arg-type]

    monkeypatch.setattr(gate_study, "measure", lambda request, *_: timed.append(request.timed))
    monkeypatch.setattr(gate_study.gates, "gate", gate)
    found = repeat(RunRequest(), None, tmp_path, 1.25)  # type: ignore[arg-type]
    assert (found.verdict, found.videos, found.planted) == (verdicts[-1], videos, True)
    assert timed == [8, 16, 32, 64][: len(verdicts)]


def test_the_record_counts_what_was_wrong() -> None:
    repeats = [
        Repeat(planted, verdict, 8, (1.0, None, None), 1.0) for planted in (False, True) for verdict in ("pass", "fail")
    ]
    repeats.append(Repeat(True, "inconclusive", 64, (1.0, 0.9, 1.1), 2.0))
    data = {
        "said": "What was asked.",
        "floor": 1.1,
        "rows": [{**each.__dict__, "ratio": [*each.ratio]} for each in repeats],
    }
    text = to_markdown(data)
    assert "What was asked. Versions and commit not recorded." in text
    assert "commit 0123456789ab." in to_markdown({**data, "commit": "0123456789abcdef", "versions": {}})
    assert "- unchanged code: 1 of 2 failed, 0 inconclusive" in text
    assert "- a planted slow-down: 1 of 3 caught, 1 inconclusive" in text
    assert "| 5 | slowed | inconclusive | 1.000 [0.900, 1.100] | 64 | 2 |" in text


def test_the_command_fails_when_a_count_moved(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fresh: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    import typer

    monkeypatch.setattr(work_gate, "rows", lambda **_: fresh)
    path = tmp_path / "work.json"
    with pytest.raises(typer.Exit) as ended:
        work_gate.main(path)
    assert ended.value.exit_code == 2
    work_gate.main(path, update=True)
    work_gate.main(path)
    assert "3 rows of exact counts are as committed; 0 figures" in capsys.readouterr().out
    path.write_text(path.read_text().replace('"flops": ', '"flops": 1'))
    with pytest.raises(typer.Exit) as ended:
        work_gate.main(path)
    assert ended.value.exit_code == 1
