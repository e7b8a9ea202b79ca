"""lmms-eval stays in a process of its own, whatever it does there; a package that behaves like it stands in for it here.

`tests/lmms` runs the same against the real one (``make test-lmms``).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vlmbench.errors import RunError, UsageError
from vlmbench.lmms_client import LmmsEval
from vlmbench.session import make_suite
from vlmbench.suites._synth.encode import write_mp4
from vlmbench.suites.lmms import Lmms
from vlmbench.suites.videomme import VideoMME

Cli = Callable[..., Any]

TASK = """
import functools, json, os, sys
print("what a task prints at import")
HOME = os.environ.get("HF_HOME", "")

class Retried(Exception):
    def __init__(self, inner):
        super().__init__("RetryError[<Future at 0x0>]")
        self.last_attempt = self
        self._inner = inner
    def exception(self):
        return self._inner

def retry(function):
    @functools.wraps(function)
    def call(*args):
        for _ in range(5):
            try:
                return function(*args)
            except Exception as error:
                last = error
        raise Retried(last)
    return call

class Config:
    def __init__(self, config):
        self.generation_kwargs = config.get("generation_kwargs")

class ConfigurableTask:
    def __init__(self, config, model_name):
        self.config, self._config = Config(config), config
        self._docs = json.load(open(os.path.join(HOME, "docs.json")))
        if config.get("broken"):
            raise Retried(OSError("no space on the hub"))
    def has_test_docs(self):
        return True
    def test_docs(self):
        return self._docs
    def doc_to_text(self, doc):
        return doc["question"]
    def doc_to_target(self, doc):
        return doc["answer"]
    def doc_to_visual(self, doc):
        if "picture" in doc:
            from PIL import Image
            return [Image.new("RGB", (56, 56), doc["picture"])]
        path = os.path.join(HOME, doc["video"])
        if not os.path.exists(path):
            sys.exit(f"video path:{path} does not exist, please check")
        return [path]
    @retry
    def process_results(self, doc, results):
        import random
        text = results[0]
        if text == "crash":
            os._exit(3)
        if text == "fault":
            raise KeyError("a bug of the task")
        read = text if text in ("A", "B") else random.choice("AB")
        doc["answer"] = doc["answer"].lower()
        return {"submission": 1, "acc": {"pred_answer": read, "answer": doc["answer"].upper()}}
    def aggregation(self):
        return {"submission": None, "acc": lambda found: 100 * sum(f["pred_answer"] == f["answer"] for f in found)}

def load_yaml_config(path, mode):
    out = {"test_split": "test", "output_type": "generate_until", "generation_kwargs": {"max_new_tokens": 7, "until": ["#"]}}
    for line in open(path):
        key, _, value = line.strip().partition(": ")
        if value:
            out[key] = value.strip("'")
    out["metric_list"] = [{"metric": "acc", "aggregation": lambda found: float(found[0]["pred_answer"] == found[0]["answer"])}]
    def process(doc, results):
        import random
        read = results[0] if results[0] in ("A", "B", "C", "D") else random.choice("ABCD")
        return {"acc": {"pred_answer": read, "answer": doc["answer"]}}
    out["process_results"] = process
    return out
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package on the path, and below the returned folder two documents with media."""
    package = tmp_path / "site" / "lmms_eval"
    (package / "tasks" / "things").mkdir(parents=True)
    (package / "api").mkdir()
    for name in ("__init__.py", "api/__init__.py"):
        (package / name).write_text("")
    (package / "api" / "task.py").write_text(TASK)
    (package / "utils.py").write_text("from lmms_eval.api.task import load_yaml_config\n")
    for name, more in (
        ("things", ""),
        ("videomme", ""),
        ("broken_things", "broken: yes\n"),
        ("odd", "output_type: loglikelihood\n"),
        ("rounds", "output_type: generate_until_multi_round\n"),
    ):
        (package / "tasks" / "things" / f"{name}.yaml").write_text(f"task: '{name}'  # comment\n{more}")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    root = tmp_path / "data"
    import numpy as np

    write_mp4(np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8), root / "a.mp4")
    docs = [
        {"question": "Which?", "answer": "A", "video": "a.mp4"},
        {"question": "<image>What?", "answer": "B", "picture": "red"},
    ]
    (root / "docs.json").write_text(json.dumps(docs))
    return root


@pytest.fixture
def suite(stand_in: Path) -> Iterator[Lmms]:
    found = make_suite("lmms:things").located(stand_in)
    assert isinstance(found, Lmms)
    yield found
    found._lmms.close()


def test_documents_become_samples_with_the_tasks_own_limits(suite: Lmms, stand_in: Path) -> None:
    first, second = suite.samples()
    assert (first.question, first.answer, first.cluster, first.media[0].path) == (
        "Which?",
        "A",
        "a.mp4",
        stand_in / "a.mp4",
    )
    assert (second.question, second.media[0].kind) == ("What?", "image")
    assert suite.max_new_tokens == 7
    assert not second.media[0].path.exists()
    for sample in (first, second):
        suite.materialise(sample)
    assert second.media[0].path.read_bytes().startswith(b"\x89PNG")
    assert len(suite.data_hash) == 8


def test_words_between_pictures_are_refused_unless_pictures_may_come_first(stand_in: Path) -> None:
    for text, first in (
        ("<image>\n<image> What?", True),
        ("In <image> and <image>, what?", False),
        ("What? <image>", False),
    ):
        doc = {"question": text, "answer": "B", "picture": "red"}
        (stand_in / "docs.json").write_text(json.dumps([doc]))
        if first:
            assert make_suite("lmms:things").located(stand_in).samples()[0].question == "What?"
            continue
        with pytest.raises(UsageError, match=r"lmms:things is an interleaved task .*; write lmms:things,media=first"):
            make_suite("lmms:things").located(stand_in)
        asked = make_suite("lmms:things,media=first").located(stand_in).samples()[0]
        assert asked.question == text.replace("<image>", "").strip()
        assert [each.kind for each in asked.media] == ["image"]


def test_scores_are_shares_and_a_guess_is_the_same_one_every_time(suite: Lmms) -> None:
    first, second = suite.samples()
    assert suite.score(first, "A") == (1.0, "A")
    assert suite.score(first, "B") == (0.0, "B")
    assert suite.score(second, "B# and more") == (1.0, "B")
    assert len({suite.score(first, "no letter") for _ in range(5)}) == 1


def test_what_it_does_to_its_process_stays_there(suite: Lmms) -> None:
    first = suite.samples()[0]
    with pytest.raises(ValueError, match="KeyError: 'a bug of the task'"):
        suite.score(first, "fault")
    assert suite.score(first, "A").value == 1.0
    with pytest.raises(RunError, match="lmms-eval's process ended"):
        suite.score(first, "crash")
    assert "lmms_eval" not in sys.modules


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lmms", "lmms needs a task; write lmms:TASK"),
        ("lmms:thing", r"no task 'thing' of its own, or it is a group \(near: things"),
        ("lmms:broken_things", r"lmms:broken_things cannot be opened \(OSError: no space on the hub\)"),
        ("lmms:odd", "its output type is loglikelihood, and only generate_until"),
        ("lmms:rounds", "its output type is generate_until_multi_round, and only generate_until"),
        ("lmms:things,rows=gone/*.parquet", r"holds no file gone/\*\.parquet"),
    ],
)
def test_a_task_that_cannot_be_opened_is_one_sentence(stand_in: Path, text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        make_suite(text).located(stand_in)


def test_a_missing_video_ends_no_process_and_a_folder_that_is_missing_is_named(stand_in: Path) -> None:
    (stand_in / "a.mp4").unlink()
    with pytest.raises(UsageError, match=r"video path:.*a\.mp4 does not exist"):
        make_suite("lmms:things").located(stand_in)
    with pytest.raises(UsageError, match="nowhere is no folder"):
        make_suite("lmms:things").located(stand_in / "nowhere")


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'vlmbench\[lmms\]'"):
        LmmsEval()


def test_the_whole_command(cli: Cli, stand_in: Path, tmp_path: Path) -> None:
    args = [
        "--suite",
        "lmms:things",
        "--data-root",
        stand_in,
        "--model",
        "dummy:accuracy=1",
        "--out",
        tmp_path / "runs",
    ]
    done = cli("run", *args, "--mode", "accuracy", "--strict")
    assert done.code == 0, done.err
    assert "2 answers scored again, 0 changed" in cli("rescore", tmp_path / "runs").out


def test_a_task_can_be_verified(cli: Cli, stand_in: Path) -> None:
    (stand_in / "a.mp4").write_bytes(b"torn")
    done = cli("data", "verify", "--suite", "lmms:things", "--data-root", stand_in)
    assert done.code == 1
    assert "FAULT decodable   1 of 2        a.mp4 cannot be decoded" in done.out


def test_their_scorer_beside_ours_shows_every_difference(
    cli: Cli, stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(VideoMME, "n_rows", 4)
    row = {"duration": "short", "domain": "d", "sub_category": "s", "videoID": "a", "task_type": "t", "question": "?"}
    rows = [row | {"question_id": str(number), "options": ["x", "y"], "answer": "A"} for number in range(4)]
    folder = tmp_path / "official" / "videomme"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "a.mp4").write_bytes(b"")
    (folder / "Video-MME.json").write_text(json.dumps(rows))
    texts = tmp_path / "texts.json"
    texts.write_text(json.dumps({"0": "A", "1": "B", "2": "(a)", "3": "C"}))
    args = ["score", "--suite", "videomme", "--data-root", folder.parent, "--text", texts, "--scorer", "lmms-eval"]
    done = cli(*args)
    assert done.code == 0, done.err
    assert done.out.splitlines() == [
        "ours       50.0% of 4",
        "lmms-eval  33.3% of 3 (1 drawn at random left out)",
        "1 differ",
        "  2: '(a)': ours 1 ('A'), lmms-eval a random letter",
    ]
    found = json.loads(cli(*args, "--format", "json").out)["rows"]
    assert [(each["id"], each["ours"], each["theirs"]) for each in found] == [("2", 1.0, None)]
    wrong = cli("score", "--suite", "synthimage", "--text", texts, "--scorer", "lmms-eval")
    assert (wrong.code, "knows the published suites" in wrong.err) == (2, True)


def test_listing_and_help_import_nothing_of_it(stand_in: Path) -> None:
    code = "import sys; from vlmbench.cli import main; main(['list', 'suites']); sys.exit('lmms_eval' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
