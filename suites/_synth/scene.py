"""What happens in a generated video or picture: plain data drawn from a seed, no pixels.

Coloured shapes (events) appear one after another over a moving background. No two events of a scene share both colour
and shape, and none overlap in time, so "the red circle" and "the first shape" always mean exactly one thing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

TEST_SEED = 10**9
"""Seeds from here on belong to test splits; training draws below it. Disjoint by construction."""

SIZE = 64
"""Frames are SIZE x SIZE pixels."""
COLOURS = ("red", "green", "blue", "yellow", "purple", "white", "cyan", "orange")
SHAPES = ("circle", "square", "triangle", "cross")
PLACES = ("topleft", "topright", "bottomleft", "bottomright")
DIRECTIONS = ("left", "right", "up", "down")
MOTION_FRAMES = 3
MOTION_STEP = 7
"""Pixels a moving shape travels from one frame to the next: three frames cross its quadrant, almost a patch a frame."""

_QUADRANT = SIZE // 2
_UNIT = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


@dataclass(frozen=True)
class Event:
    """One shape, visible in frames start … start + frames - 1, always inside one quadrant."""

    start: int
    frames: int
    colour: str
    shape: str
    place: str
    size: Literal["small", "large"]
    motion: str | None
    x: float
    """Centre in pixels in the middle of its time (right is positive)."""
    y: float
    """Downwards is positive."""
    radius: float

    @property
    def stop(self) -> int:
        return self.start + self.frames

    def centre(self, frame: int) -> tuple[float, float]:
        """(x, y) in pixels at an absolute frame number."""
        if self.motion is None:
            return self.x, self.y
        dx, dy = _UNIT[self.motion]
        travelled = MOTION_STEP * (frame - self.start - (self.frames - 1) / 2)
        return self.x + dx * travelled, self.y + dy * travelled


@dataclass(frozen=True)
class Scene:
    seed: int
    n_frames: int
    kind: Literal["video", "image"]
    events: tuple[Event, ...]
    """In order of time (for a picture: in no order)."""
    cuts: tuple[int, ...]
    """Frames at which the background changes for another one."""


def event_range(n_frames: int) -> tuple[int, int]:
    """Fewest and most events of a video of this length, both included: 4 to 7 from 8 frames on."""
    most = min(7, n_frames)
    return (min(4, most) if n_frames >= 8 else max(1, n_frames // 2)), most


def make_scene(seed: int, n_frames: int, n_events: int | None = None) -> Scene:
    """A video in which several things happen in order; `n_events` None draws the number uniformly from `event_range`."""
    rng = _rng(seed, n_frames, 1)
    fewest, most = event_range(n_frames)
    drawn = int(rng.integers(fewest, most + 1))
    n = drawn if n_events is None else n_events
    if not 1 <= n <= min(n_frames, len(COLOURS)):
        raise ValueError(f"{n} events do not fit into {n_frames} frames; from 1 to {min(n_frames, len(COLOURS))} do.")
    moving = rng.random(n) < 1 / 3
    frames = np.where(moving, MOTION_FRAMES, rng.integers(1, 4, n)).tolist()
    gap = 1 if n_frames >= 2 * n - 1 else 0  # an empty frame between events wherever the length allows one
    for i in rng.permutation(n).tolist() * 2:  # too long for the video: shorten in random order until it fits
        if sum(frames) + gap * (n - 1) <= n_frames:
            break
        frames[i] = 1
    slack = n_frames - sum(frames) - gap * (n - 1)
    offsets = np.sort(rng.integers(0, slack + 1, n)).tolist()
    starts = [offsets[i] + sum(frames[:i]) + gap * i for i in range(n)]
    places = rng.integers(0, 4, n).tolist()
    motions = [bool(m) and f == MOTION_FRAMES for m, f in zip(moving, frames, strict=True)]
    events = _draw(rng, starts, frames, places, motions)
    return Scene(seed, n_frames, "video", events, _cuts(rng, n_frames))


def make_haystack(seed: int, n_frames: int, depth: float) -> Scene:
    """One needle in `n_frames`; `depth` 0 puts it at the very start, 1 at the very end."""
    rng = _rng(seed, n_frames, 2)
    moves = n_frames >= MOTION_FRAMES and rng.random() < 1 / 2
    frames = MOTION_FRAMES if moves else int(rng.integers(1, min(3, n_frames) + 1))
    start = round(depth * (n_frames - frames))
    events = _draw(rng, [start], [frames], rng.integers(0, 4, 1).tolist(), [moves])
    return Scene(seed, n_frames, "video", events, _cuts(rng, n_frames))


def make_image(seed: int, n_events: int | None = None) -> Scene:
    """One picture with 1 to 4 shapes, each in its own quadrant."""
    rng = _rng(seed, 1, 3)
    drawn = int(rng.integers(1, 5))
    n = drawn if n_events is None else n_events
    events = _draw(rng, [0] * n, [1] * n, rng.permutation(4)[:n].tolist(), [False] * n)
    return Scene(seed, 1, "image", events, ())


def train_scene(seed: int, n_frames: int, n_events: int | None = None) -> Scene:
    """`make_scene` for training: refuses a seed that belongs to the test split."""
    if not 0 <= seed < TEST_SEED:
        raise ValueError(f"{seed} is not a training seed; those are 0 to {TEST_SEED - 1}.")
    return make_scene(seed, n_frames, n_events)


def _rng(seed: int, n_frames: int, stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([seed, n_frames, stream]))


def _draw(
    rng: np.random.Generator, starts: list[int], frames: list[int], places: list[int], moving: list[bool]
) -> tuple[Event, ...]:
    """Looks of the events. Colour and shape are drawn together, without replacement: every answer stays equally likely."""
    n = len(starts)
    looks = rng.permutation(len(COLOURS) * len(SHAPES))[:n].tolist()
    large = (rng.random(n) < 1 / 2).tolist()
    unit = rng.random((n, 3)).tolist()  # radius, x and y within what is allowed
    directions = rng.integers(0, 4, n).tolist()
    events = []
    for i in range(n):
        # A moving shape needs the room to travel, so it is small and centred: 16 ± 7 px of travel ± 8.5 px of radius.
        big = large[i] and not moving[i]
        radius = 8 + 0.5 * unit[i][0] if moving[i] else (11 + 3 * unit[i][0] if big else 8 + 2 * unit[i][0])
        room = 0.0 if moving[i] else _QUADRANT / 2 - radius - 0.5
        x = (places[i] % 2) * _QUADRANT + _QUADRANT / 2 + room * (2 * unit[i][1] - 1)
        y = (places[i] // 2) * _QUADRANT + _QUADRANT / 2 + room * (2 * unit[i][2] - 1)
        events.append(
            Event(
                start=starts[i],
                frames=frames[i],
                colour=COLOURS[looks[i] // len(SHAPES)],
                shape=SHAPES[looks[i] % len(SHAPES)],
                place=PLACES[places[i]],
                size="large" if big else "small",
                motion=DIRECTIONS[directions[i]] if moving[i] else None,
                x=x,
                y=y,
                radius=radius,
            )
        )
    return tuple(events)


def _cuts(rng: np.random.Generator, n_frames: int) -> tuple[int, ...]:
    """One video in three has 1 to 3 cuts."""
    if n_frames < 8 or rng.random() >= 1 / 3:
        return ()
    return tuple(sorted({int(cut) for cut in rng.integers(1, n_frames, int(rng.integers(1, 4)))}))
