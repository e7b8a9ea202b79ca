"""The real lmms-eval, in an environment of its own (``make test-lmms``): its tasks here, our methods there, both scorers."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

if importlib.util.find_spec("lmms_eval") is None:
    pytest.skip("lmms-eval is not installed: make test-lmms", allow_module_level=True)

import pyarrow as pa
import pyarrow.parquet as pq

from vlmbench.lmms_client import LmmsEval
from vlmbench.session import make_suite
from vlmbench.suites._official.vqa import exact, vqa_score
from vlmbench.suites._synth.encode import write_mp4
from vlmbench.suites.scienceqa import ScienceQA
from vlmbench.suites.videomme import VideoMME

Cli = Callable[..., Any]
ROWS = [
    {
        "video_id": f"{number:03d}", "duration": "short", "domain": "Knowledge", "sub_category": "Law",
        "url": "", "videoID": f"video{number}", "question_id": f"{number:03d}-1", "task_type": "OCR Problems",
        "question": "What is it?", "options": ["A. One.", "B. Two.", "C. Three.", "D. Four."], "answer": "ABCD"[number],
    }
    for number in range(3)
]  # fmt: skip


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(VideoMME, "n_rows", len(ROWS))
    folder = tmp_path / "videomme"
    for row in ROWS:
        noise = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
        write_mp4(noise, folder / "data" / f"{row['videoID']}.mp4")
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "test.parquet")
    return tmp_path


def test_video_mme_as_their_task_asks_what_our_suite_asks_in_their_words(cli: Cli, root: Path, tmp_path: Path) -> None:
    theirs = make_suite("lmms:videomme").located(root, offline=True)
    ours = make_suite("videomme:prompt=lmms-eval").located(root)
    for one, other in zip(theirs.samples(), ours.samples(), strict=True):
        assert one.question == ours.asked(other, ()).question.strip()
        assert (one.media, one.answer, one.cluster) == (other.media, other.answer, other.cluster)
    args = [
        "--suite",
        "lmms:videomme",
        "--data-root",
        root,
        "--model",
        "mini-qwen2-vl@random",
        "--method",
        "uniform:ratio=0.5",
    ]
    done = cli("run", *args, "--frames", 4, "--mode", "accuracy", "--out", tmp_path / "runs", "--strict", "--offline")
    assert done.code == 0, done.err
    assert "6 answers scored again, 0 changed" in cli("rescore", tmp_path / "runs").out
    (root / "videomme" / "data" / "video1.mp4").unlink()
    missing = cli("run", *args, "--out", tmp_path / "other", "--offline")
    assert (missing.code, "video1.mp4 does not exist" in missing.err) == (2, True)


def test_our_methods_run_inside_lmms_eval(root: Path, tmp_path: Path) -> None:
    """As its users would: `--model vlmbench` from the entry point, the method inside `--model_args`."""
    task = tmp_path / "task"
    task.mkdir()
    (task / "ours.yaml").write_text(
        f"""
task: ours
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {root}/videomme/test.parquet
test_split: test
output_type: generate_until
doc_to_visual: !function lmms_eval.tasks.videomme.utils.videomme_doc_to_visual
doc_to_text: !function lmms_eval.tasks.videomme.utils.videomme_doc_to_text
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 3
process_results: !function lmms_eval.tasks.videomme.utils.videomme_process_results
metric_list:
  - metric: videomme_perception_score
    aggregation: !function lmms_eval.tasks.videomme.utils.videomme_aggregate_results
    higher_is_better: true
lmms_eval_specific_kwargs:
  default:
    post_prompt: "The best answer is:"
"""
    )
    arguments = "pretrained=mini-qwen2-vl@random,method=pevlm,sink=1,block=2,frames=6,dtype=float32,device=cpu"
    command = [sys.executable, "-m", "lmms_eval", "--model", "vlmbench", "--model_args", arguments, "--tasks", "ours"]
    command += [
        "--include_path",
        str(task),
        "--output_path",
        str(tmp_path / "out"),
        "--log_samples",
        "--batch_size",
        "1",
    ]
    env = {**os.environ, "HF_HOME": str(root), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    found = list((tmp_path / "out").rglob("*samples_ours.jsonl"))
    assert found, done.stdout[-2000:] + done.stderr[-2000:]
    lines = [json.loads(line) for line in found[0].read_text().splitlines()]
    assert len(lines) == len(ROWS)
    assert all(line["videomme_perception_score"]["pred_answer"] is not None for line in lines)


@pytest.fixture(scope="module")
def lmms() -> Iterator[dict[str, LmmsEval]]:
    """One process with the scorer of each task."""
    found = {}
    for task in ("videomme", "longvideobench_val_v", "vqav2_val", "textvqa_val", "gqa", "scienceqa"):
        found[task] = LmmsEval(offline=True)
        found[task].ask("scorer", task=task)
    yield found
    for each in found.values():
        each.close()


letters = st.sampled_from("ABCD")
options = ["cat", "dog", "bird", "cow"]
few = settings(max_examples=300, deadline=None)


@few
@given(
    letters,
    letters,
    st.sampled_from(["{}", "{}.", "({})", " {}", "{}: yes", "The best answer is {}", "The answer is {}."]),
)
def test_letters_in_the_forms_that_the_benchmark_asks_for_score_alike(
    lmms: dict[str, LmmsEval], answer: str, said: str, form: str
) -> None:
    text = form.format(said)
    suite = make_suite("videomme")
    theirs = lmms["videomme"].ask("rate", row=ROWS[0] | {"answer": answer}, text=text)
    ours = suite.score(sample(answer), text)
    assert (ours.value, theirs["random"]) == (theirs["value"], False)
    theirs = lmms["longvideobench_val_v"].ask("rate", row=long_row("ABCD".index(answer)), text=text)
    assert (ours.value, theirs["random"]) == (theirs["value"], False)


def long_row(choice: int) -> dict[str, Any]:
    row: dict[str, Any] = {"id": "1", "duration_group": 15, "question_category": "S2E", "correct_choice": choice}
    return row | {f"option{i}": option for i, option in enumerate([*options, "N/A"])}


def sample(answer: str) -> Any:
    from vlmbench.suite import Sample

    return Sample(
        id="1", cluster="1", media=(), question="", answer=answer, template="", extra={"options": tuple(options)}
    )


def test_where_letters_are_read_otherwise_theirs_guesses_or_takes_the_first_capital(lmms: dict[str, LmmsEval]) -> None:
    """The list of differences that are meant; each is a line of `score --scorer lmms-eval`."""
    row = long_row(1)
    suite, asked = make_suite("longvideobench"), sample("B")
    rate = lmms["longvideobench_val_v"]
    assert rate.ask("rate", row=row, text="no idea")["random"]  # ours: unread
    assert suite.score(asked, "no idea") == (0.0, None)
    assert rate.ask("rate", row=row, text="Because it barks")["value"] == 1.0  # the first capital
    assert suite.score(asked, "Because it barks") == (0.0, None)
    school = {"choices": options, "answer": 1}
    assert lmms["scienceqa"].ask("rate", row=school, text="The answer is B")["value"] == 0.0
    assert ScienceQA().score(asked, "The answer is B") == (1.0, "B")
    assert lmms["gqa"].ask("rate", row={"answer": "t-shirt"}, text="T-Shirt")["value"] == 1.0


words = st.text(st.sampled_from("abcdeghiost 0123.,'?!/-"), min_size=1, max_size=14)


@few
@given(
    st.lists(
        st.sampled_from(["yes", "two dogs", "1,000", "a.m.", "dont", "red/blue", "it's", "none"]),
        min_size=10,
        max_size=10,
    ),
    words,
)
def test_short_answers_score_alike(lmms: dict[str, LmmsEval], answers: list[str], text: str) -> None:
    text = " ".join(text.split()) or "x"
    for said in (text, answers[0], f"The {answers[0]}."):
        row = {"question_id": 1, "answers": [{"answer": each, "answer_id": i} for i, each in enumerate(answers)]}
        theirs = lmms["vqav2_val"].ask("rate", row=row, text=said)
        assert vqa_score(said, answers)[0] == pytest.approx(theirs["value"]), said
        theirs = lmms["textvqa_val"].ask("rate", row={"question_id": 1, "answers": answers}, text=said)
        assert vqa_score(said, answers, tokenise=True)[0] == pytest.approx(theirs["value"]), said
        theirs = lmms["gqa"].ask("rate", row={"answer": answers[0]}, text=said)
        assert float(exact(said) == exact(answers[0])) == theirs["value"], said
