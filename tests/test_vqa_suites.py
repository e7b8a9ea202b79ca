"""VQA v2, GQA, TextVQA and ScienceQA: official scorers, and the same questions from every layout of the official files."""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import io
import json
import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vlmbench import memvp_file
from vlmbench.errors import UsageError
from vlmbench.session import make_suite
from vlmbench.store import ResultStore
from vlmbench.suite import Sample
from vlmbench.suites._official import base
from vlmbench.suites._official.base import OfficialSuite
from vlmbench.suites._official.vqa import exact, normalise, vqa_accuracy, vqa_score
from vlmbench.suites.scienceqa import ScienceQA, ScienceQATrain

Cli = Callable[..., Any]
SHORT = "\nAnswer the question using a single word or phrase."
DIRECTLY = "Answer with the option's letter from the given choices directly."

# The scorers.


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("Two dogs.", "2 dogs"), ("The cat", "cat"), ("an  apple\n", "apple"), ("none", "0"), ("ten", "10"),
        ("red/blue", "red blue"), ("red / blue", "red blue"), ("red, blue", "red blue"), ("red,blue", "red blue"),
        ("1,000", "1000"), ("3.5", "3.5"), ("a.m.", "am"), ("well-known", "well known"), ("yes!", "yes"),
        ("dont", "don't"), ("hed've", "he'd've"), ("it's", "it's"), ("ill", "ill"), ("Yes\tit is", "yes it is"),
        ("somebodyd", "somebody'd"), ("The", ""),
    ],
)  # fmt: skip
def test_an_answer_is_normalised_as_by_the_official_script(text: str, left: str) -> None:
    assert normalise(text) == left


def test_textvqa_takes_words_apart_first() -> None:
    assert normalise("Bob's bar", tokenise=True) == "bob 's bar"
    assert normalise("red,blue?", tokenise=True) == "redblue"
    assert vqa_score("Bobs bar", ["bob's bar"] * 10, tokenise=True)[0] == 0


@pytest.mark.parametrize(("same", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_three_of_ten_annotators_give_nine_tenths(same: int, accuracy: float) -> None:
    answers = ["yes"] * same + [f"other {i}" for i in range(10 - same)]
    assert vqa_accuracy("yes", answers) == pytest.approx(accuracy)


@given(st.lists(st.sampled_from(["yes", "no", "2", "red"]), min_size=10, max_size=10), st.randoms())
def test_accuracy_is_the_mean_over_the_sets_that_leave_one_out(answers: list[str], random: Any) -> None:
    expected = [min(1, sum(a == "yes" for a in answers[:i] + answers[i + 1 :]) / 3) for i in range(10)]
    assert vqa_accuracy("yes", answers) == pytest.approx(sum(expected) / 10)
    turned = random.sample(answers, 10)
    assert vqa_accuracy("yes", turned) == pytest.approx(vqa_accuracy("yes", answers))


words = st.text(st.characters(codec="ascii", categories=["Ll"]), min_size=2, max_size=8)


@given(st.lists(words, min_size=1, max_size=4), st.booleans())
def test_case_articles_blanks_and_a_full_stop_never_matter(parts: list[str], tokenise: bool) -> None:
    plain = normalise(" ".join(parts), tokenise=tokenise)
    for text in (" ".join(parts).upper(), "the " + "  ".join(parts), " ".join(parts) + ".", f"\n{' a '.join(parts)}\t"):
        assert normalise(text, tokenise=tokenise) == plain


@given(st.text(max_size=40), st.booleans())
def test_any_text_is_scored_between_0_and_1_and_nothing_left_is_unread(text: str, tokenise: bool) -> None:
    score, read = vqa_score(text, ["yes"] * 10, tokenise=tokenise)
    assert 0 <= score <= 1
    assert (read is None) == (normalise(text, tokenise=tokenise) == "")
    assert vqa_score(text, [text] * 10, tokenise=tokenise)[0] == float(read is not None)


def test_exact_match_ignores_case_and_punctuation_and_nothing_else() -> None:
    assert exact(" T-Shirt. ") == exact("tshirt")
    assert exact("yes, it is") != exact("yes")


# The files.


def png(number: int) -> bytes:
    frame = np.random.default_rng(number).integers(0, 256, (56, 56, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "PNG")
    return buffer.getvalue()


def picture(number: int | None) -> dict[str, Any] | None:
    """As `datasets` writes one."""
    return None if number is None else {"bytes": png(number), "path": f"{number}.png"}


PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write_rows(path: Path, rows: list[dict[str, Any]], pictures: list[int | None] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows)
    if pictures is not None:
        table = table.append_column("image", pa.array([picture(number) for number in pictures], PICTURE))
    pq.write_table(table, path, row_group_size=2)


def write_file(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


def answers_of(*texts: str) -> list[dict[str, Any]]:
    every = (list(texts) * 10)[:10]
    return [{"answer": text, "answer_confidence": "yes", "answer_id": i + 1} for i, text in enumerate(every)]


VQA = [
    {
        "question_type": kind,
        "multiple_choice_answer": answer,
        "answers": answers_of(answer),
        "image_id": 42 + number // 2,
        "answer_type": group,
        "question_id": 42_000 + number,
        "question": question,
    }
    for number, (kind, answer, group, question) in enumerate(
        [
            ("is the", "yes", "yes/no", "Is the cat asleep?"),
            ("how many", "2", "number", "How many cats are there?"),
            ("what color", "black", "other", "What color is it?"),
            ("is the", "no", "yes/no", "Is the dog asleep?"),
        ]
    )
]
TEXT = [
    {
        "image_id": f"{number // 2:016x}",
        "question_id": 34_602 + number,
        "question": f"what does Sign {number} say?",
        "question_tokens": ["what"],
        "image_width": 56,
        "image_height": 56,
        "flickr_original_url": "",
        "flickr_300k_url": "",
        "answers": ["stop"] * 6 + ["Stop sign", "stop.", "halt", "go"],
        "image_classes": ["Sign"],
        "set_name": "val",
        "ocr_tokens": ["STOP", str(number)],
    }
    for number in range(4)
]
SCENES = [
    {
        "id": f"2020{number}",
        "imageId": f"n{number // 2}",
        "question": question,
        "answer": answer,
        "fullAnswer": f"It is {answer}.",
        "isBalanced": True,
        "types": {"detailed": "x", "semantic": meaning, "structural": structure},
    }
    for number, (question, answer, structure, meaning) in enumerate(
        [
            ("Is it overcast?", "no", "verify", "attr"),
            ("Who is wearing the dress?", "woman", "query", "rel"),
            ("Is it indoors or outdoors?", "outdoors", "choose", "global"),
            ("Are there both cats and dogs?", "yes", "logical", "obj"),
        ]
    )
]
SCHOOL = [
    {
        "question": f"Which is number {number}?",
        "choices": ["ash", "bee", "cat"][: 2 + number % 2],
        "answer": number % 2,
        "hint": "" if number % 2 else "Look closely.",
        "task": "closed choice",
        "grade": f"grade{2 + 3 * number}",
        "subject": ("natural science", "social science", "language science")[number % 3],
        "topic": "biology",
        "category": "c",
        "skill": "s",
        "lecture": "l",
        "solution": "s",
    }
    for number in range(4)
]
PICTURED: list[int | None] = [0, 1, None, None]
LESSONS = [row | {"question": f"What is lesson {number}?"} for number, row in enumerate(SCHOOL)]
"""ScienceQA's train split."""
TAUGHT: list[int | None] = [None, 5, 6, 7]
N_ROWS = 4


def write_vqav2(folder: Path, layout: str) -> None:
    numbers: list[int | None] = [int(str(row["image_id"])) for row in VQA]
    if layout == "json":
        asked = [{key: row[key] for key in ("image_id", "question", "question_id")} for row in VQA]
        rest = [{key: value for key, value in row.items() if key != "question"} for row in reversed(VQA)]
        write_file(folder / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": asked})
        write_file(folder / "v2_mscoco_val2014_annotations.json", {"annotations": rest[::-1]})
        for number in numbers:
            write_file(folder / "val2014" / f"COCO_val2014_{number:012d}.jpg", png(number or 0))
        return
    name = {"parquet": "validation/{}.parquet", "hub": "data/validation-{}.parquet"}[layout]
    for shard in range(2):
        write_rows(folder / name.format(shard), VQA[2 * shard :][:2], numbers[2 * shard :][:2])


def write_textvqa(folder: Path, layout: str) -> None:
    numbers: list[int | None] = [int(str(row["image_id"]), 16) for row in TEXT]
    if layout == "json":
        rows = [{key: value for key, value in row.items() if key != "ocr_tokens"} for row in TEXT]
        write_file(folder / "TextVQA_0.5.1_val.json", {"data": rows})
        words = [{"image_id": row["image_id"], "ocr_tokens": row["ocr_tokens"]} for row in TEXT]
        write_file(folder / "TextVQA_Rosetta_OCR_v0.2_val.json", {"data": words})
        for number in numbers:
            write_file(folder / "train_images" / f"{number:016x}.jpg", png(number or 0))
        return
    name = {"parquet": "validation/a.parquet", "hub": "data/validation-00000-of-00001.parquet"}[layout]
    write_rows(folder / name, TEXT, numbers)


def write_gqa(folder: Path, layout: str) -> None:
    if layout in ("json", "zip"):
        path = folder / ("questions1.2" if layout == "zip" else ".") / "testdev_balanced_questions.json"
        write_file(path, {str(row["id"]): {k: v for k, v in row.items() if k != "id"} for row in SCENES})
        for number in range(2):
            write_file(folder / "images" / f"n{number}.jpg", png(number))
        return
    names = {
        "parquet": ("instructions.parquet", "images.parquet"),
        "hub": ("testdev_balanced_instructions/a.parquet", "testdev_balanced_images/a.parquet"),
    }[layout]
    write_rows(folder / names[0], SCENES)
    write_rows(folder / names[1], [{"id": "n1"}, {"id": "n9"}, {"id": "n0"}], [1, 9, 0])


def write_scienceqa(folder: Path, layout: str) -> None:
    if layout == "json":
        problems: dict[str, Any] = {}
        for number, (row, shown) in enumerate(zip(SCHOOL, PICTURED, strict=True)):
            problems[str(11 + number)] = row | {"image": None if shown is None else "image.png", "split": "test"}
            if shown is not None:
                write_file(folder / "images" / "test" / str(11 + number) / "image.png", png(shown))
        for number, (row, shown) in enumerate(zip(LESSONS, TAUGHT, strict=True)):
            problems[str(1 + number)] = row | {"image": None if shown is None else "image.png", "split": "train"}
            if shown is not None:
                write_file(folder / "images" / "train" / str(1 + number) / "image.png", png(shown))
        write_file(folder / "problems.json", problems | {"5": SCHOOL[0] | {"split": "val"}})
        ids = {"train": ["1", "2", "3", "4"], "val": ["5"], "test": ["11", "12", "13", "14"]}
        write_file(folder / "pid_splits.json", ids)
        write_file(folder / "captions.json", {"captions": {"1": "A red ball.", "12": "A blue cup.", "5": "A map."}})
        return
    name = {"parquet": "{}.parquet", "full": "ScienceQA-FULL/{}-00000-of-00001.parquet"}[layout]
    write_rows(folder / name.format("test"), SCHOOL, PICTURED)
    write_rows(folder / name.format("train"), LESSONS, TAUGHT)


WRITERS: dict[str, tuple[Callable[[Path, str], None], tuple[str, ...]]] = {
    "vqav2": (write_vqav2, ("parquet", "hub", "json")),
    "textvqa": (write_textvqa, ("parquet", "hub", "json")),
    "gqa": (write_gqa, ("parquet", "hub", "json", "zip")),
    "scienceqa": (write_scienceqa, ("parquet", "full", "json")),
}
LAYOUTS = [(name, layout) for name, (_, layouts) in WRITERS.items() for layout in layouts]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four questions each are the whole data set."""
    for name in WRITERS:
        monkeypatch.setattr(type(make_suite(name)), "n_rows", N_ROWS)
    for kind, pictured in ((ScienceQA, 2), (ScienceQATrain, 3)):
        monkeypatch.setattr(kind, "n_rows", N_ROWS)
        monkeypatch.setattr(kind, "n_pictured", pictured)


def made(tmp_path: Path, name: str, layout: str) -> Path:
    WRITERS[name][0](tmp_path / "data" / name, layout)
    return tmp_path / "data"


def suite(text: str, root: Path, **options: Any) -> OfficialSuite:
    found = make_suite(text).located(root, **options)
    assert isinstance(found, OfficialSuite)
    return found


def told(sample: Sample) -> tuple[Any, ...]:
    """All of a sample that no layout may change."""
    return sample.cluster, sample.question, sample.answer, sample.template, sample.strata


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_every_layout_gives_the_same_questions_and_pictures(tmp_path: Path, name: str, layout: str) -> None:
    first = suite(name, made(tmp_path, name, "parquet"))
    found = suite(name, made(tmp_path / "other", name, layout))
    if name == "scienceqa" and layout == "json":
        assert [sample.id for sample in found.samples()] == ["11", "12", "13", "14"]
        assert [told(s)[1:] for s in found.samples()] == [told(s)[1:] for s in first.samples()]
    else:
        assert [sample.id for sample in found.samples()] == [sample.id for sample in first.samples()]
        assert [told(sample) for sample in found.samples()] == [told(sample) for sample in first.samples()]
    for one, other in zip(first.samples(), found.samples(), strict=True):
        first.materialise(one)
        found.materialise(other)
        assert [m.path.read_bytes() for m in one.media] == [m.path.read_bytes() for m in other.media]
    assert len(found.data_hash) == 8


def test_each_picture_is_the_questions_own(tmp_path: Path) -> None:
    numbers = {"vqav2": [42, 42, 43, 43], "textvqa": [0, 0, 1, 1], "gqa": [0, 0, 1, 1], "scienceqa": [0, 1]}
    for name, expected in numbers.items():
        found = suite(name, made(tmp_path, name, "parquet"))
        for sample in found.samples():
            found.materialise(sample)
        read = [media.path.read_bytes() for sample in found.samples() for media in sample.media]
        assert read == [png(number) for number in expected]


def test_rows_of_other_files_never_get_the_pictures_of_these(tmp_path: Path) -> None:
    found = suite("textvqa", made(tmp_path, "textvqa", "parquet"))
    write_rows(tmp_path / "b" / "textvqa" / "validation" / "a.parquet", TEXT, [7, 7, 70_000, 70_000])
    other = suite("textvqa", tmp_path / "b")
    for each in (found, other):
        each.materialise(each.samples()[0])
    assert other.samples()[0].media[0].path.read_bytes() == png(7)


def test_break_downs_are_those_of_the_papers(tmp_path: Path) -> None:
    def strata(name: str, number: int) -> dict[str, str]:
        return dict(suite(name, made(tmp_path, name, "parquet")).samples()[number].strata)

    assert strata("vqav2", 1) == {"answer_type": "number", "question_type": "how many"}
    assert strata("gqa", 0) == {"kind": "binary", "structural": "verify", "semantic": "attr"}
    assert strata("gqa", 1)["kind"] == "open"
    assert strata("scienceqa", 0) == {"subject": "NAT", "TXT": "yes", "IMG": "yes", "NO": "no", "grade": "G1-6"}
    assert strata("scienceqa", 3) == {"subject": "NAT", "TXT": "no", "IMG": "no", "NO": "yes", "grade": "G7-12"}
    assert [s.answer for s in suite("vqav2:type=yes/no", tmp_path / "data").samples()] == ["yes", "no"]
    with pytest.raises(UsageError, match="vqav2:type must be one of yes/no, number, other, not 'maybe'"):
        make_suite("vqav2:type=maybe")


@pytest.mark.parametrize(
    ("spec", "number", "text"),
    [
        ("vqav2", 0, "Is the cat asleep?" + SHORT),
        ("vqav2:prompt=vlmevalkit", 0, "Is the cat asleep?" + SHORT),
        ("gqa:prompt=lmms-eval", 1, "Who is wearing the dress?" + SHORT),
        ("textvqa", 0, "what does Sign 0 say?" + SHORT),
        ("textvqa:ocr=on", 1, "what does Sign 1 say?\nReference OCR token: STOP, 1" + SHORT),
        ("textvqa:prompt=lmms-eval", 0, "What does sign 0 say?" + SHORT),
        ("scienceqa", 0, f"Context: Look closely.\nWhich is number 0?\nA. ash\nB. bee\n{DIRECTLY}"),
        ("scienceqa:prompt=lmms-eval", 1, f"Which is number 1?\nA. ash\nB. bee\nC. cat\n{DIRECTLY}"),
        (
            "scienceqa:prompt=vlmevalkit",
            0,
            "Hint: Look closely.\nQuestion: Which is number 0?\nOptions:\nA. ash\nB. bee\n"
            "Please select the correct answer from the options above. \n",
        ),
        (
            "scienceqa:prompt=qcm-a",
            1,
            "Question: Which is number 1?\nContext: N/A\nOptions: (A) ash (B) bee (C) cat\nAnswer:",
        ),
        (
            "scienceqa:prompt=qcm-a",
            0,
            "Question: Which is number 0?\nContext: Look closely.\nOptions: (A) ash (B) bee\nAnswer:",
        ),
    ],
)
def test_the_prompts(tmp_path: Path, spec: str, number: int, text: str) -> None:
    name = spec.partition(":")[0]
    layout = "json" if name == "textvqa" else "parquet"
    found = suite(spec, made(tmp_path, name, layout))
    assert found.asked(found.samples()[number], ()).question == text


@pytest.mark.parametrize(
    ("name", "number", "text", "score", "read"),
    [
        ("vqav2", 0, "Yes.", 1.0, "yes"),
        ("vqav2", 1, "two", 1.0, "2"),
        ("vqav2", 1, "", 0.0, None),
        ("textvqa", 0, "STOP", 1.0, "stop"),
        ("textvqa", 0, "stop sign", 0.3, "stop sign"),
        ("gqa", 1, "Woman.", 1.0, "woman"),
        ("gqa", 1, "a woman", 0.0, "a woman"),
        ("gqa", 1, "?", 0.0, None),
        ("scienceqa", 1, "The answer is B.", 1.0, "B"),
        ("scienceqa", 0, "C", 0.0, None),
        ("scienceqa", 0, "bee", 0.0, "B"),
        ("scienceqa", 0, "Because y", 0.0, None),
    ],
)
def test_scores(tmp_path: Path, name: str, number: int, text: str, score: float, read: str | None) -> None:
    found = suite(name, made(tmp_path, name, "parquet"))
    value, prediction = found.score(found.samples()[number], text)
    assert (value, prediction) == (pytest.approx(score), read)


def test_questions_with_pictures_alone(tmp_path: Path) -> None:
    root = made(tmp_path, "scienceqa", "parquet")
    pictured = suite("scienceqa:subset=img", root)
    assert [sample.id for sample in pictured.samples()] == ["row-0", "row-1"]
    for sample in pictured.samples():
        pictured.materialise(sample)
    assert [s.media[0].path.read_bytes() for s in pictured.samples()] == [png(0), png(1)]
    write_rows(root / "scienceqa" / "test.parquet", SCHOOL[:2], [0, 1])
    with pytest.raises(UsageError, match="holds the questions with pictures alone; write scienceqa:subset=img"):
        suite("scienceqa", root)


# ScienceQA's train split.


@pytest.mark.parametrize("layout", ["parquet", "full", "json"])
@pytest.mark.parametrize("subset", ["full", "img"])
def test_the_train_split_is_other_questions_with_their_own_pictures(tmp_path: Path, layout: str, subset: str) -> None:
    found = suite(f"scienceqa:subset={subset}", made(tmp_path, "scienceqa", layout))
    train, test = found.samples("train"), found.samples("test")
    lessons = [
        (row, shown) for row, shown in zip(LESSONS, TAUGHT, strict=True) if subset == "full" or shown is not None
    ]
    for sample, (row, shown) in zip(train, lessons, strict=True):
        assert str(row["question"]) in sample.question
        assert sample.answer == "AB"[int(str(row["answer"]))]
        found.materialise(sample)
        assert [media.path.read_bytes() for media in sample.media] == ([] if shown is None else [png(shown)])
    assert [sample.id for sample in test] == [sample.id for sample in found.samples()]
    assert not {sample.id for sample in train} & {sample.id for sample in test}
    for sample in test:  # reading the one changes nothing of the other
        found.materialise(sample)
    assert [m.path.read_bytes() for s in test for m in s.media] == [png(0), png(1)]


def test_the_train_split_has_its_own_numbers_and_is_looked_for_only_when_it_is_asked_for(tmp_path: Path) -> None:
    assert (ScienceQATrain.n_rows, ScienceQATrain.n_pictured) == (N_ROWS, 3)
    root = made(tmp_path, "scienceqa", "parquet")
    path = root / "scienceqa" / "train.parquet"
    hash_ = suite("scienceqa", root).data_hash
    write_rows(path, LESSONS[:3], TAUGHT[:3])
    found = suite("scienceqa", root)
    with pytest.raises(UsageError, match=r"train\.parquet holds 3 rows where scienceqa has 4; .*--allow-partial"):
        found.samples("train")
    assert len(suite("scienceqa", root, allow_partial=True).samples("train")) == 3
    path.unlink()
    found = suite("scienceqa", root)
    assert found.data_hash == hash_
    with pytest.raises(UsageError, match=r"files \(train\.parquet, .*--include 'ScienceQA-FULL/train-\*'"):
        found.samples("train")


def test_a_question_in_both_splits_is_refused(tmp_path: Path) -> None:
    root = made(tmp_path, "scienceqa", "json")
    path = root / "scienceqa" / "pid_splits.json"
    ids = json.loads(path.read_text())
    write_file(path, ids | {"train": ["1", "2", "3", "12"]})
    with pytest.raises(UsageError, match=r"pid_splits\.json has 1 questions in both train and test; fetch it again"):
        suite("scienceqa", root).samples("train")


@pytest.mark.parametrize("prompt", ["official", "vlmevalkit", "qcm-a"])
def test_a_caption_stands_behind_the_context_when_captions_are_on(tmp_path: Path, prompt: str) -> None:
    root = made(tmp_path, "scienceqa", "json")
    off, on = (suite(f"scienceqa:prompt={prompt},captions={value}", root) for value in ("off", "on"))
    for split, number, before, after in (
        ("train", 0, "Look closely.", "Look closely. A red ball."),
        ("test", 1, {"official": "", "vlmevalkit": "", "qcm-a": "N/A"}[prompt], "A blue cup."),
    ):
        plain, told = (each.samples(split)[number].question for each in (off, on))  # type: ignore[arg-type]
        assert after not in plain
        assert before in plain
        assert f" {after}\n" in told
    same = [(a, b) for a, b in zip(off.samples(), on.samples(), strict=True) if a.id != "12"]
    assert [a.question for a, _ in same] == [b.question for _, b in same]
    assert (off.said, on.said) == (off.said, off.said.replace("captions off", "captions on"))
    assert off.data_hash != on.data_hash


def test_captions_without_the_original_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"captions=on needs the original files .*, and .*test\.parquet has no captions"
    ):
        suite("scienceqa:captions=on", made(tmp_path, "scienceqa", "parquet"))
    root = made(tmp_path / "other", "scienceqa", "json")
    (root / "scienceqa" / "captions.json").unlink()
    with pytest.raises(UsageError, match=r"captions\.json cannot be read"):
        suite("scienceqa:captions=on", root)
    suite("scienceqa", root)


def test_what_is_trained_on_the_train_split_is_found_by_a_run(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = made(tmp_path, "scienceqa", "json")
    monkeypatch.setenv("VLMBENCH_CACHE", str(tmp_path / "cache"))
    args = ["--model", "tiny-llava-ov", "--data-root", root]
    run = ["run", *args, "--method", "memvp", "--no-baseline", "--mode", "accuracy", "--max-new-tokens", 2]
    spec = "scienceqa:prompt=qcm-a"
    bare = cli(*run, "--suite", spec, "--out", tmp_path / "runs")
    assert bare.code == 2
    line = re.search("make one with `vlmbench (fit [^`]*)`", bare.err)
    assert line
    words = shlex.split(line[1].replace("--data-root DATA", f"--data-root {root}"))
    done = cli(*words, "--method", "memvp:slots=8", "--suite", spec, "--steps", 2)
    assert done.code == 0, done.err
    asked = "scienceqa (all questions, QCM-A, captions off): "
    assert f"{asked}4 train questions" in done.err
    (path,) = (tmp_path / "cache").rglob("memvp-*.safetensors")
    header = memvp_file.read(str(path))
    assert (header.suite, header.shape.slots, header.n + header.n_held_out) == (spec, 8, 4)
    assert {"prompt": "qcm-a", "captions": False, "subset": "full"}.items() <= header.recipe["asked"].items()
    found = cli(*run, "--suite", spec, "--out", tmp_path / "runs", "--strict")
    assert found.code == 0, found.err
    assert f"{asked}4 questions" in found.err
    assert "was trained with" not in found.err
    (view,) = ResultStore(tmp_path / "runs").runs()
    assert view.header["spec"]["suite_params"]["captions"] is False
    assert view.header["spec"]["method_params"]["artefact"] == header.digest
    memory = {id_: (record.trace or {})["memory"]["visual"] for id_, record in view.records.of("accuracy").items()}
    assert [bool(memory[id_]) for id_ in ("11", "12", "13", "14")] == [True, True, False, False]
    other = cli(*run, "--suite", f"{spec},captions=on", "--out", tmp_path / "runs")
    assert f"{path} was trained with captions=False, and this run asks with captions=True." in other.err


@pytest.mark.parametrize(
    ("args", "said"),
    [((), "scienceqa needs --data-root"), (("--data-root", "nowhere"), "--data-root nowhere is no folder")],
)
def test_fitting_without_the_files_is_one_sentence_and_exit_2(cli: Cli, tmp_path: Path, args: Any, said: str) -> None:
    out = tmp_path / "a.safetensors"
    done = cli("fit", "--model", "tiny-llava-ov", "--method", "memvp", "--suite", "scienceqa", "--out", out, *args)
    assert (done.code, len(done.err.strip().splitlines()), said in done.err) == (2, 1, True)
    assert not list(tmp_path.iterdir())


def test_verify_reads_the_questions_that_are_asked(cli: Cli, tmp_path: Path) -> None:
    for layout in ("parquet", "json"):
        root = made(tmp_path / layout, "scienceqa", layout)
        done = cli("data", "verify", "--suite", "scienceqa", "--data-root", root, "--format", "json")
        assert done.code == 0, done.out + done.err
        checks = {row["check"]: row for row in json.loads(done.out)["rows"]}
        assert (checks["rows"]["found"], checks["rows"]["expected"], checks["media"]["expected"]) == (4, 4, 2)


# What is missing or wrong.


@pytest.mark.parametrize("name", WRITERS)
def test_what_is_missing_is_one_sentence_and_exit_2(cli: Cli, tmp_path: Path, name: str) -> None:
    (tmp_path / "data").mkdir()
    done = cli("run", "--suite", name, "--model", "dummy", "--data-root", tmp_path / "data", "--out", tmp_path / "runs")
    assert (done.code, len(done.err.strip().splitlines())) == (2, 1)
    assert f"{tmp_path / 'data' / name} holds none of {name}'s files" in done.err
    assert f"--local-dir {tmp_path / 'data' / name}`" in done.err
    assert f"{type(make_suite(name)).size}" in done.err  # type: ignore[attr-defined]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", [*WRITERS, "videomme", "longvideobench"])
def test_what_is_missing_has_a_size_and_a_command_that_fetches_no_more_than_is_read(cli: Cli, name: str) -> None:
    found = make_suite(name)
    assert isinstance(found, OfficialSuite)
    assert re.search(r"\d (MB|GB)", found.size)
    done = cli("run", "--suite", name, "--model", "dummy")
    assert (done.code, len(done.err.strip().splitlines())) == (2, 1)
    command = re.search("`hf download ([^`]*)`", done.err)
    assert command
    words = shlex.split(command[1])
    assert words[:3] == [found.hub[0], "--repo-type", "dataset"]
    assert words[-2:] == ["--local-dir", f"DATA/{name}"]
    if found.wanted is not None:
        assert words[3:5] == ["--include", found.wanted]
        # The hub's glob, unlike a shell's, lets a star stand for folders too.
        assert any(fnmatch.fnmatch(pattern, found.wanted) for pattern in found.layouts.values())
    assert found.media_on_hub or f"`vlmbench data prepare --suite {name} --data-root DATA`" in done.err


@pytest.mark.parametrize(("name", "layout"), [pair for pair in LAYOUTS if pair[1] == "json"])
def test_missing_pictures_are_counted_and_left_out_of_partial_data(tmp_path: Path, name: str, layout: str) -> None:
    root = made(tmp_path, name, layout)
    pictures = sorted(path for kind in ("*.jpg", "*.png") for path in root.rglob(kind))
    pictures[0].unlink()
    with pytest.raises(UsageError, match=rf"1 of 2 files of {name} are missing in .*--allow-partial"):
        suite(name, root)
    left = suite(name, root, allow_partial=True).samples()
    assert len(left) == (3 if name == "scienceqa" else 2)


def test_a_picture_table_without_a_picture_that_is_asked_about_is_refused(tmp_path: Path) -> None:
    root = made(tmp_path, "gqa", "parquet")
    write_rows(root / "gqa" / "images.parquet", [{"id": "n0"}], [0])
    with pytest.raises(UsageError, match=r"images\.parquet lacks the pictures of 2 questions"):
        suite("gqa", root)
    found = suite("gqa", root, allow_partial=True)
    assert [sample.cluster for sample in found.samples()] == ["n0", "n0"]
    found.materialise(found.samples()[1])
    (root / "gqa" / "images.parquet").unlink()
    with pytest.raises(UsageError, match=r"holds no pictures \(images\.parquet, "):
        suite("gqa", root)


@pytest.mark.parametrize(
    ("name", "rows", "change", "said"),
    [
        ("vqav2", VQA, {"answer_type": "maybe"}, "has the answer_type 'maybe'"),
        ("vqav2", VQA, {"answers": []}, "has no answers to 42000; only validation can be scored"),
        ("textvqa", TEXT, {"answers": []}, "has no answers to 34602"),
        ("textvqa", TEXT, {"question_id": 34_603}, "holds a question twice"),
        ("scienceqa", SCHOOL, {"answer": 2}, "has the answer '2', not one of 0, 1"),
        ("scienceqa", SCHOOL, {"subject": "art"}, "has the subject 'art'"),
    ],
)
def test_a_row_that_cannot_be_right_is_refused(
    tmp_path: Path, name: str, rows: list[dict[str, Any]], change: dict[str, Any], said: str
) -> None:
    path = tmp_path / name / ("test.parquet" if name == "scienceqa" else "validation/a.parquet")
    write_rows(path, [rows[0] | change, *rows[1:]], [0, 0, 1, 1])
    with pytest.raises(UsageError, match=said):
        suite(name, tmp_path)


@pytest.mark.parametrize("name", WRITERS)
def test_other_columns_and_another_number_of_rows_are_refused(tmp_path: Path, name: str) -> None:
    root = made(tmp_path, name, "parquet")
    path = next(path for path in root.rglob("*.parquet") if path.stem not in ("images", "train"))
    kept = pq.read_table(path)
    pq.write_table(kept.rename_columns(["asked" if n == "question" else n for n in kept.column_names]), path)
    with pytest.raises(UsageError, match=r"row \d has no question"):
        suite(name, root)
    pq.write_table(kept.slice(0, 1), path)
    with pytest.raises(UsageError, match=rf"rows where {name} has 4; .*--allow-partial"):
        suite(name, root)
    assert len(suite(name, root, allow_partial=True).samples()) < N_ROWS


def test_a_damaged_json_file_is_named(tmp_path: Path) -> None:
    root = made(tmp_path, "scienceqa", "json")
    (root / "scienceqa" / "pid_splits.json").write_text("{")
    with pytest.raises(UsageError, match=r"pid_splits\.json cannot be read .*fetch it again"):
        suite("scienceqa", root)


JUNK: tuple[Any, ...] = (None, 3, "x", [], {}, [1], [None], {"questions": 3}, {"annotations": None}, {"data": [3]})


@pytest.mark.parametrize("name", WRITERS)
def test_a_value_of_any_other_kind_in_a_json_file_is_a_sentence(tmp_path: Path, name: str) -> None:
    """In place of the whole file, of a row, and of each of a row's values; what can be used all the same is used."""
    root = made(tmp_path, name, "json")
    for file in (root / name).rglob("*.json"):
        good = json.loads(file.read_text())
        rows = next((good[key] for key in ("questions", "annotations", "data") if key in good), good)
        first = 0 if isinstance(rows, list) else next(iter(rows))
        kept = rows[first]
        for junk in JUNK:
            changed = [junk]
            rows[first] = junk
            changed.append(json.loads(json.dumps(good)))
            for key in kept if isinstance(kept, dict) else ():
                rows[first] = {**kept, key: junk}
                changed.append(json.loads(json.dumps(good)))
            rows[first] = kept
            for each in changed:
                file.write_text(json.dumps(each))
                with contextlib.suppress(UsageError):
                    assert suite(name, root, allow_partial=True).data_hash
        file.write_text(json.dumps(good))
    assert len(suite(name, root).samples()) == N_ROWS


# The hub, which no test may reach: its package is stood in for.


class HubRows:
    """What the suites use of a `datasets.Dataset`."""

    def __init__(self, table: Any) -> None:
        self.data = table
        self.column_names = table.column_names

    def cast_column(self, name: str, kind: Any) -> HubRows:
        assert (name, kind) == ("image", "undecoded")
        return self

    def remove_columns(self, name: str) -> HubRows:
        return HubRows(self.data.drop_columns([name]))

    def to_list(self) -> Any:
        return self.data.to_pylist()

    def __getitem__(self, row: int) -> Any:
        return self.data.slice(row, 1).to_pylist()[0]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Only the older names of data sets are there; the list is what was asked for."""
    asked: list[tuple[Any, ...]] = []
    files = {
        ("lmms-lab/textvqa", None): "textvqa/validation/a.parquet",
        ("lmms-lab/GQA", "testdev_balanced_instructions"): "gqa/instructions.parquet",
        ("lmms-lab/GQA", "testdev_balanced_images"): "gqa/images.parquet",
        ("lmms-lab/ScienceQA", "ScienceQA-FULL"): "scienceqa/test.parquet",
    }
    for name in ("textvqa", "gqa", "scienceqa"):
        made(tmp_path, name, "parquet")

    def load_dataset(name: str, config: str | None, *, split: str, revision: str) -> HubRows:
        asked.append((name, config, split, revision))
        if (name, config) not in files:
            raise FileNotFoundError(f"no data set {name}")
        return HubRows(pq.read_table(tmp_path / "data" / files[name, config]))

    stand_in = SimpleNamespace(load_dataset=load_dataset, Image=lambda *, decode: "decoded" if decode else "undecoded")
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    return asked


@pytest.mark.parametrize("name", ["textvqa", "gqa", "scienceqa"])
def test_the_hub_gives_the_same_at_the_commit_that_is_named(tmp_path: Path, hub: list[Any], name: str) -> None:
    local = suite(name, tmp_path / "data")
    found = make_suite(f"{name}:revision=abc123").located(None)
    assert [told(sample) for sample in found.samples()] == [told(sample) for sample in local.samples()]
    assert {revision for *_, revision in hub} == {"abc123"}
    assert hub[0][0].startswith("lmms-lab-encoder/")  # the present name first
    for one, other in zip(local.samples(), found.samples(), strict=True):
        local.materialise(one)
        found.materialise(other)
        assert [m.path.read_bytes() for m in one.media] == [m.path.read_bytes() for m in other.media]


def test_what_the_hub_refuses_is_a_sentence_and_offline_does_not_ask(tmp_path: Path, hub: list[Any]) -> None:
    with pytest.raises(
        UsageError, match=r"The hub gives no rows at revision 'abc' \(lmms-lab-encoder/VQAv2: no data set"
    ):
        make_suite("vqav2:revision=abc").located(None)
    hub.clear()
    with pytest.raises(UsageError, match=r"revision must be a commit of lmms-lab-encoder/VQAv2, not 'main'"):
        make_suite("vqav2:revision=main").located(None)
    with pytest.raises(UsageError, match="vqav2 needs --data-root"):
        make_suite("vqav2:revision=abc").located(None, offline=True)
    assert hub == []


def test_a_gated_data_set_without_a_token_says_how_to_get_in(hub: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(name: str, *args: Any, **options: Any) -> None:
        raise RuntimeError(f"Dataset '{name}' is a gated dataset on the Hub. You must be authenticated to access it.")

    monkeypatch.setattr(sys.modules["datasets"], "load_dataset", closed)
    with pytest.raises(UsageError, match=r"accept the conditions of longvideobench/LongVideoBench .*`hf auth login`"):
        make_suite("longvideobench:revision=abc").located(None)


# The whole command.


@pytest.mark.parametrize("name", WRITERS)
def test_the_whole_command_with_the_stand_in(cli: Cli, tmp_path: Path, name: str) -> None:
    root = made(tmp_path, name, "parquet")
    args = ["--suite", name, "--data-root", root, "--model", "dummy:accuracy=1", "--out", tmp_path / "runs", "--strict"]
    done = cli("run", *args)
    assert done.code == 0, done.err
    (view,) = ResultStore(tmp_path / "runs").runs()
    records = view.records.of("accuracy")
    assert [record.score for record in records.values()] == [1.0] * N_ROWS
    again = cli("rescore", tmp_path / "runs")
    assert (again.code, again.out.strip()) == (0, "4 answers scored again, 0 changed.")
    texts = tmp_path / "texts.jsonl"
    texts.write_text("\n".join(json.dumps({"id": r.id, "text": r.raw_text}) for r in records.values()))
    scored = cli("score", "--suite", name, "--data-root", root, "--text", texts, "--format", "json")
    assert json.loads(scored.out)["rows"][0]["accuracy"] == 1.0, scored.err
    root.rename(tmp_path / "moved")
    assert cli("rescore", tmp_path / "runs").code == 2
    assert cli("rescore", tmp_path / "runs", "--data-root", tmp_path / "moved").code == 0


def test_the_whole_command_with_a_model_also_without_a_picture(cli: Cli, tmp_path: Path) -> None:
    root = made(tmp_path, "scienceqa", "parquet")
    args = ["--suite", "scienceqa", "--data-root", root, "--model", "mini-qwen2-vl@random", "--mode", "accuracy"]
    done = cli("run", *args, "--max-new-tokens", 2, "--out", tmp_path / "runs", "--strict")
    assert done.code == 0, done.err
    (view,) = ResultStore(tmp_path / "runs").runs()
    records = view.records.of("accuracy")
    assert [records[f"row-{number}"].size for number in range(4)] == [(56, 56), (56, 56), None, None]
    visual = {id_: record.tokens["visual"] for id_, record in records.items()}
    assert [bool(visual[f"row-{number}"]) for number in range(4)] == [True, True, False, False]


@pytest.mark.parametrize("name", ["vqav2", "gqa", "textvqa"])
def test_pictures_inside_the_rows_reach_a_model(cli: Cli, tmp_path: Path, name: str) -> None:
    root = made(tmp_path, name, "parquet")
    args = ["--suite", name, "--data-root", root, "--model", "mini-qwen2-vl@random", "--mode", "accuracy", "--limit", 2]
    done = cli("run", *args, "--max-new-tokens", 2, "--out", tmp_path / "runs", "--strict")
    assert done.code == 0, done.err
    (view,) = ResultStore(tmp_path / "runs").runs()
    assert {record.size for record in view.records.of("accuracy").values()} == {(56, 56)}


def test_a_full_disk_ends_the_run_with_a_sentence_and_loses_nothing(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = made(tmp_path, "scienceqa", "parquet")
    args = ["--suite", "scienceqa", "--data-root", root, "--model", "mini-qwen2-vl@random", "--mode", "accuracy"]
    args += ["--max-new-tokens", 2, "--out", tmp_path / "runs"]
    monkeypatch.setenv("VLMBENCH_CACHE", str(tmp_path / "cache"))
    written: list[Path] = []

    def full(path: Path, encoded: bytes, real: Any = base._write) -> None:
        if written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path.parent))
        written.append(path)
        real(path, encoded)

    with monkeypatch.context() as patch:
        patch.setattr(base, "_write", full)
        done = cli("run", *args)
    assert (done.code, "cannot be written (No space left on device): everything finished is kept" in done.err) == (
        1,
        True,
    )
    (view,) = ResultStore(tmp_path / "runs").runs()
    kept = set(view.records.of("accuracy"))
    assert kept < {f"row-{number}" for number in range(4)}
    assert cli("run", *args, "--strict").code == 0
    (view,) = ResultStore(tmp_path / "runs").runs()
    assert len(view.records.of("accuracy")) == 4
