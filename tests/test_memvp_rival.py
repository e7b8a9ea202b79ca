"""The rivals of MemVP: as many trained parameters, the same questions, and a model that is left as it was found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from vlmbench.errors import UsageError
from vlmbench.memvp_contest import INTERVALS, NAMES, TABLE
from vlmbench.memvp_data import teach
from vlmbench.memvp_learner import MemoryLearner
from vlmbench.memvp_lora import BothLearner, Lora, LoraLearner
from vlmbench.memvp_results import stored
from vlmbench.memvp_rival import main
from vlmbench.memvp_text import to_markdown
from vlmbench.memvp_times import expected, made_up
from vlmbench.memvp_train import Recipe, Trainer
from vlmbench.methods.memvp import Memvp
from vlmbench.models.loading import load
from vlmbench.patch import fingerprint
from vlmbench.progress import Progress
from vlmbench.publish import machine_texts

app = typer.Typer()
app.command()(main)
VISUAL, TEXT, ANSWER, BATCH = 12, 6, 2, 4


@pytest.fixture(params=["mini-llava-ov@random", "mini-qwen2.5-vl@random"])
def own(request: pytest.FixtureRequest) -> Any:
    """A model of its own: low-rank updates are put into it in place."""
    return load(request.param, dtype=torch.float32, device="cpu", attention="sdpa").adapter


def test_low_rank_updates_match_the_budget_and_leave_without_a_trace(own: Any) -> None:
    before = fingerprint(own.model)
    weights = dict(own.text.named_parameters())
    budget = 30_000
    lora = Lora(own, budget, seed=0)
    count = sum(parameter.numel() for parameter in lora.parameters.values())
    assert abs(count - budget) <= count / lora.rank / 2  # half a rank
    lora.close()
    assert fingerprint(own.model) == before
    assert {name: id(p) for name, p in own.text.named_parameters()} == {name: id(p) for name, p in weights.items()}


def test_each_trains_its_own_and_reads_its_own_prompt(own: Any, tmp_path: Path) -> None:
    """MemVP's prompt is shorter by exactly the visual tokens, and nothing of the model itself moves."""
    material = made_up(own, VISUAL, TEXT, ANSWER, BATCH)
    memory = Memvp(slots=20).new_memory(own)
    lora = Lora(own, memory.count, seed=0)
    learners = {
        "memvp": MemoryLearner(own, material, memory),
        "lora": LoraLearner(own, material, lora),
        "both": BothLearner(own, material, memory, lora),
    }
    marks = 2 if own.decode_positions(0).dim() == 3 else 0
    lengths = {name: {p.length for p in each.prompts(material.questions)} for name, each in learners.items()}
    assert lengths == {"memvp": {TEXT - marks}, "lora": {TEXT + VISUAL}, "both": {TEXT - marks}}
    assert (
        learners["both"].parameters.keys() == learners["memvp"].parameters.keys() | learners["lora"].parameters.keys()
    )
    kept = {name: p.clone() for name, p in own.model.named_parameters() if ".lora_" not in name}
    with Progress(terminal=False) as progress:
        for name, learner in learners.items():
            before = {key: p.detach().clone() for key, p in learner.parameters.items()}
            trainer = Trainer(learner, Recipe(3, BATCH, 0.01, 0), tmp_path / name, name, progress)
            trainer.run(name)
            moved = [key for key, p in learner.parameters.items() if not torch.equal(p, before[key])]
            assert {"memvp": "p_k", "lora": "lora.", "both": "p_v"}[name] in " ".join(moved)
    assert all(torch.equal(p, kept[name]) for name, p in own.model.named_parameters() if name in kept)


def test_memory_and_low_rank_updates_learn_at_their_own_rates(own: Any, tmp_path: Path) -> None:
    material = made_up(own, VISUAL, TEXT, ANSWER, BATCH)
    memory = Memvp(slots=20).new_memory(own)
    learner = BothLearner(own, material, memory, Lora(own, memory.count, seed=0), lora_rate=0.25)
    recipe = Recipe(3, BATCH, 0.01, 0, weight_decay=0.5)
    with Progress(terminal=False) as progress:
        trainer = Trainer(learner, recipe, tmp_path / "state", "both", progress)
        trainer.timed_step()
    groups = {id(p): group for group in trainer.optimizer.param_groups for p in group["params"]}
    assert len(groups) == len(learner.parameters)
    for name, parameter in learner.parameters.items():
        group = groups[id(parameter)]
        assert group["lr"] == recipe.lr_at(0) * (0.25 if name.startswith("lora.") else 1)
        assert group["weight_decay"] == (0.5 if parameter.dim() > 1 else 0)


def test_visual_tokens_in_the_prompt_are_where_the_model_would_have_them(own: Any, clip: Any) -> None:
    from vlmbench.memvp_data import Material, Question

    with torch.no_grad():
        inputs = own.to_device(own.inputs([clip(2)], "where ?"))
        prompt = own.splice(inputs, own.encode_vision(inputs))
        places = prompt.layout.indices("video", "image", "separator")
        question = Question(prompt, inputs["input_ids"][0], torch.tensor([5, 6]), 0, "a")
        material = Material([question], (), [prompt.embeds[0, places]], "")
        whole = LoraLearner(own, material, Lora(own, 1, 0)).prompts([question])[0]
        assert torch.equal(whole.embeds, prompt.embeds)
        cache = own.new_cache(0)
        first = teach(own, [whole], [question.answer]).logits[0]
        # Float32 rounding of four layers; the updates are zero at first.
        torch.testing.assert_close(first, own.prefill(prompt, cache)[0], rtol=0, atol=1e-5)


SMALL = ["--model", "mini-llava-ov@random", "--train-limit", "6", "--limit", "2", "--steps", "2", "--batch", "2"]


def compare(tmp_path: Path, *more: str) -> dict[str, Any]:
    """The stored results after one command."""
    args = [*SMALL, "--slots", "20", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path), *more]
    assert CliRunner().invoke(app, args, catch_exceptions=False).exit_code == 0
    found: dict[str, Any] = json.loads((tmp_path / "memvp.json").read_text())
    return found


def of(found: dict[str, Any], part: str) -> list[dict[str, Any]]:
    return [row for row in found["rows"] if row["part"] == part]


def test_rivals_have_as_many_parameters_and_are_not_trained_twice(tmp_path: Path) -> None:
    before = compare(tmp_path, "--part", "rivals")
    rows = of(before, "rivals")
    assert [row["name"] for row in rows] == list(NAMES)
    memvp, lora, both = (row["trained_parameters"] for row in rows)
    assert both == memvp + lora
    assert abs(lora - memvp) <= lora / rows[1]["lora_rank"] / 2
    assert all(
        (row["n"], row["steps"], row["batch"], row["bytes"]) == (2, 2, 2, 4 * row["trained_parameters"]) for row in rows
    )
    # What was trained before is not trained again, and its seconds are still those of training.
    (state,) = (tmp_path / "runs").glob("*-memvp.training")
    torch.save({**torch.load(state, weights_only=True), "seconds": 5000.0}, state)
    again = of(compare(tmp_path, "--part", "rivals", "--name", "memvp"), "rivals")
    assert [row["name"] for row in again] == list(NAMES)  # the other rows stay
    assert again[0]["train_s"] == pytest.approx(5000, abs=1)
    assert (again[0]["curve"], again[0]["accuracy"]) == (rows[0]["curve"], rows[0]["accuracy"])
    with pytest.raises(UsageError, match="holds a training of another model, data or recipe"):
        compare(tmp_path, "--part", "rivals", "--name", "memvp", "--lr", "0.5")


def test_a_step_without_visual_tokens_holds_less(tmp_path: Path) -> None:
    (row,) = of(compare(tmp_path, "--part", "steps"), "steps")
    assert (row["visual_tokens"], row["rounds"]) == (256, 7)
    assert 0 < row["memvp_bytes"] < row["lora_bytes"]  # 64 positions a question instead of 320
    assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]


def test_prefill_has_the_operations_that_the_paper_counts(tmp_path: Path) -> None:
    """LLaMA-7B and 256 visual tokens: 4.99 at 64 text tokens and 1.99 at 256."""
    assert expected(64, 256, 320, 4096, 11008) == pytest.approx(4.99, abs=0.005)
    assert expected(256, 256, 320, 4096, 11008) == pytest.approx(1.995, abs=0.005)
    out = tmp_path / "machine"
    out.mkdir()
    found = compare(out, "--part", "prefill", "--shape", "mini-llava-ov@random", "--rounds", "1")
    rows = of(found, "prefill")
    assert [row["text_tokens"] for row in rows] == [64, 256]
    assert {(row["batch"], row["slots"], row["visual_tokens"]) for row in rows} == {(8, 320, 256)}
    assert {row["suite"] for row in rows} == {""}
    text = (out / "memvp.md").read_text()
    assert text == to_markdown(found)
    assert machine_texts(tmp_path)[out / "memvp.md"] == text


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--part", "run", "--part", "step"), "--part must be of run, rivals, steps, prefill, not 'step'."),
        (("--name", "qlora"), "--name must be of memvp, lora, memvp\\+lora, not 'qlora'."),
        (("--lora-lr", "0"), "--lora-lr must be above 0, not 0."),
        (("--lr", "nan"), "--lr must be above 0, not nan."),
        (("--model", "dummy", "--part", "rivals"), "dummy is a stand-in without weights"),
    ],
)
def test_what_cannot_be_compared_is_a_sentence(tmp_path: Path, args: tuple[str, ...], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        compare(tmp_path, *args)
    assert not list(tmp_path.iterdir())


def test_results_that_are_no_results_are_refused(tmp_path: Path) -> None:
    for text in ("{", "[]", '{"schema": 2}'):
        (tmp_path / "memvp.json").write_text(text)
        with pytest.raises(UsageError, match="delete it, or name another --out"):
            stored(tmp_path)


@pytest.mark.parametrize(
    ("accuracy", "above", "low", "said"),
    [
        (0.85, 0.6, 0.5, ("**Held**: trained MemVP", "**Held**: it is at least 40 points")),
        (0.84, 0.45, 0.39, ("**Did not hold**: trained MemVP", "**Open**: it is at least 40 points")),
        (0.84, 0.3, 0.2, ("**Did not hold**: trained MemVP", "**Did not hold**: it is at least 40 points")),
    ],
)
def test_a_verdict_is_that_of_its_numbers(accuracy: float, above: float, low: float, said: tuple[str, str]) -> None:
    row = dict.fromkeys([f"{name}{end}" for name in INTERVALS for end in ("", "_low", "_high")]) | dict.fromkeys(TABLE)
    values = {"accuracy": accuracy, "above_blind": above, "above_blind_low": low, "above_blind_high": above + 0.05}
    own = {"part": "run", "model": "m", "suite": "synthimage", "method": "memvp", "n": 9, **values}
    text = to_markdown({"rows": [{**row, **own, "accuracy_low": None, "accuracy_high": None}], "measured_on": []})
    assert all(each in text for each in said)
