"""Video-MME from its official files: fields, counts and media are checked first, and the prompt is the benchmark's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vlmbench.errors import UsageError
from vlmbench.session import make_suite
from vlmbench.store import ResultStore
from vlmbench.suite import Sample, limited
from vlmbench.suites._official import subtitles
from vlmbench.suites._synth.encode import write_mp4
from vlmbench.suites.videomme import VideoMME

Cli = Callable[..., Any]
TASKS = ("Counting Problem", "OCR Problems", "Object Reasoning")
SRT = """1
00:00:00,000 --> 00:00:01,000
<font color="white" size=".72c">Hello there,</font>

2
00:00:01,000 --> 00:00:02,500
<font color="white" size=".72c">and welcome
back.</font>

3
00:00:03,400 --> 00:00:04,000
Bye.
"""
ROWS = [
    {
        "video_id": f"{video + 1:03d}",
        "duration": duration,
        "domain": "Knowledge",
        "sub_category": "Law",
        "url": f"https://www.youtube.com/watch?v=video-{video:05d}",
        "videoID": f"video-{video:05d}",
        "question_id": f"{video + 1:03d}-{number + 1}",
        "task_type": TASKS[number],
        "question": f"What is number {number}?",
        "options": ["A. One.", "B. Two.", "C. Three.", "D. Four."],
        "answer": "ABCD"[(video + number) % 4],
    }
    for video, duration in enumerate(("short", "medium", "long"))
    for number in range(3)
]


def write_videos(folder: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
    for name in sorted({str(row["videoID"]) for row in ROWS}):
        write_mp4(noise, folder / f"{name}.mp4")


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three videos of eight frames in four seconds, three questions each; two videos have subtitles."""
    monkeypatch.setattr(VideoMME, "n_rows", len(ROWS))
    monkeypatch.setattr("vlmbench.suites.videomme.N_SUBTITLED", 2)
    folder = tmp_path / "data" / "videomme"
    write_rows(folder / "test.parquet", ROWS)
    write_videos(folder / "data")
    (folder / "subtitle").mkdir()
    for video in (1, 2):
        (folder / "subtitle" / f"video-{video:05d}.srt").write_text(SRT)
    return folder.parent


def suite(text: str, root: Path, **options: Any) -> VideoMME:
    found = make_suite(text).located(root, **options)
    assert isinstance(found, VideoMME)
    return found


def question(text: str, root: Path, number: int, times_s: tuple[float, ...] = ()) -> str:
    found = suite(text, root)
    return found.asked(found.samples()[number], times_s).question


# What is read.


def test_a_row_becomes_a_sample(root: Path) -> None:
    found = suite("videomme", root)
    samples = found.samples()
    assert [sample.id for sample in samples] == [row["question_id"] for row in ROWS]
    assert len({sample.cluster for sample in samples}) == 3
    sample = samples[4]
    assert (sample.cluster, sample.answer, sample.template) == ("video-00001", "C", "OCR Problems")
    assert sample.media[0].path == root / "videomme" / "data" / "video-00001.mp4"
    assert sample.strata == {
        "duration": "medium", "domain": "Knowledge", "sub_category": "Law", "task_type": "OCR Problems",
    }  # fmt: skip
    assert {s.id for s in limited(samples, 3)} <= {s.id for s in limited(samples, 5)}


@pytest.mark.parametrize("name", ["videomme/test-00000-of-00001.parquet", "test-00000-of-00001.parquet"])
def test_the_hubs_own_folders_are_read_too(root: Path, name: str) -> None:
    plain = suite("videomme", root)
    (root / "videomme" / "test.parquet").rename(root / "rows")
    (root / "videomme" / name).parent.mkdir(exist_ok=True)
    (root / "rows").rename(root / "videomme" / name)
    found = suite("videomme", root)
    assert (found.samples(), found.data_hash) == (plain.samples(), plain.data_hash)
    assert suite("videomme", root / "videomme").samples() == plain.samples()


@pytest.mark.parametrize("nested", [True, False])
def test_the_json_of_the_benchmarks_repository_gives_the_same_questions(root: Path, nested: bool) -> None:
    plain = suite("videomme", root).samples()
    (root / "videomme" / "test.parquet").unlink()
    shared = {"video_id": "video_id", "duration": "duration_category", "domain": "video_category", "url": "url"}
    shared["sub_category"] = "video_sub_category"
    own = {"question_id": "question_id", "task_type": "task_type", "question": "question", "options": "choices"}
    own["answer"] = "answer"
    rows: list[dict[str, Any]] = []
    for first in range(0, len(ROWS), 3):
        video = {theirs: ROWS[first][ours] for ours, theirs in shared.items()}
        asked = [{theirs: row[ours] for ours, theirs in own.items()} for row in ROWS[first : first + 3]]
        rows += [video | {"questions": asked}] if nested else [video | each for each in asked]
    (root / "videomme" / "Video-MME.json").write_text(json.dumps(rows))
    assert suite("videomme", root).samples() == plain


def test_a_duration_asks_about_its_videos_only(root: Path) -> None:
    assert {s.strata["duration"] for s in suite("videomme:duration=long", root).samples()} == {"long"}
    with pytest.raises(UsageError, match="videomme:duration must be one of short, medium, long, not 'longer'"):
        make_suite("videomme:duration=longer")


# What is missing or wrong is a sentence, before a model is loaded.


def test_without_a_folder_the_files_and_the_remedy_are_named(cli: Cli, tmp_path: Path) -> None:
    for args in ((), ("--data-root", tmp_path)):
        done = cli("run", "--suite", "videomme", "--model", "dummy", "--out", tmp_path / "runs", *args)
        assert done.code == 2
        assert all(word in done.err for word in ("videomme", "--data-root", "test.parquet"))
        assert len(done.err.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()
    assert str(tmp_path / "videomme") in done.err
    missing = cli("run", "--suite", "videomme", "--data-root", tmp_path / "nowhere")
    assert (missing.code, "nowhere is no folder" in missing.err) == (2, True)


def test_another_number_of_rows_is_refused_unless_partial_data_will_do(root: Path) -> None:
    write_rows(root / "videomme" / "test.parquet", ROWS[:4])
    with pytest.raises(UsageError, match=r"holds 4 rows where videomme has 9; .*--allow-partial"):
        suite("videomme", root)
    found = suite("videomme", root, allow_partial=True)
    assert (len(found.samples()), found.partial) == (4, True)


def test_missing_videos_are_counted_and_left_out_of_partial_data(root: Path) -> None:
    (root / "videomme" / "data" / "video-00001.mp4").unlink()
    with pytest.raises(
        UsageError, match=r"1 of 3 files of videomme are missing in .*data .*video-00001.mp4.*--allow-partial"
    ):
        suite("videomme", root)
    assert {s.cluster for s in suite("videomme", root, allow_partial=True).samples()} == {"video-00000", "video-00002"}
    for path in (root / "videomme" / "data").iterdir():
        path.unlink()
    with pytest.raises(
        UsageError, match=r"3 of 3 files of videomme are missing .*unpack its archives there with `vlmbench"
    ):
        suite("videomme", root, allow_partial=True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"answer": "E"}, "has the answer 'E', not one of A, B, C, D"),
        ({"answer": None}, "has the answer 'None'"),
        ({"duration": "tiny"}, "has the duration 'tiny', not one of short, medium, long"),
        ({"question_id": "001-2"}, "holds a question twice"),
    ],
)
def test_a_row_that_cannot_be_right_is_refused(root: Path, change: dict[str, Any], said: str) -> None:
    write_rows(root / "videomme" / "test.parquet", [{**ROWS[0], **change}, *ROWS[1:]])
    with pytest.raises(UsageError, match=said):
        suite("videomme", root)


def test_other_columns_are_named(root: Path) -> None:
    write_rows(root / "videomme" / "test.parquet", [{k: v for k, v in row.items() if k != "videoID"} for row in ROWS])
    with pytest.raises(UsageError, match=r"row 0 has no videoID \(it has video_id, duration"):
        suite("videomme", root)
    (root / "videomme" / "test.parquet").write_bytes(b"<html>404</html>")
    with pytest.raises(UsageError, match=r"test\.parquet cannot be read as parquet"):
        suite("videomme", root)


def test_there_is_no_train_split(root: Path) -> None:
    with pytest.raises(UsageError, match="videomme is for testing alone"):
        suite("videomme", root).samples("train")


# The prompt.

BODY = "What is number 0?\nA. One.\nB. Two.\nC. Three.\nD. Four.\n"
SELECT = "Select the best answer to the following multiple-choice question based on the video"
LETTER = "Respond with only the letter (A, B, C, or D) of the correct option."


def test_the_official_prompt_is_the_one_of_the_readme(root: Path) -> None:
    plain = f"{SELECT}. {LETTER}\n{BODY}The best answer is:"
    assert question("videomme", root, 3, (0.5,)) == plain
    shown = "This video's subtitles are listed below:\nHello there,\nBye.\n"
    assert question("videomme:subtitles=on", root, 3, (0.5, 0.7, 3.5)) == shown + plain
    assert question("videomme:subtitles=on", root, 0, (0.5,)) == plain  # the first video has none
    assert question("videomme:subtitles=on", root, 3, (3.0,)) == plain  # nothing is said then


def test_the_harnesses_prompts_are_theirs(root: Path) -> None:
    cue = "Answer with the option's letter from the given choices directly."
    assert question("videomme:prompt=lmms-eval", root, 3) == f"{SELECT} and the subtitles. {LETTER}\n{BODY}\n{cue}"
    listed = "This video's subtitles are listed below: \n"
    asked = f"{SELECT} and the subtitles. {LETTER}\n{BODY}The best answer is:"
    theirs = "videomme:prompt=lmms-eval,subtitles=on"
    assert question(theirs, root, 3, (0.5,)) == f"{listed}Hello there,\n{asked}"
    assert question(theirs, root, 0, (0.5,)) == f"{listed}No subtitles available\n{asked}"
    kit = "\nThese are the frames of a video. "
    tail = f"{SELECT}. {LETTER}\nQuestion: {BODY}Answer: "
    assert question("videomme:prompt=vlmevalkit", root, 3) == kit + tail
    twice = "This video's subtitles are listed below:\nHello there,\nHello there,\n"
    assert question("videomme:prompt=vlmevalkit,subtitles=on", root, 3, (0.0, 0.5, 0.7)) == kit + twice + tail


def test_a_line_is_shown_from_its_start_up_to_its_end(root: Path) -> None:
    lines = subtitles.read_srt(root / "videomme" / "subtitle" / "video-00001.srt")
    assert [line.text for line in lines] == ["Hello there,", "and welcome back.", "Bye."]
    assert [line.text for line in subtitles.shown_at(lines, (1.0, 2.4))] == ["and welcome back."]
    assert subtitles.shown_at(lines, (2.5, 4.0)) == []


@pytest.mark.parametrize(
    "data",
    [
        SRT.encode("utf-16"),
        b"\xef\xbb\xbf" + SRT.encode(),
        SRT.replace("\n", "\r\n").encode(),
        SRT.replace("\n\n", "\n").encode(),
        SRT.replace(",000 -->", ".000 -->").encode(),
    ],
)
def test_subtitles_are_read_however_they_were_saved(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.srt").write_bytes(data)
    assert [line.text for line in subtitles.read_srt(tmp_path / "a.srt")] == [
        "Hello there,",
        "and welcome back.",
        "Bye.",
    ]


def test_old_encodings_lose_no_line_and_what_is_no_subtitle_file_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.srt").write_bytes("1\n00:00:00,000 --> 00:00:01,000\ncafé\n".encode("latin-1"))
    assert subtitles.read_srt(tmp_path / "a.srt")[0].text == "café"
    (tmp_path / "b.srt").write_text("<html>not found</html>")
    with pytest.raises(ValueError, match=r"b\.srt is no subtitle file"):
        subtitles.read_srt(tmp_path / "b.srt")
    (tmp_path / "c.srt").write_text("")
    assert subtitles.read_srt(tmp_path / "c.srt") == ()


def test_subtitles_that_are_wanted_must_be_there(root: Path) -> None:
    (root / "videomme" / "subtitle" / "video-00001.srt").unlink()
    with pytest.raises(UsageError, match=r"subtitle holds subtitles \(.srt\) of 1 videos where videomme has 2"):
        suite("videomme:subtitles=on", root)
    assert len(suite("videomme", root).samples()) == 9
    assert len(suite("videomme:subtitles=on", root, allow_partial=True).samples()) == 9


def test_the_letter_is_scored_and_what_has_none_is_wrong(root: Path) -> None:
    found = suite("videomme", root)
    sample: Sample = found.samples()[1]
    assert [found.score(sample, text) for text in ("B", "The answer is (b).", "Two.")] == [(1.0, "B")] * 3
    assert found.score(sample, "C. Three.") == (0.0, "C")
    assert found.score(sample, "Because of the second one") == (0.0, None)


# The whole command.


def test_the_whole_command_with_the_stand_in(cli: Cli, root: Path, tmp_path: Path) -> None:
    args = ["--suite", "videomme:subtitles=on", "--data-root", root, "--model", "dummy", "--out", tmp_path / "runs"]
    done = cli("run", *args, "--method", "blind", "--allow-partial", "--strict")
    assert done.code == 0, done.err
    views = list(ResultStore(tmp_path / "runs").runs())
    assert {view.header["spec"]["method"] for view in views} == {"full", "blind"}
    params = views[0].header["spec"]["suite_params"]
    assert params == {"prompt": "official", "revision": None, "partial": True, "subtitles": True, "duration": None}
    assert views[0].header["suite_hash"] == suite("videomme:subtitles=on", root).data_hash
    assert {record.id for record in views[0].records.of("accuracy").values()} == {row["question_id"] for row in ROWS}
    rescored = cli("rescore", tmp_path / "runs")
    assert (rescored.code, "18 answers scored again, 0 changed" in rescored.out) == (0, True), rescored.err


def test_the_whole_command_with_a_model(cli: Cli, root: Path, tmp_path: Path) -> None:
    args = ["--suite", "videomme:subtitles=on", "--data-root", root, "--model", "mini-qwen2-vl@random", "--frames", 4]
    args += ["--limit", 4, "--mode", "accuracy", "--max-new-tokens", 2, "--out", tmp_path / "runs", "--strict"]
    done = cli("run", *args)
    assert done.code == 0, done.err
    (view,) = ResultStore(tmp_path / "runs").runs()
    records = list(view.records.of("accuracy").values())
    assert len(records) == 4
    for record in records:
        assert [frame.index for frame in record.frames] == [0, 2, 4, 7]
        assert [frame.time_s for frame in record.frames] == [0.0, 1.0, 2.0, 3.5]
        assert record.strata["task_type"] in TASKS
    subtitled = [record.tokens["prompt"] for record in records if record.cluster != "video-00000"]
    without = [record.tokens["prompt"] for record in records if record.cluster == "video-00000"]
    assert min(subtitled) > max(without)
