"""How a reference model is trained: stages in order, resumable, one folder to ship at the end.

python -m vlmbench.reference.train --model tiny-llava-ov --out DIR [--stages vision,language] [--seed 0] [--device cuda]

DIR/state.pt holds everything to go on from and is replaced atomically every 300 steps; DIR/tiny-llava-ov is the checkpoint
folder, written at the end. The batch of a step depends on seed, stage and step alone, so a resumed run ends with the same
weights as an uninterrupted one, on a CPU bit for bit.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pickle
import platform
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from transformers import AutoModelForImageTextToText

from vlmbench.errors import UsageError
from vlmbench.header import source
from vlmbench.machine import pick_device
from vlmbench.models.qwen_vl import batch_chunks
from vlmbench.reference import hash_of, read_log, verify
from vlmbench.reference.build import QWEN, TOKENS_PER_UNIT, Model, make_model, make_tokenizer, match_words, save_folder
from vlmbench.reference.data import IMAGE, VALIDATION_SEED, Library, Pool, make_pool
from vlmbench.reference.evaluate import teacher_forced
from vlmbench.reference.features import group_of, pool_features
from vlmbench.reference.hints import REMARK_WORDS, SAID_WORDS, OrderHeads, RemarkHeads
from vlmbench.reference.lessons import Hints, Lesson, Source, language_step
from vlmbench.reference.recipes import RECIPES, Recipe, Stage
from vlmbench.reference.vision import Look, VisionHeads, look_at, settle, vision_parameters, vision_step
from vlmbench.reference.words import VOCABULARY
from vlmbench.suites._synth.scene import COLOURS, PLACES, SHAPES


class Trainer:
    """The model, where it stands, and the data; `run` takes it to the end of the named stages."""

    def __init__(
        self, recipe: Recipe, out: Path, pools: Path | None = None, workers: int = 2, device: str = "cpu"
    ) -> None:
        self.recipe, self.out, self.workers, self.device = recipe, out, workers, device
        self.pool_folder = pools or out / "pools"
        self.tokenizer = make_tokenizer(VOCABULARY)
        self.model = make_model(recipe.model, self.tokenizer, recipe.seed).to(device)
        if recipe.model == QWEN:
            batch_chunks(self.model.model.visual)
        self.group = group_of(self.model)
        # The vision side writes the words with which the language side that will read them was taught.
        taught_by = self.model
        self.begun_with: str | None = None
        if recipe.start:
            log = read_log(verify(recipe.start))
            self.begun_with = log["weights_sha256"]
            taught_by = make_model(recipe.start, self.tokenizer, log["seed"])
            _begin_with(self.model, recipe.start)
        torch.manual_seed(recipe.seed)
        words = torch.tensor(self.tokenizer.convert_tokens_to_ids([*COLOURS, *SHAPES, *PLACES]))
        self.heads = VisionHeads(taught_by.get_input_embeddings().weight[words]).to(device)
        self.order_heads = OrderHeads().to(device)
        *remark_ids, said_ids = (
            torch.tensor(self.tokenizer.convert_tokens_to_ids(list(words)), device=device)
            for words in (*REMARK_WORDS, SAID_WORDS)
        )
        self.hints = Hints(self.order_heads, RemarkHeads(), tuple(remark_ids), said_ids)
        self.stage, self.step, self.seconds = 0, 0, 0.0
        self.optimizer_states: list[dict[str, Any]] = []
        self.curves: list[dict[str, Any]] = []
        self._pools: dict[tuple[str, int], Pool] = {}
        self._features: dict[tuple[str, int], torch.Tensor] = {}
        self._source: Source | None = None
        if self.state_path.exists():
            self._load()
        elif (out / recipe.model).exists():
            raise UsageError(f"--out {out} holds a {recipe.model} but no state.pt to go on from; give an empty folder.")

    @property
    def state_path(self) -> Path:
        return self.out / "state.pt"

    def run(self, names: list[str], save_every: int = 300, log_every: int = 50) -> None:
        known = [stage.name for stage in self.recipe.stages]
        if unknown := [name for name in names if name not in known]:
            raise UsageError(f"--stages {','.join(unknown)}: no such stage; there are {', '.join(known)}.")
        if self.stage < len(known) and known[self.stage] not in names:
            raise UsageError(f"--stages {','.join(names)}: {known[self.stage]} comes first in {self.out}; name it too.")
        while self.stage < len(known) and known[self.stage] in names:
            self._run_stage(self.recipe.stages[self.stage], save_every, log_every)
            self.stage, self.step, self.optimizer_states = self.stage + 1, 0, []
            self._save([])
        if not self._exported():
            self.export()

    def _exported(self) -> bool:
        """Whether the checkpoint folder is of this stage's end; a run stopped before it was written is not done."""
        folder = self.out / self.recipe.model
        return folder.exists() and len(read_log(folder)["stages_done"]) == self.stage

    def _run_stage(self, stage: Stage, save_every: int, log_every: int) -> None:
        seeing = stage.name == "vision"
        self.model.train()
        if stage.match and self.step == 0:
            said = self.model.get_input_embeddings().weight[self.hints.said_words].detach()
            match_words(self.model.model.language_model, said, self.recipe.seed)
        optimizers = self._optimizers(seeing, stage.lr)
        parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
        for optimizer, state in zip(optimizers, self.optimizer_states, strict=False):
            optimizer.load_state_dict(state)
        seen_since: dict[str, list[float]] = {}
        began = time.perf_counter()
        for material in self._materials(stage) if self.step < stage.steps else ():
            loss, seen = self._loss(stage, material)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * stage.lr_at(self.step)
                optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            for optimizer in optimizers:
                optimizer.step()
            self.step += 1
            for name, value in {"loss": loss.item(), **seen}.items():
                seen_since.setdefault(name, []).append(value)
            if self.step % log_every == 0 or self.step == stage.steps:
                self.seconds += time.perf_counter() - began
                began = time.perf_counter()
                means = {name: round(fmean(values), 4) for name, values in seen_since.items()}
                self._note({"stage": stage.name, "step": self.step, **means, "seconds": round(self.seconds, 1)})
                seen_since = {}
            if self.step % save_every == 0 and self.step < stage.steps:
                if not seeing:
                    self._note({"stage": stage.name, "step": self.step, "validation": self.validate()})
                self._save(optimizers)
                began = time.perf_counter()
        if seeing:
            settle(self.model, self.pool(stage.phases[-1].kinds[0]), self.group)
        else:
            self._note({"stage": stage.name, "step": self.step, "validation": self.validate()})

    def _optimizers(self, seeing: bool, lr: float) -> list[torch.optim.Optimizer]:
        """AdamW; on the matrices of the language side Muon: in a trial its loss after 150 steps was AdamW's after 250."""
        vision = [*vision_parameters(self.model), *self.heads.parameters()]
        if seeing:
            groups, matrices = vision, []
        else:
            frozen = {id(parameter) for parameter in vision}
            language = {n: p for n, p in self.model.named_parameters() if id(p) not in frozen}
            matrices = [p for n, p in language.items() if p.dim() == 2 and "embed" not in n]
            chosen = {id(p) for p in matrices}
            groups = [p for p in language.values() if id(p) not in chosen]
            groups += self.order_heads.parameters()
        others_lr = lr if seeing else lr / 2
        options: dict[str, Any] = {"lr": others_lr, "betas": (0.9, 0.98), "weight_decay": 0.01}
        found: list[torch.optim.Optimizer] = [torch.optim.AdamW([{"params": groups, "peak": others_lr}], **options)]
        if matrices:
            muon = torch.optim.Muon(
                [{"params": matrices, "peak": lr}], lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
            )
            found.append(muon)
        return found

    def _materials(self, stage: Stage) -> Iterator[Look | Lesson]:
        """The batch of every step from here on, each made while the one before is learned from."""

        def make(step: int) -> Look | Lesson:
            rng = np.random.default_rng((self.recipe.seed, self.stage, step))
            phase = stage.phase_at(step)
            kind = phase.kinds[int(rng.integers(len(phase.kinds)))]
            if stage.name == "vision":
                return look_at(self.pool(kind), self.group, rng, stage.tokens // TOKENS_PER_UNIT)
            span = phase.spans[int(rng.integers(len(phase.spans)))]
            return self.source.lesson(kind, stage.tokens, phase.pairs, span, rng)

        # Everything that starts processes or takes long is made here, not in the thread.
        if stage.name == "vision":
            for kind in self.recipe.pools:
                self.pool(kind)
        else:
            _ = self.source
        with ThreadPoolExecutor(1) as thread:
            coming = thread.submit(make, self.step)
            for step in range(self.step + 1, stage.steps):
                made, coming = coming.result(), thread.submit(make, step)
                yield made
            yield coming.result()

    def _loss(self, stage: Stage, material: Look | Lesson) -> tuple[torch.Tensor, dict[str, float]]:
        if isinstance(material, Look):
            return vision_step(self.model, self.heads, material)
        return language_step(self.model, self.hints, material.to(self.device), stage.phase_at(self.step))

    @property
    def source(self) -> Source:
        """What the language stage reads; asked for only once the vision side is trained."""
        if self._source is None:
            video = next(kind for kind in self.recipe.pools if kind != IMAGE)
            library = Library(self.pool(video), self.features(video), self.group)
            self._source = Source(self.recipe.model, self.tokenizer, library, self.pool(IMAGE), self.features(IMAGE))
        return self._source

    def validate(self) -> dict[str, dict[str, float]]:
        """Accuracy by kind of clip and type of question on whole clips that nothing was trained on."""
        self.model.eval()
        result = {}
        for kind in self.recipe.validation:
            features, pool = self.features(kind, VALIDATION_SEED), self.pool(kind, VALIDATION_SEED)
            for with_text in (False, True)[: 1 if kind == IMAGE else 2]:
                scores = teacher_forced(self.model, self.recipe.model, self.tokenizer, pool, features, with_text)
                name = kind + "+text" * with_text
                result[name] = {name: round(score, 3) for name, score in scores.items()}
        self.model.train()
        return result

    def pool(self, kind: str, first_seed: int = 0) -> Pool:
        key = (kind, first_seed)
        if key not in self._pools:
            size = (self.recipe.validation if first_seed else self.recipe.pools)[kind]
            self._pools[key] = make_pool(self.pool_folder, kind, size, first_seed, self.workers)
        return self._pools[key]

    def features(self, kind: str, first_seed: int = 0) -> torch.Tensor:
        """Of the frozen vision side; asked for only once it is trained."""
        key = (kind, first_seed)
        if key not in self._features:
            self._features[key] = pool_features(self.model, self.pool(kind, first_seed)).cpu()
        return self._features[key]

    def export(self) -> Path:
        """The checkpoint folder of the model as it stands, replaced as a whole."""
        folder = self.out / self.recipe.model
        fresh = self.out / f".{self.recipe.model}.{os.getpid()}"
        shutil.rmtree(fresh, ignore_errors=True)
        save_folder(self.model, self.recipe.model, VOCABULARY, fresh)
        log = {
            "model": self.recipe.model,
            "seed": self.recipe.seed,
            "recipe": dataclasses.asdict(self.recipe),
            "stages_done": [stage.name for stage in self.recipe.stages[: self.stage]],
            "seconds": round(self.seconds, 1),
            "device": self.device,
            "threads": torch.get_num_threads(),
            "source": source(),
            "start_weights_sha256": self.begun_with,
            "versions": {
                "python": platform.python_version(),
                **{m.__name__: m.__version__ for m in (torch, transformers, tokenizers, np)},
            },
            "weights_sha256": hash_of(fresh / "model.safetensors"),
            "curves": self.curves,
        }
        (fresh / "training.json").write_text(json.dumps(log, indent=1) + "\n", "utf-8")
        if folder.exists():  # out of the way first: a stop in between leaves one of the two whole
            before = self.out / f".{self.recipe.model}.before"
            shutil.rmtree(before, ignore_errors=True)
            os.replace(folder, before)
            os.replace(fresh, folder)
            shutil.rmtree(before)
        else:
            os.replace(fresh, folder)
        return folder

    def _note(self, line: dict[str, Any]) -> None:
        self.curves.append(line)
        print(json.dumps(line), flush=True)

    def _fingerprint(self) -> str:
        deciding = dataclasses.asdict(self.recipe)
        del deciding["validation"]  # it watches, and changes nothing
        return json.dumps(deciding, sort_keys=True)

    def _save(self, optimizers: list[torch.optim.Optimizer]) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        state = {
            "recipe": self._fingerprint(),
            "begun_with": self.begun_with,
            "stage": self.stage,
            "step": self.step,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "order_heads": self.order_heads.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "curves": self.curves,
        }
        fresh = self.state_path.with_suffix(f".{os.getpid()}")
        torch.save(state, fresh)
        os.replace(fresh, self.state_path)

    def _load(self) -> None:
        try:
            state = torch.load(self.state_path, map_location=self.device, weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise UsageError(f"{self.state_path} cannot be read ({error!r:.80}); give an empty folder.") from None
        if state["recipe"] != self._fingerprint():
            raise UsageError(
                f"--out {self.out} holds a run of another recipe or seed; give an empty folder or that recipe."
            )
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        self.order_heads.load_state_dict(state["order_heads"])
        self.begun_with = state["begun_with"]  # the shipped model may have been trained further since
        self.stage, self.step, self.seconds = state["stage"], state["step"], state["seconds"]
        self.optimizer_states, self.curves = state["optimizers"], state["curves"]


def _begin_with(model: Model, name: str) -> None:
    """Take over the language side of a shipped model: every weight, as both families have the same."""
    other = AutoModelForImageTextToText.from_pretrained(verify(name))
    try:
        model.model.language_model.load_state_dict(other.model.language_model.state_dict())
    except RuntimeError:
        raise UsageError(f"The shipped {name} has another shape or vocabulary; train it again first.") from None


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a reference model; run again to resume.")
    parser.add_argument("--model", choices=sorted(RECIPES), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stages", help="comma-separated; all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.seed < 0 or args.threads < 1:
        parser.error(f"--seed must be at least 0 and --threads at least 1, not {args.seed} and {args.threads}.")
    torch.set_num_threads(args.threads)
    recipe = dataclasses.replace(RECIPES[args.model], seed=args.seed)
    names = args.stages.split(",") if args.stages else [stage.name for stage in recipe.stages]
    try:
        Trainer(recipe, args.out, device=str(pick_device(args.device))).run(names)
    except UsageError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
