"""The study of every method: each beside trivial ones at its budget, resumed, its text from its rows alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vlmbench import methods_plots, methods_study, methods_text
from vlmbench.errors import UsageError
from vlmbench.publish import machine_texts
from vlmbench.store import ResultStore

SUITE = "synthvideo:length=32"
MODEL = "tiny-qwen2.5-vl"
FEW = {
    "references": ("blind",),
    "pevlm": ("pevlm:sink=1,block=2",),
    "turbo": ("turbo:mode=drop",),
    "mminference": ("mminference:artefact=nowhere.json",),
    "corematching": ("corematching:part=neurons",),
    "trivial": ("uniform:ratio=0.5", "random:ratio=0.25"),
}


def study(path: Path, limit: int = 2) -> dict[str, Any]:
    return methods_study.study_all([MODEL], [SUITE], limit, path / "runs", path / "out")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    path = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(methods_study, "curves", lambda suite: FEW)
        return path, study(path)


def by_method(data: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["method"]: row for row in data["rows"]}


def test_a_row_holds_accuracy_cost_and_the_rivals_at_its_budget(measured: tuple[Path, dict[str, Any]]) -> None:
    rows = by_method(measured[1])
    assert list(rows) == ["full", *(method for band in FEW.values() for method in band)]
    assert (rows["full"]["kept_share"], rows["full"]["flops_share"], rows["full"]["kv_share"]) == (1, 1, 1)
    assert rows["blind"]["kept"] == 0
    turbo = rows["turbo:mode=drop"]
    assert turbo["kept_share"] == 0.5
    assert turbo["flops_share"] < 1
    assert turbo["vision_share"] < 1
    tokens = round(turbo["kept"])
    names = [f"uniform:tokens={tokens}", f"random:tokens={tokens}", "downsample:ratio=0.5"]
    assert [each["method"] for each in turbo["rivals"]] == names
    assert turbo["best"] in names
    # PEVLM keeps every token and saves pairs: its rivals spend as many FLOPs on fewer tokens.
    pevlm = rows["pevlm:sink=1,block=2"]
    assert pevlm["kept_share"] == 1
    assert 0 < pevlm["budget"] < rows["full"]["kept"]
    # Neurons spare no token of prefill: a method that saves nothing is not spared what spends less and answers better.
    neurons = rows["corematching:part=neurons"]
    assert neurons["budget"] == rows["full"]["kept"]
    assert [each["method"] for each in neurons["rivals"]] == list(FEW["trivial"])
    assert neurons["best"] in FEW["trivial"]


def test_what_cannot_run_is_a_row_with_its_reason(measured: tuple[Path, dict[str, Any]]) -> None:
    refused = by_method(measured[1])["mminference:artefact=nowhere.json"]["refused"]
    assert "nowhere.json" in refused
    assert (
        f"- Not run: `mminference:artefact=nowhere.json`: {refused}" in (measured[0] / "out" / "methods.md").read_text()
    )


def test_a_second_call_answers_nothing_again(
    measured: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, data = measured
    before = {run.folder: (run.folder / "samples.jsonl").read_bytes() for run in ResultStore(path / "runs").runs()}
    monkeypatch.setattr(methods_study, "curves", lambda suite: FEW)
    again = study(path)
    assert again["rows"] == json.loads(json.dumps(data["rows"]))
    assert {folder: (folder / "samples.jsonl").read_bytes() for folder in before} == before


def test_the_text_is_made_from_the_rows_alone(measured: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """`make tables` keeps it in step."""
    (tmp_path / "cpu").mkdir()
    for name in ("methods.json",):
        (tmp_path / "cpu" / name).write_bytes((measured[0] / "out" / name).read_bytes())
    assert machine_texts(tmp_path) == {
        tmp_path / "cpu" / "methods.md": (measured[0] / "out" / "methods.md").read_text()
    }


def row(share: float, delta: float, low: float, high: float, **more: Any) -> dict[str, Any]:
    given = {"method": f"turbo:r={share}", "kept_share": share, "flops_share": share, "n": 44, "n_inactive": 0}
    return {**given, "delta": delta, "delta_low": low, "delta_high": high, **more}


@pytest.mark.parametrize(
    ("rows", "begins", "said"),
    [
        ([row(0.5, 0.0, -0.04, 0.04)], "- **Held**", "turbo:r=0.5"),
        ([row(0.5, -0.3, -0.4, -0.2)], "- **Did not hold**", "no setting here is within 2 points"),
        ([row(0.5, 0.0, -0.2, 0.2)], "- **Open**", "turbo:r=0.5"),
        # Nearest to half, not the best of those below it; the best is named beside it.
        ([row(0.4, -0.3, -0.4, -0.2), row(0.2, 0.0, -0.01, 0.01)], "- **Did not hold**", "20% with `turbo:r=0.2`"),
        (
            [
                row(0.5, -0.3, -0.4, -0.2)
                | {"rivals": [{"method": "uniform", "gap": 0.01, "gap_low": -0.1, "gap_high": 0.1}], "best": "uniform"}
            ],
            "- **Did not hold**",
            "; +0.01 [-0.10, +0.10] against `uniform`, which spends as much",
        ),
        # Of equal tokens the one that spends most in the tower, whatever it answered.
        (
            [row(0.5, 0.0, -0.01, 0.01, vision_share=0.5), row(0.5, -0.3, -0.4, -0.2, vision_share=0.9, method="b")],
            "- **Did not hold**",
            "-0.30 [-0.40, -0.20] with `b`",
        ),
        # What fails on more than half of the tokens did not hold at half of them; what does not says nothing about half.
        (
            [row(0.8, -0.3, -0.4, -0.2)],
            "- **Did not hold**",
            "the least is 80% with `turbo:r=0.8`, -0.30 [-0.40, -0.20] (a loss",
        ),
        ([row(0.8, 0.0, -0.01, 0.01)], "- **Not judged**", "(there: held)"),
        ([row(1.0, -0.3, -0.4, -0.2)], "- **Did not hold**", "it keeps every token"),
        ([row(1.0, 0.0, -0.01, 0.01, n_inactive=44)], "- **Not judged**", "it keeps every token"),
        ([row(0.5, 0.0, 0.0, 0.0, n_inactive=44)], "- **Not judged**", ""),
        ([row(0.5, 0.0, 0.0, 0.0) | {"kept_share": None}], "- **Not measured**", ""),
    ],
)
def test_the_verdict_is_read_from_the_rows(rows: list[dict[str, Any]], begins: str, said: str) -> None:
    text = methods_text.verdict("turbo", rows)
    assert text.startswith(begins)
    assert said in text


def test_the_text_says_how_many_questions_a_verdict_needs() -> None:
    """Of 44 questions not even equal answers to all are held to be near: the reader must not take that for a loss."""
    from vlmbench.stats import paired_delta

    least = methods_text.least_questions()
    for n, verdict in ((least - 1, "Open"), (least, "Held")):
        found = paired_delta([1.0] * n, [1.0] * n, range(n))
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        same = row(0.5, found.value, found.low, found.high, n=n)
        assert methods_text.verdict("turbo", [same]).startswith(f"- **{verdict}**")
    said = methods_text.to_markdown({"rows": [], "models": [], "measured_on": []})
    assert f"Fewer than {least} questions cannot show *held*" in said


def test_an_interval_below_zero_is_shown_below_zero() -> None:
    """A mark beside ``[-0.22, +0.00]`` would contradict the row that it stands in."""
    from vlmbench.claims_verdict import signed

    for value, said in (
        (-0.00043, "-0.0004"),
        (0.0049, "+0.005"),
        (0.0, "+0.00"),
        (-0.0, "+0.00"),
        (-0.005, "-0.01"),
        (0.123, "+0.12"),
    ):
        assert signed({"x": -0.3, "x_low": -0.4, "x_high": value}, "x") == f"-0.30 [-0.40, {said}]"


def test_all_places_together_count_who_is_worse_than_a_trivial_method_and_who_better() -> None:
    def against(low: float, *, below: bool, band: str = "turbo", **more: Any) -> dict[str, Any]:
        rivals = [{"method": "uniform", "accuracy": 0.5, "gap": 0.1, "gap_low": low, "gap_high": 0.2}]
        at = {
            "model": MODEL,
            "suite": SUITE,
            "band": band,
            "marks": [],
            "agreement": 1.0,
            "vision_share": None,
            "kv_share": 1.0,
        }
        own = {
            "accuracy": 0.5,
            "accuracy_low": 0.4,
            "accuracy_high": 0.6,
            "kept": 1,
            "rivals": rivals,
            "best": "uniform",
        }
        return {**at, **own, **row(0.5, -0.3, -0.4, -0.2), "below_trivial": below, **more}

    rows = [
        *(against(-0.1, below=below) for below in (True, False, False)),
        against(0.05, below=False, delta=0.0),
        against(0.05, below=False, n_inactive=44),  # it was full attention
        against(0.05, below=False, band="pevlm", rivals=[]),
    ]
    data = {"rows": rows, "models": [{"model": MODEL, "weights_hash": "a"}], "measured_on": []}
    text = methods_text.to_markdown(data)
    assert "| Turbo | 4 | 1 | 2 | 1 | 1 |" in text
    assert "| PEVLM |" not in text


def test_a_picture_is_drawn_for_every_model_and_linked(measured: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out = measured[0] / "out"
    drawn = out / "methods" / f"{MODEL}.png"
    assert 5_000 < drawn.stat().st_size < 200_000
    assert f"](methods/{MODEL}.png)" in (out / "methods.md").read_text()
    assert methods_plots.draw({"rows": [], "models": measured[1]["models"]}, tmp_path) == []
    (tmp_path / "methods.json").write_bytes((out / "methods.json").read_bytes())
    methods_study.main(out=tmp_path, redraw=True)
    assert (tmp_path / "methods" / f"{MODEL}.png").read_bytes() == drawn.read_bytes()
    assert (tmp_path / "methods.md").read_text() == (out / "methods.md").read_text()


def test_trivial_methods_stand_where_they_spend_as_much(measured: tuple[Path, dict[str, Any]]) -> None:
    rows = by_method(measured[1])
    points = methods_plots.trivial_points(list(rows.values()))
    for method in ("turbo:mode=drop", "pevlm:sink=1,block=2"):
        own = rows[method]
        best = max(own["rivals"], key=lambda each: each["accuracy"])
        assert (own["flops_share"], 100 * best["accuracy"]) in points
    assert rows["corematching:part=neurons"]["flops_share"] not in {x for x, _ in points}  # whose rivals are cheaper
    assert len(points) == len(set(points)) <= 4


def test_rows_of_other_weights_go() -> None:
    data: dict[str, Any] = {"models": [], "rows": [], "measured_on": []}
    for weights, value in (("a", 1), ("b", 2)):
        methods_study.enter(data, MODEL, weights, SUITE, [{"method": "full", "value": value}], ["here"])
        methods_study.enter(data, MODEL, weights, "synthimage", [{"method": "full", "value": value}], ["here"])
    assert data["models"] == [{"model": MODEL, "weights_hash": "b"}]
    assert [each["value"] for each in data["rows"]] == [2, 2]


def test_every_setting_is_a_method() -> None:
    from vlmbench.session import make_methods

    for suite in methods_study.SUITES:
        for settings in methods_study.curves(suite).values():
            for method in settings:
                if "artefact" not in method:
                    make_methods([method])


def test_bad_input_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "methods.json").write_text("{")
    with pytest.raises(UsageError, match=r"methods\.json cannot be read .*; delete it, or name another --out\."):
        methods_study.stored(tmp_path)
    command = [sys.executable, "-m", "vlmbench.methods_study", "--limit", "0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "--limit must be at least 1, not 0.\n")
