"""LongVideoBench from its official files; where a subtitle stands between the frames is what its loader makes of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmbench.errors import UsageError
from vlmbench.session import make_suite
from vlmbench.store import ResultStore
from vlmbench.suite import Caption
from vlmbench.suites._official.subtitles import Line, read_json
from vlmbench.suites._synth.encode import write_mp4
from vlmbench.suites.longvideobench import LongVideoBench, interleaved

Cli = Callable[..., Any]
VIDEOS = ("aBc", "@user-7")
ROWS = [
    {
        "video_id": VIDEOS[number % 2],
        "id": f"{VIDEOS[number % 2]}_{number}",
        "video_path": f"{VIDEOS[number % 2]}.mp4",
        "subtitle_path": f"{VIDEOS[number % 2]}_en.json",
        "question": f"What is at moment {number}?",
        "question_wo_referring_query": "What is it?",
        "correct_choice": number % 3,
        "candidates": ["A cat", "A dog", "A bird", "A cow"][: 3 + number % 2],
        "duration": 6.0,
        "duration_group": (15, 60)[number % 2],
        "question_category": ("S2E", "T3O")[number // 2],
        "topic_category": "KH-Knowledge-History",
        "level": ("L1-Perception", "L2-Relation")[number // 2],
        "starting_timestamp_for_subtitles": 10 * (number % 2),
        "view_count": 7,
    }
    for number in range(4)
]
SUBTITLES: dict[str, list[dict[str, Any]]] = {
    "aBc_en.json": [
        {"timestamp": [0.2, 1.7], "text": "Good morning."},
        {"timestamp": [3.1, 3.3], "text": "Too short to hold a frame."},
        {"timestamp": [5.5, None], "text": "The end."},
    ],
    "@user-7_en.json": [
        {"start": "00:00:10.200", "end": "00:00:11.700", "line": "Good evening."},
        {"start": "00:00:50.000", "end": "00:00:52.000", "line": "Much later."},
    ],
}
DIRECTLY = "Answer with the option's letter from the given choices directly."


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two videos of six seconds at four frames a second, two questions each."""
    monkeypatch.setattr(LongVideoBench, "n_rows", len(ROWS))
    folder = tmp_path / "data" / "longvideobench"
    noise = np.random.default_rng(0).integers(0, 256, (24, 64, 64, 3), dtype=np.uint8)
    for name in VIDEOS:
        write_mp4(noise, folder / "videos" / f"{name}.mp4", fps=4)
    (folder / "lvb_val.json").write_text(json.dumps(ROWS))
    (folder / "subtitles").mkdir()
    for name, items in SUBTITLES.items():
        (folder / "subtitles" / name).write_text(json.dumps(items))
    return folder.parent


def suite(text: str, root: Path, **options: Any) -> LongVideoBench:
    found = make_suite(text).located(root, **options)
    assert isinstance(found, LongVideoBench)
    return found


def official(frames: Sequence[float], lines: Sequence[Line]) -> list[float | str]:
    """The order of frame times and texts by the loader's own steps, as its paper's code takes them."""
    out: list[float | str] = []
    rest = list(frames)
    for line in lines:
        middle = (line.start_s + line.end_s) / 2
        while rest and rest[0] <= middle:
            out.append(rest.pop(0))
        short = line.end_s - line.start_s < 1
        start, end = (middle - 0.5, middle + 0.5) if short else line[:2]
        if any(start < frame < end for frame in frames):
            out.append(line.text)
    return [*out, *rest]


def ours(frames: Sequence[float], captions: Sequence[Caption]) -> list[float | str]:
    """The order that the engine makes: a caption stands before the first frame at or after its time."""
    return [
        each
        for _, _, each in sorted(
            [(time, 1, time) for time in frames] + [(each.time_s, 0, each.text) for each in captions],
            key=lambda part: part[:2],
        )
    ]


seconds = st.integers(0, 40).map(lambda quarter: quarter / 4)


@given(
    st.lists(seconds, min_size=1, max_size=8, unique=True).map(sorted),
    st.lists(st.tuples(seconds, seconds), max_size=6),
)
def test_subtitles_stand_where_the_official_loader_puts_them(
    frames: list[float], spans: list[tuple[float, float]]
) -> None:
    """Also when they overlap, end before they start, or are out of order."""
    lines = [Line(start, end, f"line {number}") for number, (start, end) in enumerate(spans)]
    assert ours(frames, interleaved(lines, frames)) == official(frames, lines)


def test_the_two_kinds_of_items_are_read_and_shifted(root: Path) -> None:
    folder = root / "longvideobench" / "subtitles"
    assert read_json(folder / "aBc_en.json", 0.0, 6.0)[2] == Line(5.5, 6.0, "The end.")
    first, later = read_json(folder / "@user-7_en.json", 10.0, 6.0)
    assert (first.start_s, first.end_s, first.text) == (pytest.approx(0.2), pytest.approx(1.7), "Good evening.")
    assert later.start_s == 40
    (folder / "odd.json").write_text('[{"from": 1}]')
    with pytest.raises(ValueError, match=r"item 0 of odd\.json has no times and text"):
        read_json(folder / "odd.json", 0.0, 6.0)


def test_a_row_becomes_a_sample(root: Path) -> None:
    found = suite("longvideobench", root)
    sample = found.samples()[1]
    assert (sample.id, sample.cluster, sample.answer) == ("@user-7_1", "@user-7", "B")
    assert sample.strata == {"duration": "60", "category": "S2E", "level": "L1-Perception"}
    assert sample.extra["options"] == ("A cat", "A dog", "A bird", "A cow")
    assert found.samples()[0].extra["options"] == ("A cat", "A dog", "A bird")
    assert {s.strata["duration"] for s in suite("longvideobench:duration=15", root).samples()} == {"15"}
    with pytest.raises(UsageError, match="longvideobench:duration must be one of 15, 60, 600, 3600, not 30"):
        make_suite("longvideobench:duration=30")


def test_the_hubs_rows_give_the_same_questions(root: Path) -> None:
    plain = suite("longvideobench", root)
    flat = []
    for row in ROWS:
        options = [*row["candidates"], *["N/A"] * 5][:5]  # type: ignore[misc]
        rest = {key: value for key, value in row.items() if key != "candidates"}
        flat.append(rest | {f"option{i}": option for i, option in enumerate(options)})
    (root / "longvideobench" / "lvb_val.json").unlink()
    for name in ("validation.parquet", "validation-00000-of-00001.parquet"):
        pq.write_table(pa.Table.from_pylist(flat), root / "longvideobench" / name)
        found = suite("longvideobench", root)
        assert (found.samples(), found.data_hash) == (plain.samples(), plain.data_hash)
        (root / "longvideobench" / name).unlink()


def test_the_prompts(root: Path) -> None:
    body = "What is at moment 0?\nA. A cat\nB. A dog\nC. A bird\n"
    for spec, text in [
        ("longvideobench", f"Question: {body}{DIRECTLY}"),
        ("longvideobench:prompt=lmms-eval", f"{body}{DIRECTLY}\n"),
        ("longvideobench:prompt=vlmevalkit", f"{body}{DIRECTLY}"),
    ]:
        found = suite(spec, root)
        asked = found.asked(found.samples()[0], (0.0, 1.0, 3.0, 5.0))
        assert asked.question == text
        # 3.0 s is in the widened second around 3.2 s; nothing is shown after 5.5 s.
        assert [each.text.rstrip("\n") for each in asked.captions] == ["Good morning.", "Too short to hold a frame."]
    silent = suite("longvideobench:subtitles=off", root)
    assert silent.asked(silent.samples()[0], (0.0, 1.0)).captions == ()


def test_what_is_missing_is_a_sentence(root: Path) -> None:
    folder = root / "longvideobench"
    (folder / "subtitles" / "aBc_en.json").unlink()
    with pytest.raises(UsageError, match=r"aBc_en\.json is missing; unpack subtitles\.tar"):
        suite("longvideobench", root)
    assert len(suite("longvideobench:subtitles=off", root).samples()) == 4
    assert {s.cluster for s in suite("longvideobench", root, allow_partial=True).samples()} == {"@user-7"}
    (folder / "videos" / "aBc.mp4").unlink()
    with pytest.raises(UsageError, match=r"1 of 2 files of longvideobench are missing in .*videos"):
        suite("longvideobench:subtitles=off", root)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"correct_choice": 3}, "has the correct_choice '3', not one of 0, 1, 2"),
        ({"candidates": ["only"]}, "has 1 options for the question aBc_0"),
        ({"duration_group": 16}, "has the duration_group '16'"),
        ({"id": ROWS[1]["id"]}, "holds a question twice"),
    ],
)
def test_a_row_that_cannot_be_right_is_refused(root: Path, change: dict[str, Any], said: str) -> None:
    (root / "longvideobench" / "lvb_val.json").write_text(json.dumps([ROWS[0] | change, *ROWS[1:]]))
    with pytest.raises(UsageError, match=said):
        suite("longvideobench", root)


def test_the_test_split_has_no_answers_and_says_so(root: Path) -> None:
    rows = [{key: value for key, value in row.items() if key != "correct_choice"} for row in ROWS]
    (root / "longvideobench" / "lvb_val.json").write_text(json.dumps(rows))
    with pytest.raises(UsageError, match="row 0 has no correct_choice"):
        suite("longvideobench", root)


def test_the_whole_command_with_the_stand_in(cli: Cli, root: Path, tmp_path: Path) -> None:
    args = [
        "--suite",
        "longvideobench",
        "--data-root",
        root,
        "--model",
        "dummy",
        "--out",
        tmp_path / "runs",
        "--strict",
    ]
    done = cli("run", *args)
    assert done.code == 0, done.err
    (view,) = ResultStore(tmp_path / "runs").runs()
    spec = view.header["spec"]
    assert (spec["frames"], spec["sampler"], spec["fps"]) == (256, "stride", 1.0)
    assert {record.id for record in view.records.of("accuracy").values()} == {row["id"] for row in ROWS}


def test_the_whole_command_with_a_model(cli: Cli, root: Path, tmp_path: Path) -> None:
    """Six seconds at four frames a second give six frames, one a second, and the subtitles between them."""
    args = ["--data-root", root, "--model", "mini-qwen2-vl@random", "--limit", 2, "--mode", "accuracy", "--strict"]
    args += ["--max-new-tokens", 2, "--out", tmp_path / "runs"]
    tokens = {}
    for text in ("longvideobench", "longvideobench:subtitles=off"):
        done = cli("run", "--suite", text, *args)
        assert done.code == 0, done.err
    for view in ResultStore(tmp_path / "runs").runs():
        records = view.records.of("accuracy")
        tokens[view.header["spec"]["suite_params"]["subtitles"]] = {
            record.id: record.tokens["prompt"] for record in records.values()
        }
        for record in records.values():
            assert [frame.index for frame in record.frames] == [0, 4, 8, 12, 16, 20]
            assert [frame.time_s for frame in record.frames] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert all(tokens[True][id_] > tokens[False][id_] for id_ in tokens[True])
