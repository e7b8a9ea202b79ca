"""Pixels of a scene: a drifting texture in muted colours with the events drawn over it.

The texture is a sum of plane waves, sin(u + w t) = sin u cos wt + cos u sin wt, so all frames are one product of a
[T, 2K] and a [2K, pixels] matrix. Both are rounded to small integers first: their products and sums are then exact in
float32, and a last-bit difference between two processors' sines or BLAS libraries does not change the picture.
"""

from __future__ import annotations

import itertools

import numpy as np

from vlmbench.suites._synth.scene import SIZE, Event, Scene

RGB = {
    "red": (230, 40, 40),
    "green": (40, 200, 60),
    "blue": (50, 80, 230),
    "yellow": (230, 220, 50),
    "purple": (160, 50, 200),
    "white": (240, 240, 240),
    "cyan": (60, 220, 220),
    "orange": (240, 140, 30),
}
"""Bright against a background of 20 to 120, and still apart after chroma subsampling and H.264."""

_WAVES = 3
_STEPS = 127  # one unit of a rounded sine or cosine
_NOISE = 3  # grey levels either way


def render(scene: Scene) -> np.ndarray:
    """uint8 [T, SIZE, SIZE, 3], RGB."""
    rng = np.random.Generator(np.random.PCG64([scene.seed, scene.n_frames, 9]))
    frames = np.empty((scene.n_frames, SIZE, SIZE, 3), np.uint8)
    borders = (0, *scene.cuts, scene.n_frames)
    for start, stop in itertools.pairwise(borders):
        frames[start:stop] = _texture(rng, stop - start)
    for event in scene.events:
        for t in range(event.start, event.stop):
            frames[t][_mask(event, t)] = RGB[event.colour]
    return frames


def _texture(rng: np.random.Generator, n_frames: int) -> np.ndarray:
    """uint8 [n_frames, SIZE, SIZE, 3]."""
    y, x = np.mgrid[:SIZE, :SIZE]
    slope = rng.uniform(-0.12, 0.12, (_WAVES, 2))  # radians a pixel: from flat to about one period a frame width
    phase = rng.uniform(0, 2 * np.pi, (_WAVES, 3))  # a phase of its own per channel gives colour
    speed = rng.uniform(0.05, 0.4, _WAVES) * rng.choice((-1, 1), _WAVES)  # radians a frame
    level = rng.integers(55, 86, 3)
    u = slope[:, :1, None, None] * x[..., None] + slope[:, 1:, None, None] * y[..., None] + phase[:, None, None, :]
    space = np.rint(np.concatenate([np.sin(u), np.cos(u)]) * _STEPS).reshape(2 * _WAVES, -1)  # [2K, pixels]
    wt = np.arange(n_frames)[:, None] * speed
    time = np.rint(np.concatenate([np.cos(wt), np.sin(wt)], 1) * _STEPS)  # [T, 2K]
    waves = time.astype(np.float32) @ space.astype(np.float32)
    waves *= 11 / _STEPS**2  # each wave swings by 11 grey levels
    pixels = waves.reshape(n_frames, SIZE, SIZE, 3)
    pixels += level.astype(np.float32)
    pixels += rng.integers(-_NOISE, _NOISE + 1, (n_frames, SIZE, SIZE, 1), dtype=np.int8)
    return pixels.astype(np.uint8)  # 55 - 33 - 3 and 85 + 33 + 3 stay within a byte


def _mask(event: Event, frame: int) -> np.ndarray:
    """bool [SIZE, SIZE]: the pixels of the shape."""
    cx, cy = event.centre(frame)
    r = event.radius
    y, x = np.ogrid[:SIZE, :SIZE]
    dx, dy = np.abs(x + 0.5 - cx), y + 0.5 - cy
    match event.shape:
        case "circle":
            return dx**2 + dy**2 < r**2
        case "square":
            return (dx < 0.85 * r) & (np.abs(dy) < 0.85 * r)
        case "triangle":
            return (dy < 0.8 * r) & (dy > 1.9 * dx - r)
        case "cross":
            tall, wide = np.abs(dy) < r, dx < r
            return ((dx < 0.35 * r) & tall) | ((np.abs(dy) < 0.35 * r) & wide)
    raise ValueError(f"{event.shape!r} is not a shape.")
