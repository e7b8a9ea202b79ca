"""The rivals of MemVP: as many trained parameters, the same questions, and a model that is left as it was found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from vlmbench.memvp_data import teach
from vlmbench.memvp_lora import BothLearner, Lora, LoraLearner
from vlmbench.memvp_rival import NAMES, made_up, main
from vlmbench.memvp_train import MemoryLearner, Recipe, Trainer
from vlmbench.methods.memvp import Memvp
from vlmbench.models.loading import load
from vlmbench.patch import fingerprint
from vlmbench.progress import Progress

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


def test_the_comparison_runs_and_says_what_it_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "memvp.json"
    args = ["--model", "mini-llava-ov@random", "--out", str(out), "--limit", "6", "--test-limit", "2", "--steps", "2"]
    main([*args, "--batch", "2", "--slots", "20", "--timing"])
    found = json.loads(out.read_text())
    assert [row["name"] for row in found["rows"]] == list(NAMES)
    assert {row["n"] for row in found["rows"]} == {2}
    memvp, lora, both = (row["trained_parameters"] for row in found["rows"])
    assert both == memvp + lora
    assert abs(lora - memvp) <= lora / found["rows"][1]["lora_rank"] / 2
    assert found["timing"]["visual_tokens"] == 256
    assert "in the prompt and LoRA" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*args, "--names", "memvp/qlora"])
    # What was trained before is not trained again, and its seconds are still those of training.
    state = tmp_path / "memvp.json.memvp.training"
    torch.save({**torch.load(state, weights_only=True), "seconds": 5000.0}, state)
    main([*args, "--batch", "2", "--slots", "20", "--names", "memvp"])
    (again,) = json.loads(out.read_text())["rows"]
    assert again["train_s"] == pytest.approx(5000, abs=1)
    assert (again["curve"], again["accuracy"]) == (found["rows"][0]["curve"], found["rows"][0]["accuracy"])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main([*args, "--batch", "2", "--slots", "20", "--scale", "0.5", "--names", "memvp"])
    assert "holds a training of another model, data or recipe" in capsys.readouterr().err
