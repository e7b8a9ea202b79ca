"""One's own videos and pictures: asked once each without a questions file, scored when all questions have answers."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlmbench import report
from vlmbench.errors import UsageError
from vlmbench.session import make_suite
from vlmbench.spec import parse
from vlmbench.store import ResultStore
from vlmbench.suites._synth.encode import write_mp4
from vlmbench.suites.folder import Folder

Cli = Callable[..., Any]
DIRECTLY = "Answer with the option's letter from the given choices directly."
SHORT = "Answer the question using a single word or phrase."
ENTRIES = [
    {"media": "b.mp4", "question": "What colour?", "answer": "Red", "type": "colour"},
    {"video": "b.mp4", "question": "Which way?", "options": ["left", "B. right"], "answer": "right", "id": "way"},
    {"media": ["deep/c.png", "a.mp4"], "question": "Is it?", "answer": ["yes", "yeah"]},
]


@pytest.fixture
def media(tmp_path: Path) -> Path:
    """Two videos of six frames, a picture one level below, and files that are no media."""
    folder = tmp_path / "media"
    for seed, name in enumerate(("a.mp4", "b.mp4")):
        write_mp4(np.random.default_rng(seed).integers(0, 256, (6, 64, 64, 3), dtype=np.uint8), folder / name)
    (folder / "deep").mkdir()
    Image.fromarray(np.full((56, 56, 3), 90, np.uint8)).save(folder / "deep" / "c.png")
    (folder / "README.md").write_text("no medium")
    (folder / ".hidden.mp4").write_bytes(b"")
    return folder


def suite(text: str, root: Path | None = None, **options: Any) -> Folder:
    found = make_suite(text).located(root, **options)
    assert isinstance(found, Folder)
    return found


def asked(media: Path, entries: Any, name: str = "questions.json") -> Folder:
    (media / name).write_text(entries if isinstance(entries, str) else json.dumps(entries))
    return suite(f"folder:{media}")


def test_without_questions_every_medium_is_asked_about_once(media: Path) -> None:
    found = suite(f"folder:{media}").samples()
    assert [sample.id for sample in found] == ["a.mp4", "b.mp4", "deep/c.png"]
    assert [sample.media[0].kind for sample in found] == ["video", "video", "image"]
    assert {sample.answer for sample in found} == {""}
    assert "picture" in found[2].question
    assert suite(f"folder:{media},ask=Who is it?").samples()[2].question == "Who is it?"
    assert [sample.id for sample in suite(f"folder:{media / 'b.mp4'}").samples()] == ["b.mp4"]


def test_a_path_may_stand_bare_quoted_or_below_the_data_root(media: Path) -> None:
    odd = media.rename(media.parent / "odd,name=1+2")
    assert len(suite(f'folder:"{odd}"').samples()) == len(suite(f'folder:path="{odd}"').samples()) == 3
    moved = odd.rename(odd.parent / "plain")
    assert suite("folder:plain", moved.parent).path == "plain"
    assert suite("folder:plain", moved.parent).samples() == suite(f"folder:{moved}").samples()
    with pytest.raises(UsageError, match=r"'sink' in 'pevlm:sink' is not key=value"):
        parse("pevlm:sink")


@pytest.mark.parametrize("name", ["questions.json", "questions.jsonl", "questions.csv"])
def test_every_format_of_a_questions_file_gives_the_same(media: Path, name: str) -> None:
    plain = asked(media, ENTRIES[:2])
    (media / "questions.json").unlink()
    texts = {
        "questions.json": json.dumps(ENTRIES[:2]),
        "questions.jsonl": "\n".join(map(json.dumps, ENTRIES[:2])),
        "questions.csv": "media,question,answer,type,options,id\nb.mp4,What colour?,Red,colour,,\n"
        "b.mp4,Which way?,right,,left|B. right,way\n",
    }
    assert asked(media, texts[name], name).samples() == plain.samples()


def test_answers_are_letters_where_there_are_options_and_normalised_words_elsewhere(media: Path) -> None:
    found = asked(media, ENTRIES)
    colour, way, both = found.samples()
    assert [sample.id for sample in found.samples()] == ["b.mp4#1", "way", "deep/c.png+a.mp4#1"]
    assert (colour.question, colour.cluster) == (f"What colour?\n{SHORT}", way.cluster)
    assert (way.question, way.answer) == (f"Which way?\nA. left\nB. right\n{DIRECTLY}", "B")
    assert [media.kind for media in both.media] == ["image", "video"]
    assert [found.score(colour, text) for text in ("The red.", "blue", " ")] == [(1, "red"), (0, "blue"), (0, None)]
    assert [found.score(way, text) for text in ("b", "It is (A)", "up")] == [(1, "B"), (0, "A"), (0, None)]
    assert found.score(both, "Yeah!") == (1, "yeah")


def test_the_data_hash_covers_questions_and_the_bytes_of_the_media(media: Path) -> None:
    first = suite(f"folder:{media}").data_hash
    assert suite(f"folder:{media}").data_hash == first
    data = bytearray((media / "a.mp4").read_bytes())
    data[-1] ^= 1
    (media / "a.mp4").write_bytes(data)
    changed = suite(f"folder:{media}").data_hash
    assert len({first, changed, suite(f"folder:{media},ask=Who?").data_hash}) == 3


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ("{", r"questions.json cannot be read"),
        ("{}", r"is no list of objects"),
        ("[]", r"holds no question"),
        ([{"question": "What?"}], r"question 1: it names no medium \(media, video, image, file\)"),
        ([{"media": "a.txt"}], r"'a.txt' has the ending of neither a video nor a picture"),
        ([{"media": "gone.mp4"}], r"names 1 files that are not in .*gone.mp4\); put them there\.$"),
        ([{"media": "a.mp4"}, {"media": "gone.mp4"}], r"or run what is there with --allow-partial"),
        ([{"media": "a.mp4", "options": ["one"]}], r"it has 1 options; give 2 to 10"),
        ([{"media": "a.mp4", "options": ["x", "y"], "answer": "C"}], r"the answer 'C' is none of its 2 options"),
        ([{"media": "a.mp4", "answer": "1"}, {"media": "b.mp4"}], r"answers 1 of 2 questions \(not b.mp4#1\)"),
        ([{"media": "a.mp4", "id": 1}, {"media": "b.mp4", "id": "1"}], r"gives the id '1' to several questions"),
    ],
)
def test_a_questions_file_that_cannot_be_used_is_one_sentence(media: Path, entries: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        asked(media, entries)


def test_missing_media_may_be_left_out(media: Path) -> None:
    (media / "questions.json").write_text(json.dumps([{"media": "a.mp4"}, {"media": "gone.mp4"}]))
    assert [sample.id for sample in suite(f"folder:{media}", allow_partial=True).samples()] == ["a.mp4#1"]


def test_a_path_that_is_not_there_or_empty_is_one_sentence_and_exit_2(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for text, said in [
        ("folder", "folder needs a path; write folder:PATH"),
        (f"folder:{tmp_path / 'nowhere'}", "nowhere is not there"),
        (f"folder:{tmp_path / 'empty'}", "holds no video and no picture"),
        (f"folder:{tmp_path},questions=gone.json", "folder:questions=gone.json is no file"),
        (f"folder:{tmp_path}/a, x=1", "has no key 'x' (its keys: path, questions, ask). Put the path in quotes"),
    ]:
        done = cli("run", "--suite", text, "--model", "dummy", "--out", tmp_path / "runs")
        assert (done.code, len(done.err.strip().splitlines())) == (2, 1)
        assert said in done.err


def test_a_folder_that_may_not_be_looked_into_is_one_sentence(media: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(path: Path, pattern: str) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path / "private"))

    monkeypatch.setattr(Path, "rglob", closed)
    with pytest.raises(
        UsageError, match=r"private cannot be read \(Permission denied\); mend that, or name another folder"
    ):
        suite(f"folder:{media}")


def test_without_answers_there_is_fidelity_and_no_accuracy(cli: Cli, media: Path, tmp_path: Path) -> None:
    """Broken files are records among the others."""
    (media / "torn.mp4").write_bytes((media / "a.mp4").read_bytes()[:300])
    args = ["--suite", f"folder:{media}", "--model", "mini-qwen2-vl@random", "--frames", 4, "--mode", "accuracy"]
    args += ["--max-new-tokens", 3, "--out", tmp_path / "runs", "--method", "uniform:ratio=0.5", "--method", "blind"]
    done = cli("run", *args)
    assert done.code == 0, done.err
    rows = {row["method"]: row for row in report.rows(tmp_path / "runs")}
    assert {(row["n"], row["n_failed"], row["accuracy"]) for row in rows.values()} == {(4, 1, None)}
    assert rows["uniform"]["agreement"] in (0, 1 / 3, 2 / 3, 1)
    assert rows["uniform"]["n_paired"] == 3
    assert rows["uniform"]["accuracy_delta"] is None
    assert "accuracy" not in done.out.splitlines()[2]
    (view,) = (each for each in ResultStore(tmp_path / "runs").runs() if each.header["spec"]["method"] == "full")
    records = view.records.of("accuracy")
    assert {id_: record.status for id_, record in records.items()} == {
        "a.mp4": "ok", "b.mp4": "ok", "deep/c.png": "ok", "torn.mp4": "decode_error",
    }  # fmt: skip
    assert [frame.index for frame in records["a.mp4"].frames] == [0, 1, 3, 5]
    assert "answers scored again, 0 changed" in cli("rescore", tmp_path / "runs").out
    texts = tmp_path / "texts.json"
    texts.write_text(json.dumps({"a.mp4": "a cat"}))
    scored = cli("score", "--suite", f"folder:{media}", "--text", texts)
    assert (scored.code, "folder has no reference answers" in scored.err) == (2, True)


def test_with_answers_the_run_is_scored_and_other_files_under_the_same_names_are_noticed(
    cli: Cli, media: Path, tmp_path: Path
) -> None:
    (media / "questions.json").write_text(json.dumps(ENTRIES))
    args = [
        "--suite",
        f"folder:{media}",
        "--model",
        "dummy:accuracy=1",
        "--out",
        tmp_path / "runs",
        "--mode",
        "accuracy",
    ]
    done = cli("run", *args)
    assert done.code == 0, done.err
    (row,) = report.rows(tmp_path / "runs", include_dummy=True)
    assert (row["accuracy"], row["n"]) == (1.0, 3)
    assert "changed; --fresh" not in cli("run", *args).err
    os.truncate(media / "a.mp4", 100)
    assert "the data of folder changed; --fresh starts again" in cli("run", *args).err


REAL = Path(os.environ.get("VLMBENCH_REAL_VIDEOS", "nowhere"))


@pytest.mark.skipif(not REAL.is_dir(), reason="VLMBENCH_REAL_VIDEOS names no folder of real recordings")
def test_real_recordings_run_through_it(cli: Cli, tmp_path: Path) -> None:
    """Phone recordings that are turned, a file with several streams, and a damaged one: only the last fails."""
    args = ["--suite", f"folder:{REAL}", "--model", "mini-qwen2-vl@random", "--frames", 4, "--max-pixels", 12544]
    done = cli("run", *args, "--mode", "accuracy", "--max-new-tokens", 2, "--out", tmp_path)
    assert done.code == 0, done.err
    (view,) = ResultStore(tmp_path).runs()
    found = {id_: (record.status, record.size) for id_, record in view.records.of("accuracy").items()}
    failed = {id_ for id_, (status, _) in found.items() if status == "decode_error"}
    assert failed == {id_ for id_ in found if "corrupted" in id_}
    tall = {id_ for id_, (_, size) in found.items() if size and size[0] > size[1]}
    assert tall == {id_ for id_ in found if "90" in id_ or "270" in id_}
