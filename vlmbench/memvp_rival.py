"""MemVP against its rivals: the same frozen language model, data, steps and number of trained parameters.

python -m vlmbench.memvp_rival --model tiny-llava-ov --suite synthimage --steps 1500 --lr 0.005 --out results/cpu/memvp.json

`lora` reads the visual tokens in the prompt, as the aligned model was trained to, and trains low-rank updates (peft) of all
linear layers of the language model; `memvp+lora` trains both, without visual tokens. A training step is timed in turns on
made-up questions with 256 visual tokens: what it costs to have them in the prompt.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from vlmbench import header, stats
from vlmbench.errors import RunError, UsageError
from vlmbench.files import write_json
from vlmbench.fitting import Fitting
from vlmbench.layout import Prompt, Span, TokenLayout
from vlmbench.memvp_data import Material, Question, collect
from vlmbench.memvp_fit import identity_of, recipe_for, trained
from vlmbench.memvp_lora import BothLearner, Lora, LoraLearner
from vlmbench.memvp_prompt import units_of
from vlmbench.memvp_train import Learner, MemoryLearner, Recipe, Trainer
from vlmbench.methods.full import Full
from vlmbench.methods.memvp import Memvp
from vlmbench.progress import Progress
from vlmbench.request import RunRequest
from vlmbench.session import Session

if TYPE_CHECKING:
    from vlmbench.method import Method
    from vlmbench.models.base import ModelAdapter

NAMES = ("memvp", "lora", "memvp+lora")
VISUAL, TEXT, ANSWER, BATCH, ROUNDS = 256, 64, 2, 8, 7
"""Tokens of a made-up question, questions a step, and rounds of the timing."""


class Rivals(NamedTuple):
    """What all of them are trained on and asked."""

    fitting: Fitting
    test: Session
    material: Material
    method: Memvp
    recipe: Recipe
    out: Path

    def row(self, name: str, lora_lr: float) -> dict[str, Any]:
        """Train one of `NAMES` and ask it the test questions."""
        adapter, seed = self.fitting.adapter, self.recipe.seed
        units = max((units_of(question.prompt) for question in self.material.questions), key=len)
        memory = self.method.new_memory(adapter, units, seed)
        recipe = self.recipe if name == "memvp" else replace(self.recipe, lr=lora_lr)
        with ExitStack() as stack:
            lora = None
            if name != "memvp":
                lora = Lora(adapter, memory.count, seed)
                stack.callback(lora.close)
            learner: Learner
            if lora is None:
                learner = MemoryLearner(adapter, self.material, memory)
            elif name == "lora":
                learner = LoraLearner(adapter, self.material, lora)
            else:
                learner = BothLearner(adapter, self.material, memory, lora)
            state = self.out.with_name(f"{self.out.name}.{name.replace('+', '-')}.training")
            key = f"{name} {identity_of(self.fitting, self.material, memory)}"
            trainer = Trainer(learner, recipe, state, key, self.fitting.session.progress)
            trainer.run(name)
            method: Method = Full()
            if name != "lora":
                method = self._with_memory(trainer, memory)
            scores, clusters = self._ask(method, name)
        accuracy = stats.accuracy_interval(scores, clusters)
        return {
            "name": name,
            "trained_parameters": sum(p.numel() for p in learner.parameters.values()),
            "lora_rank": None if lora is None else lora.rank,
            "steps": recipe.steps,
            "batch": recipe.batch,
            "lr": recipe.lr,
            "curve": trainer.curve,
            "train_s": round(trainer.seconds, 1),
            "n": len(scores),
            "accuracy": None if accuracy is None else accuracy.value,
            "accuracy_low": None if accuracy is None else accuracy.low,
            "accuracy_high": None if accuracy is None else accuracy.high,
        }

    def _with_memory(self, trainer: Trainer, memory: Any) -> Memvp:
        """The method as a run would use it, from a file."""
        file = trained(trainer, self.fitting, self.material, memory, seconds=0.0)
        path = self.out.with_name(f"{self.out.name}.memory.safetensors")
        file_tensors = {name: tensor for name, tensor in file.tensors.items() if not name.startswith("lora.")}
        replace(file, tensors=file_tensors).write(path)
        try:
            return Memvp(artefact=str(path))
        finally:
            path.unlink()

    def _ask(self, method: Method, name: str) -> tuple[list[float], list[str]]:
        test = self.test
        scores, clusters = [], []
        with test.backend.attach(method):
            for sample in test.each(test.samples, f"test · {name}"):
                clips = test.clips(sample, test.blank(sample, "accuracy"))
                outcome = None if clips is None else test.ask(method, sample, clips, "accuracy")
                scores.append(test.suite.score(sample, outcome.raw_text).value if outcome else 0.0)
                clusters.append(sample.cluster)
        return scores, clusters


def made_up(adapter: ModelAdapter, visual: int, text: int, answer: int, batch: int) -> Material:
    """One batch of questions of these lengths: noise, for times alone."""
    generator = torch.Generator().manual_seed(0)
    before = text // 2
    layout = TokenLayout(
        (
            Span("text", 0, before),
            Span("image", before, before + visual, 0, 0),
            Span("text", before + visual, text + visual),
        )
    )
    places = torch.arange(layout.length).expand(*adapter.decode_positions(0).shape[:-1], -1).to(adapter.device)
    prompt = Prompt(torch.empty(1, layout.length, 0, device=adapter.device), places, layout, layout.length)
    ids = torch.randint(adapter.shapes.vocab, (batch, layout.length + answer), generator=generator).to(adapter.device)
    pictures = torch.randn(batch, visual, adapter.shapes.hidden, generator=generator).to(adapter.device, adapter.dtype)
    questions = [
        Question(prompt, row[: layout.length], row[layout.length :], index, str(index)) for index, row in enumerate(ids)
    ]
    return Material(questions, (), list(pictures), "made up")


def step_times(model: str, request: RunRequest, method: Memvp, out: Path, progress: Progress) -> dict[str, Any]:
    """Seconds of a training step, in turns: MemVP without, LoRA with the visual tokens in the prompt."""
    from vlmbench.engine import TorchBackend
    from vlmbench.machine import load_backend

    trainers = {}
    for name in ("memvp", "lora"):
        backend = load_backend(request, model)
        if not isinstance(backend, TorchBackend):
            raise UsageError(f"{model} is a stand-in without weights; name a model.")
        adapter = backend.adapter
        material = made_up(adapter, VISUAL, TEXT, ANSWER, BATCH)
        memory = method.new_memory(adapter)
        learner = (
            MemoryLearner(adapter, material, memory)
            if name == "memvp"
            else LoraLearner(adapter, material, Lora(adapter, memory.count, 0))
        )
        recipe = Recipe(ROUNDS + 2, BATCH, 1e-4, 0)
        trainers[name] = Trainer(learner, recipe, out.with_name(f"{out.name}.times"), name, progress)
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for _ in range(ROUNDS + 2):
        for name, trainer in trainers.items():
            seconds[name].append(trainer.timed_step())
    kept = {name: each[2:] for name, each in seconds.items()}
    ratios = [theirs / own for own, theirs in zip(kept["memvp"], kept["lora"], strict=True)]
    return {
        "visual_tokens": VISUAL,
        "text_tokens": TEXT,
        "batch": BATCH,
        "memvp_step_s": median(kept["memvp"]),
        "lora_step_s": median(kept["lora"]),
        "ratio": median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "threads": torch.get_num_threads(),
    }


def to_markdown(found: dict[str, Any]) -> str:
    lines = ["| trained | parameters | lr | test accuracy |", "| --- | ---: | ---: | ---: |"]
    for row in found["rows"]:
        interval = "" if row["accuracy_low"] is None else f" [{row['accuracy_low']:.2f}, {row['accuracy_high']:.2f}]"
        said = "—" if row["accuracy"] is None else f"{row['accuracy']:.2f}{interval}"
        lines.append(f"| {row['name']} | {row['trained_parameters']:,} | {row['lr']:g} | {said} |")
    if times := found["timing"]:
        lines += [
            "",
            f"A training step with {times['visual_tokens']} visual and {times['text_tokens']} text tokens, batch "
            f"{times['batch']}: {times['memvp_step_s']:.3f} s with MemVP, {times['lora_step_s']:.3f} s with the tokens in the "
            f"prompt and LoRA, {times['ratio']:.2f}× [{times['ratio_low']:.2f}, {times['ratio_high']:.2f}] over "
            f"{ROUNDS} rounds in turns.",
        ]
    return "\n".join(lines)


def compare(
    request: RunRequest, out: Path, names: Sequence[str], method: Memvp, options: argparse.Namespace, progress: Progress
) -> dict[str, Any]:
    """Train and ask each of `names`; rows in their order."""
    rows: list[dict[str, Any]] = []
    if names:
        with ExitStack() as stack:
            train = stack.enter_context(Session(request, progress, split="train", stored=False))
            tests = replace(request, limit=options.test_limit)
            test = stack.enter_context(Session(tests, progress, backend=train.backend, stored=False))
            fitting = Fitting(train, method, 0.0, options.steps, out=out, batch=options.batch, lr=options.lr)
            material = collect(fitting, cached=True)
            rivals = Rivals(fitting, test, material, method, recipe_for(fitting, len(material.questions)), out)
            rows = [rivals.row(name, options.lora_lr) for name in names]
    timing = step_times(options.model, request, method, out, progress) if options.timing else None
    return {
        "schema": 1,
        "model": options.model,
        "suite": options.suite,
        "rows": rows,
        "timing": timing,
        "versions": header.versions(),
        **header.source(),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train MemVP and its rivals on the same questions and compare them.")
    parser.add_argument("--model", required=True)
    parser.add_argument("--suite", default="synthimage")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--names", default="/".join(NAMES), help="of memvp/lora/memvp+lora; empty for times alone")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--lr", type=float, help="of MemVP alone")
    parser.add_argument("--lora-lr", type=float, default=1e-3, help="where LoRA is trained")
    parser.add_argument("--slots", type=int)
    parser.add_argument("--scale", type=float)
    parser.add_argument("--limit", type=int, help="train questions")
    parser.add_argument("--test-limit", type=int, help="test questions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--timing", action="store_true", help="also time a training step at 256 visual tokens")
    args = parser.parse_args(argv)
    names = [name for name in args.names.split("/") if name]
    if unknown := [name for name in names if name not in NAMES]:
        parser.error(f"--names knows {', '.join(NAMES)}, not {unknown[0]!r}.")
    if args.lora_lr <= 0 or not math.isfinite(args.lora_lr):
        parser.error(f"--lora-lr must be above 0, not {args.lora_lr:g}.")
    request = RunRequest(
        model=args.model, suite=args.suite, limit=args.limit, mode="accuracy", threads=args.threads, seed=args.seed
    )
    method = Memvp(slots=args.slots, scale=args.scale)
    try:
        with Progress() as progress:
            found = compare(request, args.out, names, method, args, progress)
    except UsageError as error:
        parser.error(str(error))
    except RunError as error:
        parser.exit(1, f"{error}\n")
    write_json(args.out, found)
    print(to_markdown(found))


if __name__ == "__main__":
    main()
