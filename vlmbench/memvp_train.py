"""The training loop of MemVP and of its rivals: published recipe, resumable, the same weights for the same seed.

AdamW, linear warm-up and cosine to zero, no clipping, as in the paper's own scripts. Where they replace a loss that is not a
number by zero and go on, training here stops. The batch and the dropout of a step depend on seed and step alone, so that a
run that was stopped ends with the weights of one that was not, on a CPU bit for bit.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pickle
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from vlmbench.errors import RunError, UsageError
from vlmbench.live import LiveStorages
from vlmbench.memvp_data import Question
from vlmbench.memvp_learner import Learner
from vlmbench.rounds import Clock

if TYPE_CHECKING:
    from vlmbench.progress import Progress

BATCH = 32
BASE_LR = 9e-3
"""For a batch of 256; in proportion for others."""
EPOCHS = 20
CHECKS = 20
"""Checkpoints, and rows of the curve."""


@dataclass(frozen=True)
class Recipe:
    """All that decides the weights beside model and data."""

    steps: int
    batch: int
    lr: float
    """Highest learning rate."""
    seed: int
    warmup: float = 0.1
    """Share of the steps; 2 of 20 epochs as published."""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.02
    """Not of vectors."""

    def lr_at(self, step: int) -> float:
        warm = max(1, round(self.warmup * self.steps))
        if step < warm:
            return self.lr * (step + 1) / warm
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))

    @property
    def every(self) -> int:
        return max(1, self.steps // CHECKS)


class Trainer:
    """Trains a learner in the steps of a recipe; `path` holds everything to go on from."""

    def __init__(self, learner: Learner, recipe: Recipe, path: Path, identity: str, progress: Progress) -> None:
        """`identity` is of model and data. Raises `UsageError` when `path` holds another training."""
        self.learner, self.recipe, self.path, self.progress = learner, recipe, path, progress
        self._key = json.dumps([identity, dataclasses.asdict(recipe)], sort_keys=True)
        self.step, self.seconds = 0, 0.0
        self.curve: list[dict[str, Any]] = []
        groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
        for name, parameter in learner.parameters.items():
            groups.setdefault((parameter.dim() <= 1, learner.rate(name)), []).append(parameter)
        decays = (recipe.weight_decay, 0.0)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": own, "weight_decay": decays[vector], "rate": rate}
                for (vector, rate), own in sorted(groups.items(), key=lambda group: group[0])
            ],
            lr=recipe.lr,
            betas=recipe.betas,
        )
        if path.exists():
            self.reload()

    def run(self, what: str) -> None:
        """All steps that are left. Raises `RunError` when the loss is no number; the state is then the last good one."""
        recipe, progress = self.recipe, self.progress
        progress.start(recipe.steps - self.step, f"train · {what}", "step")
        if self.step:
            progress.note(f"goes on from step {self.step} of {recipe.steps} in {self.path}")
        losses: list[float] = []
        began_s, first = time.monotonic(), self.step
        with frozen(self.learner.adapter.model, self.learner.parameters.values()), self.learner.attached():
            self.learner.train(True)
            while self.step < recipe.steps:
                progress.stage(f"loss {losses[-1]:.3f}" if losses else "")
                losses.append(self._step())
                self.step += 1
                progress.advance()
                if self.step % recipe.every == 0 or self.step == recipe.steps:
                    held_out = self.held_out()
                    spent_s = time.monotonic() - began_s
                    left_s = spent_s / (self.step - first) * (recipe.steps - self.step)
                    self.curve.append({"step": self.step, "loss": round(fmean(losses), 5), "held_out": held_out})
                    progress.note(
                        f"{what}: step {self.step} of {recipe.steps}, loss {fmean(losses):.4f}, held-out questions "
                        f"{'—' if held_out is None else f'{held_out:.3f}'}, about {left_s:.0f} s left"
                    )
                    self._save(self.seconds + spent_s)
                    losses = []
        self.seconds += time.monotonic() - began_s
        progress.finish()

    def _step(self) -> float:
        recipe = self.recipe
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.lr_at(self.step) * group["rate"]
        with torch.random.fork_rng():
            torch.manual_seed(recipe.seed * 1_000_003 + self.step)
            loss = self.learner.teach(self._batch()).loss
            self.optimizer.zero_grad()
            loss.backward()
        value = loss.item()
        if not math.isfinite(value):
            raise NotFinite(f"The loss became {value} at step {self.step + 1} of {recipe.steps}")
        self.optimizer.step()
        return value

    def timed_step(self) -> float:
        """Seconds of one step, the learner attached and dropout on."""
        with frozen(self.learner.adapter.model, self.learner.parameters.values()), self.learner.attached():
            self.learner.train(True)
            seconds = Clock(self.learner.adapter.device)(self._step)
        self.step += 1
        return seconds

    def step_bytes(self) -> int:
        """Most bytes that one more step holds beside weights, pictures, what is trained and its moments."""
        learner = self.learner
        pictures = [each for each in learner.material.pictures if isinstance(each, Tensor)]
        moments = [
            each for state in self.optimizer.state.values() for each in state.values() if isinstance(each, Tensor)
        ]
        known = [*learner.adapter.model.parameters(), *learner.adapter.model.buffers()]
        with frozen(learner.adapter.model, learner.parameters.values()), learner.attached():
            learner.train(True)
            with LiveStorages([*known, *learner.parameters.values(), *pictures, *moments]) as live:
                before = live.current
                self._step()
        self.optimizer.zero_grad()
        self.step += 1
        return live.peak - before

    def _batch(self) -> list[Question]:
        """Every question once an epoch, in an order of seed and epoch."""
        questions, recipe = self.learner.material.questions, self.recipe
        at = [divmod(self.step * recipe.batch + i, len(questions)) for i in range(recipe.batch)]
        return [questions[_order(recipe.seed, epoch, len(questions))[index]] for epoch, index in at]

    def held_out(self) -> float | None:
        """Share of held-out questions whose answer is right token by token; None when there are too few videos."""
        right = self.learner.answered(self.learner.material.held_out, self.recipe.batch)
        return round(fmean(right), 4) if right else None

    def tensors(self) -> dict[str, Tensor]:
        return {name: parameter.detach().cpu().clone() for name, parameter in self.learner.parameters.items()}

    def _save(self, seconds: float) -> None:
        tensors = self.tensors()
        if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
            raise NotFinite(f"The weights are no numbers after step {self.step} of {self.recipe.steps}")
        state = {
            "key": self._key,
            "step": self.step,
            "seconds": seconds,
            "curve": self.curve,
            "tensors": tensors,
            "optimizer": self.optimizer.state_dict(),
        }
        part = self.path.with_suffix(f".{os.getpid()}.part")
        try:
            torch.save(state, part)
            os.replace(part, self.path)
        except OSError as error:
            raise RunError(f"{self.path} cannot be written ({error.strerror}); make room and start again.") from error
        finally:
            part.unlink(missing_ok=True)

    def reload(self) -> None:
        """Back to what is stored. Raises `UsageError`."""
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise UsageError(f"{self.path} cannot be read ({str(error)[:80]}); delete it to begin again.") from None
        if not isinstance(state, dict) or state.get("key") != self._key:
            raise UsageError(
                f"{self.path} holds a training of another model, data or recipe; delete it to begin again, or give another "
                f"--out."
            )
        with torch.no_grad():
            for name, parameter in self.learner.parameters.items():
                parameter.copy_(state["tensors"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.curve = state["step"], state["seconds"], state["curve"]


class NotFinite(RunError):
    """The loss or a weight is no number any more; what is stored is the last state that was good."""


@contextmanager
def frozen(model: nn.Module, trained: Iterable[nn.Parameter] = ()) -> Iterator[None]:
    """No weight of the model but those that are `trained` gets a gradient; left as it was found."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    chosen = {id(parameter) for parameter in trained}
    for parameter in before:
        parameter.requires_grad_(id(parameter) in chosen)
    try:
        yield
    finally:
        for parameter, required in before.items():
            parameter.requires_grad_(required)


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, n: int) -> list[int]:
    return np.random.default_rng((seed, epoch)).permutation(n).tolist()
