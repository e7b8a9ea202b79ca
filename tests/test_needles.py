"""MMInference's own study: what is committed is what its rows say, nothing is run twice, depths and recalls are true ones."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from vlmbench import needles
from vlmbench.claims_study import Scale
from vlmbench.errors import UsageError
from vlmbench.kernels.grid import Grid, visible
from vlmbench.madeup import Shape
from vlmbench.methods.mminference import Mminference
from vlmbench.mm_patterns import Head, Intra, Run, Scene
from vlmbench.mm_recall import ROWS, head_recall, planted_recall
from vlmbench.needles_plots import arranged, draw, short
from vlmbench.needles_study import (
    BOUNDARIES,
    CAREFUL,
    FULL,
    PATTERNS,
    curve_methods,
    map_methods,
    modality,
    needle_depth,
)
from vlmbench.needles_text import PARTS, to_markdown
from vlmbench.publish import machine_texts
from vlmbench.session import make_methods
from vlmbench.suites._synth.captions import len_captions, make_remarks
from vlmbench.suites._synth.scene import make_scene
from vlmbench.suites.synthmixed import SynthMixed
from vlmbench.suites.synthvideo import SynthVideo

ROOT = Path(__file__).parents[1]
COMMITTED = ROOT / "results" / "cpu" / "mminference.json"
MODEL = "tiny-qwen2.5-vl"
SMALL = Scale(lengths=(4,), limit=1, threads=1)


def test_the_committed_report_and_its_pictures_are_those_of_the_committed_rows(tmp_path: Path) -> None:
    data = json.loads(COMMITTED.read_text())
    text = COMMITTED.with_suffix(".md").read_text()
    assert machine_texts(ROOT / "results")[COMMITTED.with_suffix(".md")] == to_markdown(data) == text
    linked = {ROOT / "results" / "cpu" / name for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)}
    assert linked == set((ROOT / "results" / "cpu" / "mminference").glob("*.png"))
    assert all(path.stat().st_size < 200_000 for path in linked)


def row(**more: Any) -> dict[str, Any]:
    numbers = {"accuracy": 0.5, "accuracy_low": 0.2, "accuracy_high": 0.8, "n": 4, "n_failed": 0, "n_inactive": 0}
    delta = {"delta": -0.25, "delta_low": -0.5, "delta_high": 0.1}
    cost = {"pairs_relative": 0.4, "flops_relative": 0.9, "recall": 0.7}
    return {"model": "m", "method": "mminference:pattern=vs", **numbers, **delta, **cost, **more}


def made_up() -> dict[str, Any]:
    none, q = "mminference:pattern=vs,budget=0.5", "mminference:pattern=vs,budget=0.5,boundary=q"
    gain = {"gain": 0.5, "gain_low": 0.25, "gain_high": 0.75}
    rows = [
        row(part="curve", suite="s", delta_low=-0.5, delta_high=-0.1),
        row(part="curve", suite="s", pairs_relative=0.8, delta=-0.9),
        *(row(part="maps", method=each, length=n, depth=d) for each in (none, q) for n in (8, 16) for d in (0.0, 1.0)),
        row(part="maps", method=none),
        row(part="maps", method=q, **gain),
        row(part="mixed", method=q, length=8, depth="first"),
        row(part="mixed", method=q, **gain),
        row(part="mixed", method=q, asks="text"),
        {"model": "m", "part": "recall", "suite": "s", "pattern": "vs", "recall": [[0.25, 0.5], [1.0, 0.75]]},
        {"model": "m", "part": "recall", "planted": 99, "head": "grid", "heads": 3, "recall": 0.9, "density": 0.1},
    ]
    return {"schema": 1, "models": {"m": "abc"}, "measured_on": ["here"], "rows": rows}


def test_every_sentence_follows_from_the_rows() -> None:
    text = to_markdown(made_up())
    assert (
        "**Did not hold**: `mminference:pattern=vs`, within 2 points of full attention: -0.25 [-0.50, -0.10] (40% of the "
        "pairs, 90% of the FLOPs)." in text
    )
    assert "-0.90" in text  # in the table, but dearer than half and so not judged
    assert "full attention: -0.90" not in text
    assert "- vs under `boundary=q` against none: +0.50 [+0.25, +0.75], a gain; 0.40 of full attention's pairs." in text
    assert "| s | vs | 0.38 | 0.88 | 0.62 | 0.25 |" in text  # layers, their mean, and the worst head
    empty = to_markdown(made_up() | {"rows": []})
    assert empty.count("**m**: not measured.") == len(PARTS)


def test_what_the_table_shows_as_half_is_judged() -> None:
    """A grid at 0.503 stood in the table as 0.50, and its loss in no sentence."""
    for pairs, judged in ((0.504, True), (0.506, False)):
        text = to_markdown(made_up() | {"rows": [row(part="curve", suite="s", pairs_relative=pairs)]})
        assert ("full attention: -0.25" in text) == judged


def test_the_text_says_how_many_questions_a_verdict_needs_and_how_many_settings_are_alike() -> None:
    from vlmbench.methods_text import least_questions

    assert f"which fewer than {least_questions()} questions cannot show" in to_markdown(made_up())
    whole = [
        row(part="maps", method=method) for method in ("full", "mminference:pattern=vs", "mminference:pattern=tri")
    ]
    said = "2 of 2 settings answer at least as many of the 4 questions as full attention"
    assert said in to_markdown(made_up() | {"rows": whole})
    assert "settings answer at least as many" not in to_markdown(
        made_up() | {"rows": [*whole[:2], {**whole[2], "accuracy": 0.4}]}
    )


def test_maps_stand_in_a_column_a_pattern_and_a_line_a_boundary() -> None:
    lines = [[each and short(each) for each in line] for line in arranged(map_methods())]
    assert lines == [
        ["full", "sf-fixed", "sf-strided", "minference", "fitted"],
        ["a_shape", "tri", "grid", "vs", None],
        ["a_shape, q", "tri, q", "grid, q", "vs, q", None],
        ["a_shape, 2d", "tri, 2d", "grid, 2d", "vs, 2d", None],
    ]
    few = ["full", "mminference:pattern=vs", "mminference:pattern=vs,boundary=2d"]
    assert arranged(few) == [["full", None, None, None, None], [few[1], *[None] * 4], [few[2], *[None] * 4]]
    assert len(arranged([str(number) for number in range(7)])) == 2


def test_a_picture_is_drawn_for_every_part_that_has_rows(tmp_path: Path) -> None:
    data = made_up()
    assert [path.name for path in draw(data, tmp_path)] == ["maps-m.png", "mixed-m.png", "curve-m.png", "recall-m.png"]
    data["rows"] = [each for each in data["rows"] if each["part"] == "recall"]
    assert [path.name for path in draw(data, tmp_path)] == ["recall-m.png"]


def test_maps_hold_every_pattern_and_boundary() -> None:
    names = [short(method) for method in map_methods()]
    assert len(set(names)) == len(names)
    assert {FULL, *PATTERNS, "fitted"} <= set(names)
    assert {"sf-fixed", "sf-strided", "minference"} <= set(names)
    assert {f"{pattern}, {boundary}" for pattern in PATTERNS for boundary in BOUNDARIES} <= set(names)
    assert short(CAREFUL) == "fitted, dense_layers=2"
    made = make_methods([*map_methods(), *curve_methods("synthvideo:length=128")])
    assert {method.name for method in made} == {"full", "mminference"}


def test_the_depth_of_a_needle_is_where_its_caption_or_event_lies() -> None:
    """For every question of the suite there is one; a remark's is its caption's."""
    seen = {"frames": 0, "text": 0, "frames and text": 0}
    for sample in SynthMixed(length=64).samples()[:90]:
        depth = needle_depth(sample)
        assert 0 <= depth < 1
        seen[modality(sample)] += 1
        scene = make_scene(sample.extra["seed"], 64)
        if modality(sample) == "text":
            said = [
                remark for remark in make_remarks(scene) if {remark.animal, remark.number} & {*sample.question.split()}
            ]
            assert [remark.caption / len_captions(64) for remark in said] == [depth]
        else:
            assert depth in [event.start / 64 for event in scene.events]
    assert min(seen.values()) > 0


def test_recall_is_the_share_of_attention_on_what_a_pattern_keeps() -> None:
    n, stride, phase = 640, 16, 5
    scene = Scene((Run(True, 0, n),), stride, 4)
    q, k = (torch.randn(1, heads, n, 32, generator=torch.Generator().manual_seed(heads)) for heads in (2, 1))
    q[:, 0, :, 0], k[..., 0] = 6.0, 0.0
    k[:, :, phase::stride, 0] = 6.0  # what head 0 looks at
    for pattern in (Intra("dense"), Intra("grid", stride="1", phase=0, local=1)):
        recall, density = head_recall(q, k, [Head(pattern, pattern)] * 2, scene)
        torch.testing.assert_close(recall, torch.ones(2))
        assert density == 1.0
    found = {}
    for at in (phase, phase + 3):
        grid = Intra("grid", sink=1, local=8, stride="frame", phase=at, horizontal=False)
        found[at], density = head_recall(q, k, [Head(grid, grid)] * 2, scene)
        rows = torch.linspace(0, n - 1, ROWS).long()
        scores = (q[0] @ k[0].mT * 32**-0.5)[:, rows].masked_fill(torch.arange(n) > rows[:, None], float("-inf"))
        keys = visible(Grid(1, 8, 1, n, stride, horizontal=False), torch.tensor([[(at - 1) % stride] * 2]), rows, n)[0]
        torch.testing.assert_close(found[at], (scores.softmax(-1) * keys).sum(-1).mean(-1), rtol=1e-5, atol=1e-6)
    assert float(found[phase][0]) > 0.9 > 0.5 > float(found[phase + 3][0])
    assert density < 0.15


def test_planted_heads_are_kept_by_their_own_patterns() -> None:
    shape = Shape(32, 32, 5, 5, 64)
    rows = {each["head"]: each for each in planted_recall(shape, Mminference(pattern="mix"))}
    assert {kind: each["heads"] for kind, each in rows.items()} == {"grid": 3, "vs": 1, "a_shape": 1}
    for kind in ("grid", "vs"):
        assert rows[kind]["recall"] > 0.8 > 2 * rows[kind]["density"]


def test_a_second_call_runs_nothing_and_parts_that_were_not_asked_for_keep_their_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SynthVideo, "max_new_tokens", 2)
    monkeypatch.setattr("vlmbench.needles_study.map_methods", lambda: [FULL, "mminference:pattern=vs,budget=0.5"])
    monkeypatch.setattr("vlmbench.needles_study.DEPTHS", (0.0, 1.0))
    runs, out = tmp_path / "runs", tmp_path / "out"
    first = needles.measure([MODEL], ["maps"], runs, out, SMALL)
    assert [each.get("depth") for each in first["rows"]] == [0.0, 0.0, 1.0, 1.0, None, None]
    assert all(
        each["n"] == 2 and "delta" in each for each in first["rows"] if each["method"] != FULL and "depth" not in each
    )
    before = {path: path.read_bytes() for path in runs.rglob("samples.jsonl")}
    needles.measure([MODEL], ["maps", "recall"], runs, out, SMALL)
    assert {path: path.read_bytes() for path in runs.rglob("samples.jsonl")} == before
    data = needles.stored(out)
    assert [each for each in data["rows"] if each["part"] == "maps"] == json.loads(json.dumps(first["rows"]))[:6]
    heads = [each for each in data["rows"] if each["part"] == "recall" and "suite" in each]
    assert {each["pattern"] for each in heads} == {*PATTERNS, "fitted"}
    assert all(0 <= share <= 1.0001 for each in heads for layer in each["recall"] for share in layer)
    assert (out / "mminference.md").read_text() == to_markdown(data)
    data["models"][MODEL] = "other weights"
    needles.write(data, out)
    again = needles.measure([MODEL], [], runs, out, SMALL)
    assert again["rows"] == []


def test_what_cannot_be_measured_is_refused_in_a_sentence(tmp_path: Path) -> None:
    nothing: dict[str, Any] = {"model": None, "part": None, "limit": None, "length": None, "out": tmp_path}
    for options, said in (
        ({"part": ["map"]}, "--part must be of recall, curve, mixed, maps, not 'map'"),
        ({"limit": 0}, "--limit must be above 0, not 0"),
        ({"length": [1]}, "--length must be at least 2 frames, not 1"),
    ):
        with pytest.raises(UsageError, match=said):
            needles.main(**{**nothing, **options})
    (tmp_path / "mminference.json").write_text("{")
    with pytest.raises(UsageError, match="cannot be read"):
        needles.stored(tmp_path)
