"""Offline means offline: with sockets that raise, suites and models on disk run, and what is missing is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from vlmbench.suites._synth.encode import write_mp4

# No variable tells any library to stay offline: the option alone must.
SCRIPT = """
import json, socket, sys

def refuse(*args, **kwargs):
    raise AssertionError(f"a socket was opened: {args}")

class Blocked(socket.socket):
    def __init__(self, family=-1, *args, **kwargs):
        if family != socket.AF_UNIX:
            refuse(family)
        super().__init__(family, *args, **kwargs)

socket.socket, socket.create_connection, socket.getaddrinfo = Blocked, refuse, refuse

import dataclasses
from vlmbench.cli import main
from vlmbench.suites.videomme import VideoMME

VideoMME.n_rows = 1
for args in json.loads(sys.argv[1]):
    print(main(args), flush=True)
"""


def test_no_socket_is_opened_and_what_is_missing_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "videomme"
    write_mp4(np.zeros((4, 64, 64, 3), np.uint8), folder / "data" / "a.mp4")
    row = {
        "duration": "short",
        "domain": "d",
        "sub_category": "s",
        "videoID": "a",
        "question_id": "1",
        "task_type": "t",
    }
    (folder / "Video-MME.json").write_text(json.dumps([row | {"question": "?", "options": ["a", "b"], "answer": "A"}]))
    run = ["run", "--suite", "videomme", "--offline", "--out", str(tmp_path / "runs"), "--mode", "accuracy"]
    found = [*run, "--data-root", str(tmp_path), "--max-new-tokens", "1", "--no-baseline", "--method", "blind"]
    calls = [
        [*found, "--model", "mini-qwen2-vl@random", "--strict"],
        [*found, "--model", "somebody/some-model"],
        ["run", "--suite", "vqav2:revision=abc", "--offline", "--model", "dummy"],
        [
            "run",
            "--suite",
            "videomme",
            "--offline",
            "--model",
            "dummy",
            "--data-root",
            str(tmp_path / "videomme" / "data"),
        ],
        ["data", "verify", "--suite", "videomme", "--data-root", str(tmp_path)],
    ]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    env = kept | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "HF_HOME": str(tmp_path / "hub")}
    done = subprocess.run([sys.executable, "-c", SCRIPT, json.dumps(calls)], capture_output=True, text=True, env=env)
    assert "socket was opened" not in done.stderr
    codes = [line for line in done.stdout.splitlines() if line in ("0", "1", "2")]
    assert codes == ["0", "2", "2", "2", "1"], done.stderr  # the last: there are no subtitles
    errors = [line for line in done.stderr.splitlines() if line.startswith("Error")]
    assert len(errors) == 3
    assert "somebody/some-model" in errors[0]
    assert "vqav2 needs --data-root" in errors[1]
    assert "0.4 MB of questions" in errors[2]
    assert "`hf download lmms-eval/Video-MME --repo-type dataset" in errors[2]
    assert not list((tmp_path / "hub").rglob("*.json"))
