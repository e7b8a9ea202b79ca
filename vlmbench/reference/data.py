"""Clips that training reads: generated, through H.264 and back as a decoder gives them, then cut up and put together anew.

A `Pool` holds decoded clips; a `Library` what the frozen vision side makes of each unit of them (a frame, or a pair), sorted
by what is to be seen. Units do not see each other in the tower, so any video can be assembled from them: as long as one
likes, and never the same twice.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from vlmbench.reference.build import FRAME
from vlmbench.suites._synth.encode import compressed
from vlmbench.suites._synth.render import render
from vlmbench.suites._synth.scene import TEST_SEED, Event, Scene, make_image, train_scene

VALIDATION_SEED = TEST_SEED - 10**6
"""Training seeds from here on are kept for validation; training draws below."""
FEW_COLOURS = 3
IMAGE = "image"
"""The kind of clip that is a picture. Videos are named by their frames."""


@dataclass(frozen=True)
class Pool:
    """Clips of one kind, all in one array."""

    kind: str
    scenes: Sequence[Scene]
    frames: np.ndarray
    """uint8 [N, T, FRAME, FRAME, 3]; a memory map. Pictures have T = 1."""

    @property
    def n_frames(self) -> int:
        return self.frames.shape[1]


def scene_of(seed: int, kind: str) -> Scene:
    return make_image(seed) if kind == IMAGE else train_scene(seed, int(kind))


def clip_of(scene: Scene) -> np.ndarray:
    """uint8 [T, FRAME, FRAME, 3], through H.264 and back unless it is a picture."""
    frames = render(scene)
    return frames if scene.kind == "image" else compressed(frames)


def make_pool(folder: Path, kind: str, size: int, first_seed: int = 0, workers: int = 2) -> Pool:
    """`size` clips from consecutive seeds; made once, then found again in `folder`."""
    scenes = [scene_of(seed, kind) for seed in range(first_seed, first_seed + size)]
    path = folder / f"pool-{kind}-{first_seed}-{size}.npy"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}.unfinished")
        shape = (size, scenes[0].n_frames, FRAME, FRAME, 3)
        frames = np.lib.format.open_memmap(unfinished, "w+", np.uint8, shape)
        if workers > 1:
            with ProcessPoolExecutor(workers) as executor:
                for i, clip in enumerate(executor.map(clip_of, scenes, chunksize=64)):
                    frames[i] = clip
        else:
            for i, scene in enumerate(scenes):
                frames[i] = clip_of(scene)
        frames.flush()
        os.replace(unfinished, path)
    return Pool(kind, scenes, np.load(path, mmap_mode="r"))


@dataclass(frozen=True)
class Shot:
    """An event as it was filmed: the units it is seen in, and nothing else is."""

    event: Event
    first: int
    """Row of the library."""
    units: int
    lead: int
    """Frames of its first unit before it appears."""


class Library:
    """Units of a pool of videos by what they show; `group` frames make a unit."""

    def __init__(self, pool: Pool, features: torch.Tensor, group: int) -> None:
        """features: [N, units, 16, C] of the clips of the pool."""
        self.group = group
        self.features = features.flatten(0, 1)
        self.shots: dict[tuple[str, str], list[Shot]] = {}
        self.blanks: list[np.ndarray] = []
        """Rows without an event, clip by clip."""
        per_clip = features.shape[1]
        for clip, scene in enumerate(pool.scenes):
            seen: dict[int, list[Event]] = {}
            for event in scene.events:
                for unit in range(event.start // group, (event.stop - 1) // group + 1):
                    seen.setdefault(unit, []).append(event)
            for event in scene.events:
                first, last = event.start // group, (event.stop - 1) // group
                if all(seen[unit] == [event] for unit in range(first, last + 1)):
                    shot = Shot(event, clip * per_clip + first, last + 1 - first, event.start - first * group)
                    self.shots.setdefault((event.colour, event.shape), []).append(shot)
            if blank := [clip * per_clip + unit for unit in range(per_clip) if unit not in seen]:
                self.blanks.append(np.array(blank))

    def assemble(self, n_units: int, n_events: int, rng: np.random.Generator) -> tuple[np.ndarray, Scene]:
        """int64 [n_units] rows and the scene that they show: so many events, each look at most once, at random places.

        Half of the clips have three colours only. Where a colour stands for one event alone, as in most generated
        videos, a model learns to find "the red circle" by its colour, and one answer in seven stays wrong.
        """
        looks = sorted(self.shots)
        if rng.random() < 0.5:
            colours = sorted({colour for colour, _ in looks})
            few = {colours[i] for i in rng.permutation(len(colours))[:FEW_COLOURS].tolist()}
            looks = [look for look in looks if look[0] in few]
        n_events = min(n_events, len(looks))
        names = [looks[i] for i in rng.permutation(len(looks))[:n_events].tolist()]
        shots = [self._draw(name, rng) for name in names]
        for i in rng.permutation(len(shots)).tolist():  # too long for the clip: shorter shots until they fit
            if sum(shot.units for shot in shots) > n_units:
                shots[i] = self._draw(names[i], rng, shortest=True)
        slack = n_units - sum(shot.units for shot in shots)
        # Generated videos hold a blank frame between two events wherever they have room (it may be half of a pair).
        apart = 1 if self.group == 1 and slack >= n_events - 1 else 0
        offsets = np.sort(rng.integers(0, slack - apart * (n_events - 1) + 1, n_events)) + apart * np.arange(n_events)
        blanks = self.blanks[int(rng.integers(len(self.blanks)))]
        rows = blanks[rng.integers(0, len(blanks), n_units)]
        events, before = [], 0
        for shot, offset in zip(shots, offsets.tolist(), strict=True):
            at = offset + before
            rows[at : at + shot.units] = np.arange(shot.first, shot.first + shot.units)
            events.append(dataclasses.replace(shot.event, start=at * self.group + shot.lead))
            before += shot.units
        seed = int(rng.integers(VALIDATION_SEED))  # of the captions, where there are any
        return rows, Scene(seed, n_units * self.group, "video", tuple(events), ())

    def _draw(self, name: tuple[str, str], rng: np.random.Generator, *, shortest: bool = False) -> Shot:
        shots = self.shots[name]
        if shortest:
            least = min(shot.units for shot in shots)
            shots = [shot for shot in shots if shot.units == least]
        return shots[int(rng.integers(len(shots)))]
