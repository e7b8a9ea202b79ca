"""A scorer works on texts from a file, whoever wrote them, and what it cannot use it names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlmbench.suites.synthimage import SynthImage

Cli = Callable[..., Any]
SAMPLES = SynthImage().samples()
GOOD = {sample.id: sample.answer for sample in SAMPLES}


def rows(cli: Cli, path: Path, suite: str = "synthimage") -> list[dict[str, Any]]:
    done = cli("score", "--suite", suite, "--text", path, "--format", "json")
    assert done.code == 0, done.err
    data = json.loads(done.out)
    assert data["schema"] == 1
    return list(data["rows"])


@pytest.mark.parametrize(
    "write",
    [
        lambda: "\n".join(json.dumps({"id": key, "text": value}) for key, value in GOOD.items()),
        lambda: json.dumps([{"question_id": key, "answer": value} for key, value in GOOD.items()]),
        lambda: json.dumps([{"questionId": key, "prediction": value} for key, value in GOOD.items()]),
        lambda: json.dumps(
            [{"questions": [{"question_id": key, "answer": "?", "response": GOOD[key]}]} for key in GOOD]
        ),
        lambda: json.dumps(GOOD),
    ],
    ids=["lines", "EvalAI", "GQA", "Video-MME", "mapping"],
)
def test_every_format_in_use_is_read(cli: Cli, tmp_path: Path, write: Callable[[], str]) -> None:
    (tmp_path / "answers").write_text(write())
    found = rows(cli, tmp_path / "answers")
    assert found[0] == {"field": "", "value": "", "n": 600, "n_missing": 0, "n_unread": 0, "accuracy": 1.0}
    assert {row["field"] for row in found[1:]} == {"type"}
    assert sum(row["n"] for row in found[1:]) == 600


def test_unread_answers_are_wrong_and_missing_ones_are_counted(cli: Cli, tmp_path: Path) -> None:
    first, second, third = SAMPLES[:3]
    lines = [{"id": first.id, "text": first.answer}, {"id": second.id, "text": "no idea"}, {"id": third.id, "text": ""}]
    (tmp_path / "answers").write_text("\n".join(map(json.dumps, lines)))
    whole = rows(cli, tmp_path / "answers")[0]
    assert (whole["n"], whole["n_missing"], whole["n_unread"]) == (3, 597, 2)
    assert whole["accuracy"] == pytest.approx(1 / 3)
    shown = cli("score", "--suite", "synthimage", "--text", tmp_path / "answers").out
    assert shown.splitlines()[0].split(maxsplit=1) == ["all", "33.3%  of 3 (2 unread, 597 missing)"]


def test_the_records_of_a_run_score_as_they_did(cli: Cli, tmp_path: Path) -> None:
    args = ["--model", "dummy:oom=0.2", "--suite", "synthimage", "--limit", 50, "--out", tmp_path]
    assert cli("run", *args).code == 0
    (path,) = tmp_path.rglob("samples.jsonl")
    stored = [json.loads(line) for line in path.read_text().splitlines()]
    finished = [each for each in stored if each["pass"] == "accuracy" and each["status"] in ("ok", "parse_fail")]
    whole = rows(cli, path)[0]
    assert whole["n"] == len(finished) < 50
    assert whole["accuracy"] == pytest.approx(sum(each["score"] for each in finished) / len(finished))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"id": "elsewhere", "text": "A"}', "answers 1 questions that synthimage does not have (one is 'elsewhere'"),
        ('{"id": "a"}\n{"id": "b"}', "line 1: it needs an id (id, question_id, questionId, qid) and a text"),
        ('{"id": "a", "text": "b"}\n{"id": ', "line 2 is no JSON"),
        ("", "holds no answer"),
        ("[1]", "'1' is no object with an id and a text; write {'id': …, 'text': …}"),
    ],
)
def test_a_file_that_cannot_be_scored_says_where(cli: Cli, tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "answers").write_text(text)
    done = cli("score", "--suite", "synthimage", "--text", tmp_path / "answers")
    assert (done.code, len(done.err.strip().splitlines())) == (2, 1)
    assert said in done.err
    gone = cli("score", "--suite", "synthimage", "--text", tmp_path / "gone")
    assert (gone.code, "gone cannot be read" in gone.err) == (2, True)


def test_a_generated_suite_takes_no_data_root(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "answers").write_text(json.dumps(GOOD))
    done = cli("score", "--suite", "synthimage", "--text", tmp_path / "answers", "--data-root", tmp_path)
    assert (done.code, "mean nothing for synthimage" in done.err) == (2, True)
