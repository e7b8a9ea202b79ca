"""What is wrong with a suite's files is found and counted before a model is loaded; what is right is said too."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vlmbench.session import make_suite
from vlmbench.suites._synth.encode import encode_mp4, write_mp4
from vlmbench.suites.longvideobench import LongVideoBench
from vlmbench.suites.textvqa import TextVQA
from vlmbench.suites.videomme import VideoMME

Cli = Callable[..., Any]
Change = Callable[[Path], object]
SCHEMA = json.loads(Path(__file__).parent.parent.joinpath("docs/schema/data-verify.schema.json").read_text())
SRT = "1\n00:00:00,000 --> 00:00:01,000\nHello.\n\n2\n00:00:{:02d},000 --> 00:00:03,000\nBye.\n"
NOISE = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)  # four seconds
ROWS = [
    {
        "duration": "short",
        "domain": "Knowledge",
        "sub_category": "Law",
        "videoID": f"video{number // 2}",
        "question_id": f"00{number}",
        "task_type": "OCR Problems",
        "question": "What?",
        "options": ["A. One.", "B. Two."],
        "answer": "A",
    }
    for number in range(6)
]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three videos with two questions each and two subtitle files."""
    monkeypatch.setattr(VideoMME, "n_rows", len(ROWS))
    monkeypatch.setattr("vlmbench.suites.videomme.N_SUBTITLED", 2)
    folder = tmp_path / "videomme"
    for number in range(3):
        write_mp4(NOISE, folder / "data" / f"video{number}.mp4")
    write_rows(folder, ROWS)
    (folder / "subtitle").mkdir()
    for number in range(2):
        (folder / "subtitle" / f"video{number}.srt").write_text(SRT.format(2))
    return tmp_path


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), folder / "test.parquet")


def verified(cli: Cli, root: Path, suite: str = "videomme", *args: object) -> tuple[int, dict[str, dict[str, Any]]]:
    done = cli("data", "verify", "--suite", suite, "--data-root", root, "--format", "json", *args)
    found = json.loads(done.out)
    jsonschema.validate(found, SCHEMA)
    return done.code, {row["check"]: row for row in found["rows"]}


def test_good_data_passes_and_tells_the_hash_that_a_header_will_hold(cli: Cli, root: Path) -> None:
    code, found = verified(cli, root)
    assert code == 0
    counts = {name: (row["found"], row["expected"]) for name, row in found.items() if row["found"] is not None}
    assert counts == {
        "rows": (6, 6), "fields": (6, 6), "media": (3, 3), "decodable": (3, 3), "duration": (3, 3), "subtitles": (2, 2),
    }  # fmt: skip
    assert found["data hash"]["said"] == make_suite("videomme").located(root).data_hash
    text = cli("data", "verify", "--suite", "videomme:subtitles=on", "--data-root", root).out
    assert [line.split()[:2] for line in text.splitlines()][:2] == [["ok", "rows"], ["ok", "fields"]]


def edit(number: int, **changes: Any) -> Change:
    return lambda folder: write_rows(folder, [*ROWS[:number], ROWS[number] | changes, *ROWS[number + 1 :]])


def write(name: str, data: bytes | str) -> Change:
    return lambda folder: (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())


@pytest.mark.parametrize(
    ("change", "check", "found", "said"),
    [
        (lambda folder: write_rows(folder, ROWS[:5]), "rows", 5, "test.parquet"),
        (edit(2, answer="C"), "fields", 5, "has the answer 'C', not one of A, B"),
        (edit(2, question_id="000"), "fields", 5, "1 questions are there twice"),
        (lambda folder: (folder / "data/video1.mp4").unlink(), "media", 2, "video1.mp4"),
        (write("data/video2.mp4", b""), "decodable", 2, "video2.mp4 cannot be decoded"),
        (write("data/video0.mp4", encode_mp4(NOISE)[:900]), "decodable", 2, "video0.mp4 cannot be decoded"),
        (write("data/video0.mp4", encode_mp4(NOISE, fps=1 / 20)), "duration", 2, "has 160.0 s, not 0 to 120 s"),
        (write("subtitle/video0.srt", "<html>"), "subtitles", 1, "video0.srt is no subtitle file"),
        (lambda folder: (folder / "subtitle/video0.srt").unlink(), "subtitles", 1, ""),
    ],
    ids=["rows", "answer", "twice", "missing", "empty", "cut", "long", "html", "no subtitles"],
)
def test_a_fault_is_counted_and_shown_and_the_exit_code_is_1(
    cli: Cli, root: Path, change: Change, check: str, found: int, said: str
) -> None:
    change(root / "videomme")
    code, checks = verified(cli, root)
    assert code == 1
    assert (checks[check]["ok"], checks[check]["found"]) == (False, found)
    assert said in checks[check]["said"]
    rest = {name for name, row in checks.items() if not row["ok"]} - {check}
    assert not rest


def test_lines_that_overlap_are_said_and_no_fault(cli: Cli, root: Path) -> None:
    (root / "videomme" / "subtitle" / "video0.srt").write_text(SRT.format(0))
    code, found = verified(cli, root)
    assert (code, found["subtitles"]["said"]) == (0, "lines overlap in 1")


def test_a_limit_takes_media_evenly(cli: Cli, root: Path) -> None:
    (root / "videomme" / "data" / "video1.mp4").write_bytes(b"")
    code, found = verified(cli, root, "videomme", "--limit", 2)
    assert (code, found["decodable"]["found"], found["decodable"]["expected"]) == (0, 2, 2)
    assert cli("data", "verify", "--suite", "videomme", "--limit", 0).code == 2


def test_pictures_inside_the_rows_are_read_too_even_beside_a_bad_row(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    from PIL import Image

    def png(value: int) -> bytes:
        Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(buffer := io.BytesIO(), "PNG")
        return buffer.getvalue()

    monkeypatch.setattr(TextVQA, "n_rows", 3)
    rows = [
        {
            "question_id": number,
            "question": "What?",
            "image_id": f"picture{number}",
            "answers": ["stop"] * 10 if number else [],
            "image": {"bytes": png(number) if number < 2 else b"no picture", "path": "x.png"},
        }
        for number in range(3)
    ]
    (tmp_path / "textvqa" / "validation").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "textvqa" / "validation" / "a.parquet")
    code, found = verified(cli, tmp_path, "textvqa")
    assert code == 1
    assert (found["fields"]["found"], found["decodable"]["found"], found["decodable"]["expected"]) == (2, 1, 2)
    assert "subtitles" not in found


def test_a_stated_duration_is_held_against_the_file(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LongVideoBench, "n_rows", 2)
    folder = tmp_path / "longvideobench"
    rows = []
    for number, seconds in enumerate((4.3, 9.0)):
        write_mp4(NOISE, folder / "videos" / f"{number}.mp4")
        rows.append(
            {
                "video_id": str(number), "id": str(number), "video_path": f"{number}.mp4", "subtitle_path": f"{number}.json",
                "question": "What?", "candidates": ["a", "b"], "correct_choice": 0, "duration": seconds,
                "duration_group": 15, "question_category": "S2E", "level": "L1", "starting_timestamp_for_subtitles": 0,
            }
        )  # fmt: skip
    (folder / "lvb_val.json").write_text(json.dumps(rows))
    (folder / "subtitles").mkdir()
    (folder / "subtitles" / "0.json").write_text('[{"timestamp": [0.0, 1.0], "text": "Hello."}]')
    code, found = verified(cli, tmp_path, "longvideobench")
    assert code == 1
    assert (found["duration"]["found"], found["duration"]["said"]) == (1, "1.mp4 has 4.0 s, not 9 s")
    assert (found["subtitles"]["found"], found["subtitles"]["expected"]) == (1, 2)
    assert found["fields"]["ok"]


def test_where_there_is_nothing_it_cannot_start(cli: Cli, tmp_path: Path) -> None:
    for suite, said in [("videomme", "holds none of videomme's files"), ("synthvideo", "makes its own media")]:
        done = cli("data", "verify", "--suite", suite, "--data-root", tmp_path)
        assert (done.code, said in done.err) == (2, True)


def test_a_folder_of_ones_own_can_be_verified(cli: Cli, root: Path) -> None:
    folder = root / "videomme" / "data"
    (folder / "torn.mp4").write_bytes(b"torn")
    done = cli("data", "verify", "--suite", f"folder:{folder}")
    assert done.code == 1
    assert "FAULT decodable   3 of 4" in done.out
