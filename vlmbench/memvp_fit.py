"""``vlmbench fit --method memvp``: from a suite's train split to the file that the method reads."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from vlmbench import header
from vlmbench.errors import RunError
from vlmbench.memvp_data import Material, collect
from vlmbench.memvp_file import Trained
from vlmbench.memvp_learner import MemoryLearner
from vlmbench.memvp_prompt import units_of
from vlmbench.memvp_train import BASE_LR, BATCH, EPOCHS, NotFinite, Recipe, Trainer
from vlmbench.methods.memvp import Memvp

if TYPE_CHECKING:
    from vlmbench.fitting import Fitting
    from vlmbench.memvp_memory import VisualMemory


def fit(method: Memvp, fitting: Fitting) -> Trained:
    """Raises `RunError` when the loss becomes no number; the last good weights are then in a file of their own."""
    adapter, seed = fitting.adapter, fitting.session.request.seed
    began_s = time.monotonic()
    material = collect(fitting, cached=not method.vision)
    units = max((units_of(question.prompt) for question in material.questions), key=len)
    memory = method.new_memory(adapter, units, seed)
    recipe = recipe_for(fitting, len(material.questions))
    learner = MemoryLearner(adapter, material, memory)
    trainer = Trainer(learner, recipe, fitting.state, identity_of(fitting, material, memory), fitting.session.progress)
    before_s = time.monotonic() - began_s
    try:
        trainer.run(method.name)
    except NotFinite as error:
        raise RunError(f"{error}: {_rescued(trainer, fitting, material, memory)}; give a lower --lr.") from error
    return trained(trainer, fitting, material, memory, seconds=before_s + trainer.seconds)


def recipe_for(fitting: Fitting, questions: int) -> Recipe:
    """What was asked for; else the published numbers: 20 epochs, batch 32, 9e-3 · batch / 256."""
    batch = min(fitting.batch or BATCH, questions)
    steps = fitting.steps or max(1, EPOCHS * questions // batch)
    return Recipe(steps, batch, fitting.lr or BASE_LR * batch / 256, fitting.session.request.seed)


def identity_of(fitting: Fitting, material: Material, memory: VisualMemory) -> str:
    """Model, data, the frames taken of it and what is trained: a training goes on only where all of it is the same."""
    session, request, shape = fitting.session, fitting.session.request, dataclasses.asdict(memory.shape)
    model = session.backend.identity
    computed = (model.weights_hash, model.dtype, model.attention)
    shown = (session.sampler, session.frames, session.fps, session.decoder_name, request.max_pixels, request.min_pixels)
    return repr((computed, material.data_hash, shown, shape, memory.scale, *_begun(fitting).values()))


def trained(trainer: Trainer, fitting: Fitting, material: Material, memory: VisualMemory, seconds: float) -> Trained:
    """The file of a trainer as it stands."""
    session = fitting.session
    identity = session.backend.identity
    recipe = dataclasses.asdict(trainer.recipe) | {
        "optimizer": "AdamW, linear warm-up, cosine to 0",
        "step": trainer.step,
    }
    recipe |= _begun(fitting)
    return Trained(
        shape=memory.shape,
        scale=memory.scale,
        weight=memory.weight,
        model=identity.model,
        revision=identity.revision,
        weights_hash=identity.weights_hash,
        suite=session.request.suite,
        suite_version=session.suite.version,
        data_hash=material.data_hash,
        sampler=session.sampler,
        frames=session.frames,
        recipe=recipe,
        curve=trainer.curve,
        n=len(material.questions),
        n_held_out=len(material.held_out),
        parameters=memory.count,
        tensors=trainer.tensors(),
        seconds=round(seconds, 1),
        versions=header.versions(),
        **header.source(),
        device={
            "type": identity.device_type,
            "name": identity.device_name,
            "dtype": identity.dtype,
            "threads": torch.get_num_threads(),
        },
    )


def _begun(fitting: Fitting) -> dict[str, str]:
    """The file that training began with, if any."""
    method = fitting.method
    return {"start": method.started.digest} if isinstance(method, Memvp) and method.started else {}


def _rescued(trainer: Trainer, fitting: Fitting, material: Material, memory: VisualMemory) -> str:
    """Write the last good weights beside `--out`, forget the training, and say so."""
    if not trainer.path.exists():
        return "no checkpoint was good before"
    trainer.reload()
    path = fitting.out.with_name(f"{fitting.out.stem}.step{trainer.step}{fitting.out.suffix}")
    trained(trainer, fitting, material, memory, trainer.seconds).write(Path(path))
    trainer.path.unlink()
    return f"the last good weights, of step {trainer.step}, are in {path}"
