"""The same scene with another number of cuts: what happens stays, and so do the questions; only backgrounds change."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from vlmbench.suites._synth.scene import Scene


def with_cuts(scene: Scene, n: int) -> Scene:
    """The scene with `n` cuts at different frames, drawn from its seed; with fewer, the cuts are some of those of more.

    Raises `ValueError` when it has not that many frames to cut at.
    """
    if not 0 <= n < scene.n_frames:
        raise ValueError(f"{n} cuts do not fit into {scene.n_frames} frames; from 0 to {scene.n_frames - 1} do.")
    rng = np.random.Generator(np.random.PCG64([scene.seed, scene.n_frames, 7]))
    order = 1 + rng.permutation(scene.n_frames - 1)
    return replace(scene, cuts=tuple(sorted(order[:n].tolist())))
