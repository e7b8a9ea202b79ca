"""One model on one suite: MemVP as a run finds it, and MemVP trained anew beside LoRA, on the same questions and steps."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from vlmbench import memvp_times, report, stats
from vlmbench.claims_study import estimate
from vlmbench.engine import TorchBackend
from vlmbench.errors import UsageError
from vlmbench.fitting import Fitting
from vlmbench.machine import load_backend
from vlmbench.memvp_data import Material, collect
from vlmbench.memvp_fit import identity_of, recipe_for, trained
from vlmbench.memvp_learner import Learner, MemoryLearner
from vlmbench.memvp_lora import BothLearner, Lora, LoraLearner
from vlmbench.memvp_prompt import units_of
from vlmbench.memvp_results import Row, put, rows_of
from vlmbench.memvp_train import Trainer
from vlmbench.methods.full import Full
from vlmbench.methods.memvp import Memvp
from vlmbench.runner import accuracy, latency, memory
from vlmbench.session import Session
from vlmbench.spec import slug
from vlmbench.store import RunView

if TYPE_CHECKING:
    from vlmbench.memvp_memory import VisualMemory
    from vlmbench.method import Method
    from vlmbench.models.base import ModelAdapter
    from vlmbench.progress import Progress
    from vlmbench.request import RunRequest

NAMES = ("memvp", "lora", "memvp+lora")
RUN = ("full", "memvp", "blind")
TABLE = ("method", "n", "n_failed", "n_visual_tokens", "prefill_s", "e2e_s", "peak_extra_bytes", "kv_bytes", "marks")
INTERVALS = ("accuracy", "accuracy_delta", "speedup_prefill", "speedup_e2e")
"""Columns of `vlmbench table` that are entered; the latter with their ends."""


@dataclass(frozen=True)
class Options:
    """How long is trained and measured; None: what `vlmbench fit` takes."""

    steps: int | None = None
    batch: int | None = None
    lr: float | None = None
    """Of MemVP alone."""
    lora_lr: float = 1e-3
    """Where LoRA is trained."""
    train_limit: int | None = None
    rounds: int = 3
    """Of the prefill."""
    shape: str = memvp_times.LLAMA


@dataclass(frozen=True)
class Contest:
    """What every part of the comparison takes; each enters its rows into ``memvp.json``."""

    request: RunRequest
    """Model and suite; `limit` is of test questions, and trainings are kept in `out`."""
    method: Memvp
    options: Options
    out: Path
    progress: Progress

    @property
    def model(self) -> str:
        return str(self.request.model)

    @cached_property
    def backend(self) -> TorchBackend:
        return _loaded(self.request)

    def _enter(self, part: str, rows: Sequence[Row]) -> None:
        put(self.out, part, self.model, self.request.suite, rows)

    def run(self) -> None:
        """The file that a run finds by itself, beside full attention and no picture at all: as ``vlmbench run`` stores it."""
        request = replace(self.request, methods=RUN, mode="all", baseline=False)
        with Session(request, self.progress, backend=self.backend) as session:
            self.progress.note(session.describe())
            for entry in session.entries:
                accuracy(session, entry)
            latency(session)
            for entry in session.entries:
                memory(session, entry)
            ids = [sample.id for sample in session.samples]
        views = {entry.method.name: RunView(entry.run.folder) for entry in session.entries}
        asked = {name: [view.records.of("accuracy")[id_] for id_ in ids] for name, view in views.items()}
        own, blind = ([each.score for each in asked[name]] for name in ("memvp", "blind"))
        gain = stats.paired_delta(own, blind, [each.cluster for each in asked["memvp"]])
        rows = []
        for row in report.rows(list(views.values())):
            above = estimate("above_blind", gain if row["method"] == "memvp" else None)
            ends = {f"{name}{end}": row[f"{name}{end}"] for name in INTERVALS for end in ("", "_low", "_high")}
            rows.append({name: row[name] for name in TABLE} | ends | above)
        self._enter("run", rows)

    def rivals(self, names: Sequence[str] = NAMES) -> None:
        """Train each, ask it the test questions, and enter its row at once."""
        options, request = self.options, self.request
        with ExitStack() as stack:
            asked = replace(request, limit=options.train_limit)
            train = Session(asked, self.progress, split="train", backend=self.backend, stored=False)
            test = Session(request, self.progress, backend=self.backend, stored=False)
            for session in (train, test):
                stack.enter_context(session)
            how = {"out": request.out, "batch": options.batch, "lr": options.lr}
            fitting = Fitting(train, self.method, 0.0, options.steps, **how)  # type: ignore[arg-type]
            material = collect(fitting, cached=True)
            for name in names:
                row = self._rival(name, fitting, material, test)
                others = [
                    each for each in rows_of(self.out, "rivals", self.model, request.suite) if each["name"] != name
                ]
                self._enter("rivals", sorted([*others, row], key=lambda each: NAMES.index(each["name"])))

    def _rival(self, name: str, fitting: Fitting, material: Material, test: Session) -> Row:
        """One of `NAMES` trained, and its answers."""
        adapter, request = self.backend.adapter, self.request
        recipe = recipe_for(fitting, len(material.questions))
        units = max((units_of(question.prompt) for question in material.questions), key=len)
        made = self.method.new_memory(adapter, units, recipe.seed)
        lora_lr = self.options.lora_lr
        rate = lora_lr / recipe.lr
        if name == "lora":
            recipe, rate = replace(recipe, lr=lora_lr), 1.0
        with ExitStack() as stack:
            lora, one = None, name == "lora"
            learner: Learner = MemoryLearner(adapter, material, made)
            if name != "memvp":
                lora = Lora(adapter, made.count, recipe.seed)
                stack.callback(lora.close)
                learner = (
                    LoraLearner(adapter, material, lora) if one else BothLearner(adapter, material, made, lora, rate)
                )
            request.out.mkdir(parents=True, exist_ok=True)
            state = request.out / f"{slug(self.model)}-{slug(request.suite)}-{name.replace('+', '-')}.training"
            key = name if lora is None or one else f"{name} at {rate:g}"
            trainer = Trainer(learner, recipe, state, f"{key} {identity_of(fitting, material, made)}", self.progress)
            trainer.run(name)
            method: Method = Full() if name == "lora" else _with_memory(trainer, fitting, material, made)
            scores, clusters = _ask(test, method, name)
        return {
            "name": name,
            "trained_parameters": sum(p.numel() for p in learner.parameters.values()),
            "bytes": sum(p.nbytes for p in learner.parameters.values()),
            "lora_rank": None if lora is None else lora.rank,
            "slots": None if name == "lora" else made.shape.slots,
            "start": None if name == "lora" or self.method.started is None else self.method.started.digest,
            "steps": recipe.steps,
            "batch": recipe.batch,
            "lr": recipe.lr,
            "lora_lr": None if lora is None else lora_lr,
            "seed": recipe.seed,
            "questions": len(material.questions),
            "data_hash": material.data_hash,
            "weights_hash": self.backend.identity.weights_hash,
            "curve": trainer.curve,
            "train_s": round(trainer.seconds, 1),
            "n": len(scores),
            **estimate("accuracy", stats.accuracy_interval(scores, clusters)),
        }

    def steps(self) -> None:
        """A training step, on made-up questions."""

        def fresh() -> ModelAdapter:
            return _loaded(self.request).adapter

        self._enter("steps", [memvp_times.steps(fresh, self.method, self.request.out, self.progress)])

    def prefill(self) -> None:
        """Of a shape with random weights, whatever model and suite are named."""
        from vlmbench.models.loading import load

        shape, rounds = self.options.shape, self.options.rounds
        adapter = load(shape, dtype=torch.float32, device="cpu", attention="sdpa").adapter
        rows = []
        for text in memvp_times.TEXTS:
            self.progress.note(f"prefill of {text} text tokens, {shape}")
            rows.append(memvp_times.prefill(adapter, text, rounds))
            put(self.out, "prefill", shape, "", rows)


def _loaded(request: RunRequest) -> TorchBackend:
    backend = load_backend(request, str(request.model))
    if not isinstance(backend, TorchBackend):
        raise UsageError(f"{request.model} is a stand-in without weights; name a model.")
    return backend


def _with_memory(trainer: Trainer, fitting: Fitting, material: Material, made: VisualMemory) -> Memvp:
    """The method as a run would use it, from a file."""
    file = trained(trainer, fitting, material, made, seconds=0.0)
    path = trainer.path.with_suffix(".safetensors")
    own = {name: tensor for name, tensor in file.tensors.items() if not name.startswith("lora.")}
    replace(file, tensors=own).write(path)
    try:
        return Memvp(artefact=str(path))
    finally:
        path.unlink()


def _ask(test: Session, method: Method, name: str) -> tuple[list[float], list[str]]:
    """Scores of the test questions, and their videos."""
    scores, clusters = [], []
    with test.backend.attach(method):
        for sample in test.each(test.samples, f"test · {name}"):
            clips = test.clips(sample, test.blank(sample, "accuracy"))
            outcome = None if clips is None else test.ask(method, sample, clips, "accuracy")
            scores.append(test.suite.score(sample, outcome.raw_text).value if outcome else 0.0)
            clusters.append(sample.cluster)
    return scores, clusters
