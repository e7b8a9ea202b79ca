"""What MemVP rests on: trained again without one thing, changed without training, and which slots fire for which question.

    python -m vlmbench.memvp_ablations --model tiny-qwen2.5-vl --suite synthimage --steps 500 --batch 16 --lr 0.005 --slots 160

All is asked of train questions about pictures or videos that were held out of training, never of test questions. Rows are
entered into ``memvp.json`` one by one, and a training that is over is not done again, so a call that was stopped goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from vlmbench import stats
from vlmbench.claims_study import estimate
from vlmbench.errors import RunError, UsageError
from vlmbench.fitting import Fitting
from vlmbench.memvp_ablated import AS_PUBLISHED, ENTRIES, Ablated, Reordered, Unseen
from vlmbench.memvp_data import Material, collect
from vlmbench.memvp_fit import identity_of, recipe_for
from vlmbench.memvp_learner import MemoryLearner
from vlmbench.memvp_map import draw, slot_map
from vlmbench.memvp_prompt import units_of
from vlmbench.memvp_results import Row, put, rows_of
from vlmbench.memvp_train import Trainer, frozen
from vlmbench.methods.memvp import Memvp
from vlmbench.progress import Progress
from vlmbench.request import RunRequest
from vlmbench.session import Session
from vlmbench.spec import nearest, slug

if TYPE_CHECKING:
    from vlmbench.memvp_memory import MemoryShape, VisualMemory
    from vlmbench.models.base import ModelAdapter

PARTS = ("trained", "changed", "slots")
WEIGHTS, SCALES = (0.001, 0.1), (0.01, 1.0)
"""λ and s that are tried beside the published 0.01 and 0.1."""


@dataclass(frozen=True)
class Ablations:
    """One model on one suite."""

    fitting: Fitting
    material: Material
    out: Path

    @property
    def adapter(self) -> ModelAdapter:
        return self.fitting.adapter

    @property
    def where(self) -> tuple[str, str]:
        request = self.fitting.session.request
        return str(request.model), request.suite

    @cached_property
    def base(self) -> VisualMemory:
        """As `vlmbench fit` would begin."""
        method = self.fitting.method
        assert isinstance(method, Memvp)  # noqa: S101  # made below
        units = max((units_of(question.prompt) for question in self.material.questions), key=len)
        return method.new_memory(self.adapter, units, self.fitting.session.request.seed)

    def trained(self) -> None:
        """Each setting trained anew with the same questions, steps and seed."""
        session, recipe = self.fitting.session, recipe_for(self.fitting, len(self.material.questions))
        how = {"kind": "trained", "steps": recipe.steps, "batch": recipe.batch, "lr": recipe.lr, "seed": recipe.seed}
        rows: list[Row] = []
        first: list[float] = []
        for what, change in self._settings().items():
            memory = self._fresh(**change).start(recipe.seed).to(self.adapter.device)
            learner = MemoryLearner(self.adapter, self.material, memory)
            session.request.out.mkdir(parents=True, exist_ok=True)
            state = session.request.out / f"{'-'.join(map(slug, (*self.where, what)))}.training"
            key = f"{what} {identity_of(self.fitting, self.material, memory)}"
            trainer = Trainer(learner, recipe, state, key, session.progress)
            trainer.run(what)
            scores = self._scores(learner)
            first = first or scores
            rows.append({**how, "what": what, **self._row(scores, first), "curve": trainer.curve})
            self._enter("trained", rows)

    def _settings(self) -> dict[str, dict[str, Any]]:
        """What is other than published."""
        base, prompt = self.base, self.material.questions[0].prompt
        per_unit = max(len(features) for features, _ in units_of(prompt))
        values: dict[str, dict[str, Any]] = {name: {"form": name} for name in ENTRIES}
        values |= {f"λ = {weight:g} for {base.weight:g}": {"weight": weight} for weight in WEIGHTS}
        values |= {f"s = {scale:g} for {base.scale:g}": {"scale": scale} for scale in SCALES}
        slots = base.shape.slots
        for fewer in dict.fromkeys((max(1, per_unit // 4), min(per_unit, slots), 2 * slots)):
            if fewer != slots:
                values[f"{fewer} slots for {slots}"] = {"slots": fewer}
        return values

    def _fresh(self, form: str = AS_PUBLISHED, slots: int | None = None, **other: float) -> Ablated:
        base = self.base
        shape: MemoryShape = replace(base.shape, slots=slots or base.shape.slots)
        return Ablated(shape, **{"scale": base.scale, "weight": base.weight, **other}, form=ENTRIES[form])

    def changed(self) -> None:
        """The file that a run would find, read in another way without training."""
        shipped = self._shipped()
        found, material = shipped.memory(self.adapter), self.material

        def other(form: str = AS_PUBLISHED, scale: float = 1.0, weight: float = 1.0) -> Ablated:
            made = Ablated(found.shape, scale=scale * found.scale, weight=weight * found.weight, form=ENTRIES[form])
            made.load_state_dict(found.state_dict())
            return made.eval().requires_grad_(False)

        learners: dict[str, MemoryLearner] = {
            "as trained": MemoryLearner(self.adapter, material, other()),
            **{form: MemoryLearner(self.adapter, material, other(form)) for form in ENTRIES if form != AS_PUBLISHED},
            **{f"s × {by:g}": MemoryLearner(self.adapter, material, other(scale=by)) for by in (0.0, 0.5, 2.0)},
            **{f"λ × {by:g}": MemoryLearner(self.adapter, material, other(weight=by)) for by in (0.5, 2.0)},
            "another picture": Unseen(self.adapter, material, other(), other=True),
            "no picture": Unseen(self.adapter, material, other(), other=False),
        }
        if found.shape.units > 1:
            drawn = torch.Generator().manual_seed(0)
            shuffled = Reordered(self.adapter, material, other(), lambda n: torch.randperm(n, generator=drawn))
            backwards = Reordered(self.adapter, material, other(), lambda n: torch.arange(n).flip(0))
            learners |= {"frames shuffled": shuffled, "frames backwards": backwards}
        rows: list[Row] = []
        first: list[float] = []
        for what, learner in learners.items():
            scores = self._scores(learner)
            first = first or scores
            artefact = shipped.fitted()["artefact"]
            rows.append({"kind": "changed", "artefact": artefact, "what": what, **self._row(scores, first)})
        self._enter("changed", rows)

    def slots(self) -> None:
        """Which slots of the file that a run would find fire for which question, and the picture of all models'."""
        learner = MemoryLearner(self.adapter, self.material, self._shipped().memory(self.adapter))
        samples = {sample.id: sample for sample in self.fitting.samples}
        put(self.out, "slots", *self.where, [slot_map(learner, self.material.held_out, samples)])
        draw(self.out)

    def _shipped(self) -> Memvp:
        session, method = self.fitting.session, Memvp()
        method.check_weights(session.backend.identity)
        method.fit(session.suite)
        return method

    def _scores(self, learner: MemoryLearner) -> list[float]:
        with frozen(self.adapter.model), learner.attached():
            return learner.answered(self.material.held_out, 32)

    def _row(self, scores: Sequence[float], first: Sequence[float]) -> Row:
        clusters = [question.cluster for question in self.material.held_out]
        delta = None if scores is first else stats.paired_delta(scores, first, clusters)
        accuracy = stats.accuracy_interval(scores, clusters)
        return {"n": len(scores), **estimate("accuracy", accuracy), **estimate("delta", delta)}

    def _enter(self, kind: str, rows: Sequence[Row]) -> None:
        others = [row for row in rows_of(self.out, "ablations", *self.where) if row["kind"] != kind]
        put(self.out, "ablations", *self.where, sorted([*others, *rows], key=lambda row: PARTS.index(row["kind"])))


def main(
    model: Annotated[str, typer.Option(metavar="SPEC", help="Which model.")],
    suite: Annotated[str, typer.Option(metavar="SPEC", help="Which suite.")] = "synthimage",
    part: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(PARTS)}. Repeatable. Default: all.")] = None,
    steps: Annotated[int, typer.Option(help="Of every training.")] = 500,
    batch: Annotated[int, typer.Option(help="Questions a step.")] = 16,
    lr: Annotated[float, typer.Option(help="Highest learning rate.")] = 0.005,
    slots: Annotated[int, typer.Option(help="Of the memory that is trained.")] = 160,
    limit: Annotated[
        int | None, typer.Option(help="Train questions, the held-out ones among them. Default: all.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of training.")] = 0,
    threads: Annotated[int | None, typer.Option(help="CPU threads. Default: torch's.")] = None,
    runs: Annotated[Path, typer.Option(help="Where trainings go on from.")] = Path("runs/memvp"),
    out: Annotated[Path, typer.Option(help="Folder for memvp.json, memvp.md and memvp.png.")] = Path("results/cpu"),
) -> None:
    """Measure what MemVP rests on and write what came out."""
    if unknown := [each for each in part or [] if each not in PARTS]:
        raise UsageError(f"--part must be of {', '.join(PARTS)}, not {unknown[0]!r}.{nearest(unknown[0], PARTS)}")
    for option, value in (("--steps", steps), ("--batch", batch), ("--lr", lr)):
        if not value > 0:
            raise UsageError(f"{option} must be above 0, not {value:g}.")
    request = RunRequest(
        model=model, suite=suite, limit=limit, mode="accuracy", threads=threads, seed=seed, out=runs, device="cpu",
        baseline=False, offline=True,
    )  # fmt: skip
    with Progress() as progress, Session(request, progress, split="train", stored=False) as session:
        fitting = Fitting(session, Memvp(slots=slots), 0.0, steps, out=runs, batch=batch, lr=lr)
        material = collect(fitting, cached=True)
        if not material.held_out:
            raise UsageError(
                f"--limit {limit} leaves fewer than ten pictures or videos, so none is held out; raise it."
            )
        for each in part or PARTS:
            getattr(Ablations(fitting, material, out), each)()
    print(out / "memvp.md")


if __name__ == "__main__":
    try:
        typer.run(main)
    except (UsageError, RunError) as error:
        raise SystemExit(str(error)) from None
