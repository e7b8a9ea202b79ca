"""``vlmbench fit --method memvp``: it learns, goes on where it was stopped, ends the same, and its file is found and used."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from vlmbench import artefact, memvp_file
from vlmbench.fitting import Fitting
from vlmbench.memvp_data import collect
from vlmbench.memvp_train import Recipe
from vlmbench.methods.memvp import Memvp
from vlmbench.progress import Progress
from vlmbench.request import RunRequest
from vlmbench.session import Session
from vlmbench.store import ResultStore

Cli = Callable[..., Any]
MODEL, SUITE = "mini-llava-ov@random", "synthimage"
FIT = ("fit", "--model", MODEL, "--method", "memvp:slots=140,scale=1", "--suite", SUITE, "--limit", 24, "--batch", 8)
STEPS = 12


def fit(cli: Cli, out: Path, *more: Any) -> Any:
    return cli(*FIT, "--out", out, "--steps", STEPS, "--lr", 0.003, *more)


@pytest.fixture
def fitted(cli: Cli, tmp_path: Path) -> Path:
    out = tmp_path / "memvp.safetensors"
    done = fit(cli, out)
    assert done.code == 0, done.err
    return out


def test_training_answers_better_and_says_what_it_did(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    done = fit(cli, out)
    header = memvp_file._header(out)
    losses = [row["loss"] for row in header["curve"]]
    assert [row["step"] for row in header["curve"]] == list(range(1, STEPS + 1))
    assert losses[-1] < losses[0] - 0.3
    assert (header["model"], header["suite"], header["n"] + header["n_held_out"]) == (MODEL, SUITE, 24)
    assert header["n_held_out"] == 0  # eight pictures: too few to hold one back
    assert header["parameters"] == sum(tensor.numel() for tensor in load_file(out).values())
    assert {"steps": STEPS, "batch": 8, "lr": 0.003, "seed": 0}.items() <= header["recipe"].items()
    assert f"use it with `--method memvp:artefact={out}`" in done.out
    assert f"step {STEPS // 2} of {STEPS}, loss " in done.err
    assert " s left" in done.err
    assert [path.name for path in tmp_path.iterdir()] == [out.name]  # nothing of the training is left


def test_the_seed_decides_the_file(cli: Cli, tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for path, seed in zip(paths, (3, 3, 4), strict=True):
        assert fit(cli, path, "--model", "tiny-llava-ov", "--steps", 2, "--seed", seed).code == 0
    first, second, other = (memvp_file.read(str(path)) for path in paths)
    assert first.digest == second.digest
    assert all(torch.equal(first.tensors[name], second.tensors[name]) for name in first.tensors)
    assert other.digest != first.digest


DIES = f"""
import os, signal, sys
from vlmbench.cli import main

def replace(part, path, replace=os.replace, states=[]):
    states += [path] if str(path).endswith(".training") else []
    if len(states) > {STEPS // 2}:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(part, path)

os.replace = replace
main(sys.argv[1:])
"""
"""Killed (-9) where a kill hurts most: with the seventh state written and not yet in its place."""


def test_a_training_that_was_killed_ends_with_the_same_weights(cli: Cli, tmp_path: Path, fitted: Path) -> None:
    out = tmp_path / "stopped.safetensors"
    command = [sys.executable, "-c", DIES, *map(str, (*FIT, "--out", out, "--steps", STEPS, "--lr", 0.003))]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    died = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert died.returncode == -signal.SIGKILL, died.stderr
    state = out.with_name(f"{out.name}.training")
    assert state.exists()
    assert not out.exists()
    for other in (("--lr", 0.002), ("--sampler", "interior")):
        refused = fit(cli, out, *other)
        assert refused.code == 2
        assert f"{state} holds a training of another model, data or recipe; delete it" in refused.err
    stored = torch.load(state, weights_only=True)
    torch.save({**stored, "seconds": stored["seconds"] + 5000}, state)
    done = fit(cli, out)
    assert f"goes on from step {STEPS // 2} of {STEPS}" in done.err
    whole, resumed = (memvp_file.read(str(path)) for path in (fitted, out))
    assert resumed.curve == whole.curve
    assert all(torch.equal(whole.tensors[name], resumed.tensors[name]) for name in whole.tensors)
    assert resumed.digest == whole.digest
    assert resumed.seconds > 5000  # what the killed command spent counts too
    state.write_bytes(b"no state")
    spoilt = fit(cli, out)
    assert (spoilt.code, f"{state} cannot be read" in spoilt.err) == (2, True)
    torch.save([1], state)
    foreign = fit(cli, out)
    assert (foreign.code, f"{state} holds a training of another" in foreign.err) == (2, True)


def test_a_loss_that_is_no_number_stops_with_the_last_good_weights(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    done = fit(cli, out, "--lr", 1e30, "--steps", 60)
    assert done.code == 1
    assert "at step " in done.err or "after step " in done.err
    assert "give a lower --lr" in done.err
    assert not out.exists()
    good = list(tmp_path.iterdir())
    assert all(tensor.isfinite().all() for path in good for tensor in load_file(path).values())
    assert all(str(path) in done.err and path.name.startswith("a.step") for path in good)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--suite", "vqav2"), "it has no train split here"),
        (("--suite", "synthvideo"), "name it as in synthvideo:length=32"),
        (("--model", "dummy"), "fit needs a model"),
        (("--batch", "0"), "--batch must be at least 1, not 0"),
        (("--lr", "0"), "--lr must be above 0, not 0"),
        (("--steps", "0"), "--steps must be at least 1, not 0"),
        (("--method", "memvp:artefact=untrained"), "training begins anew; leave artefact out"),
        (("--method", "memvp:slots=0"), "memvp:slots must be at least 1, not 0"),
        (("--method", "pevlm"), "--batch and --lr are of training, and pevlm is only searched"),
    ],
)
def test_what_cannot_be_trained_is_exit_2_in_a_sentence(cli: Cli, tmp_path: Path, args: Any, said: str) -> None:
    done = cli(*FIT, "--out", tmp_path / "a.safetensors", *args)
    assert done.code == 2
    assert said in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def run(cli: Cli, out: Path, method: str, *more: Any) -> Any:
    args = ("--model", MODEL, "--suite", SUITE, "--limit", 2, "--mode", "accuracy")
    return cli("run", *args, "--method", method, "--no-baseline", "--out", out, *more)


def test_without_a_file_a_run_is_exit_2_with_the_line_that_makes_one(cli: Cli, tmp_path: Path) -> None:
    done = run(cli, tmp_path / "runs", "memvp")
    assert done.code == 2
    assert f"memvp is trained, and there is no file for {MODEL} on {SUITE}" in done.err
    assert f"`vlmbench fit --model {MODEL} --method memvp --suite {SUITE} --out " in done.err


def test_a_file_is_found_by_the_hash_of_the_model_and_counts_by_its_content(
    cli: Cli, tmp_path: Path, fitted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artefact, "SHIPPED", tmp_path / "shipped")
    (tmp_path / "shipped").mkdir()
    (tmp_path / "shipped" / "memvp-broken.safetensors").write_bytes(b"")
    (tmp_path / "shipped" / "memvp-any-name.safetensors").write_bytes(fitted.read_bytes())
    for name, method in (("a", f"memvp:artefact={fitted}"), ("b", "memvp")):
        done = run(cli, tmp_path / name, method)
        assert done.code == 0, done.err
    views = [ResultStore(tmp_path / name).runs()[0] for name in ("a", "b")]
    assert views[0].folder.name == views[1].folder.name
    params = views[0].header["spec"]["method_params"]
    assert params == {"artefact": memvp_file.read(str(fitted)).digest, "scale": 1.0, "slots": 140, "vision": 0}
    assert views[0].header["traits"]["trained"]
    for record in views[0].records.values():
        assert record.tokens["visual"] == 0
        assert (record.trace or {})["memory"]["slots"] == 140
    other = run(cli, tmp_path / "c", "memvp", "--suite", "synthvideo:length=32")
    assert (other.code, "no file for" in other.err) == (2, True)
    table = json.loads(cli("table", tmp_path / "a", "--format", "json").out)
    assert "trained" in table["rows"][0]["marks"]


def test_a_file_of_other_weights_is_refused_with_the_line_that_makes_one(cli: Cli, fitted: Path) -> None:
    done = cli("run", "--model", "dummy", "--suite", SUITE, "--method", f"memvp:artefact={fitted}")
    assert done.code == 2
    assert f"{fitted} was fitted for {MODEL} with weights" in done.err
    assert f"`vlmbench fit --model dummy --method memvp --suite {SUITE} --out {fitted}`" in done.err


def test_frames_get_codes_and_a_tower_can_learn_too(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    args = ("--suite", "synthvideo:length=32", "--frames", 4, "--limit", 4, "--steps", 2, "--batch", 2)
    done = cli(*FIT, "--out", out, *args, "--method", "memvp:slots=20,vision=4")
    assert done.code == 0, done.err
    shape = memvp_file._header(out)["shape"]
    assert (shape["units"], shape["vision_width"], shape["vision_blocks"]) == (4, 4, 2)
    start = memvp_file.read(str(out))
    assert any(tensor.abs().max() > 0 for name, tensor in start.tensors.items() if name.endswith("up.weight"))


def test_the_rate_rises_and_falls_to_zero() -> None:
    recipe = Recipe(steps=100, batch=1, lr=1.0, seed=0)
    rates = [recipe.lr_at(step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[10] == 1.0
    assert rates == sorted(rates[:11]) + sorted(rates[11:], reverse=True)
    assert rates[100] == pytest.approx(0.0)


@pytest.mark.parametrize("model", [MODEL, "mini-qwen2.5-vl@random"])
def test_a_further_question_on_a_picture_is_read_as_if_it_were_the_first(model: str, tmp_path: Path) -> None:
    """The picture is kept and only the text behind it is another: tokens, positions and embeddings are the whole's own."""
    request = RunRequest(model=model, suite=SUITE, limit=4, mode="accuracy", methods=())
    with Progress(terminal=False) as progress, Session(request, progress, split="train", stored=False) as session:
        fitting = Fitting(session, Memvp(), 0.0, 1, out=tmp_path / "a")
        for cached in (True, False):
            material = collect(fitting, cached=cached)
            assert len(material.pictures) < len(material.questions) == 4
            for sample, question in zip(fitting.samples, material.questions, strict=True):
                clips = session.clips(sample, session.blank(sample, "accuracy"))
                assert clips is not None
                inputs = fitting.adapter.inputs(clips, session.asked(sample, clips).question)
                with torch.no_grad():
                    whole = fitting.adapter.splice(inputs, fitting.adapter.encode_vision(inputs))
                    found = material.whole(fitting.adapter, question)
                assert torch.equal(question.ids, inputs["input_ids"][0])
                assert torch.equal(found.positions, whole.positions)
                assert torch.equal(found.embeds, whole.embeds)
