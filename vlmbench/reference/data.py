"""What training reads: pools of generated clips as a decoder gives them back, and batches of questions behind a clip.

A row of a batch is `<bos>`, the clip's visual tokens, then several question–answer pairs. Each pair sees the clip and
itself alone and starts at the same position, so that it looks exactly like the one question of an inference prompt.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from vlmbench.reference.build import (
    ANSWER,
    BOS,
    EOS,
    FRAME,
    IMAGE_TOKENS,
    MEAN_STD,
    PAD,
    TOKENS_PER_FRAME,
    VIDEO,
)
from vlmbench.reference.build import IMAGE as IMAGE_TOKEN
from vlmbench.suites._synth.encode import compressed
from vlmbench.suites._synth.questions import sample_questions
from vlmbench.suites._synth.render import render
from vlmbench.suites._synth.scene import TEST_SEED, Scene, make_image, train_scene

VALIDATION_SEED = TEST_SEED - 10**6
"""Training seeds from here on are kept for validation; training draws below."""
IMAGE = "image"
"""The kind of clip that is a picture. Videos are named by their frames, with their events where not drawn: 8 or 4x4."""
IGNORED = -100


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


class Batch(NamedTuple):
    clips: torch.Tensor
    """int64 [B], rows of the pool."""
    ids: torch.Tensor
    """int64 [B, L]."""
    labels: torch.Tensor
    """int64 [B, L]: the token itself where it belongs to an answer or ends one, else IGNORED."""
    positions: torch.Tensor
    """int64 [B, L]."""
    mask: torch.Tensor
    """bool [B, 1, L, L]: which token sees which."""
    part: torch.Tensor
    """int64 [B, L]: 0 the clip, 1 … the pairs, -1 padding."""
    types: tuple[tuple[str, ...], ...]
    """Of the questions of each row."""

    def to(self, device: torch.device | str) -> Batch:
        tensors: dict[str, Any] = {k: v.to(device) for k, v in self._asdict().items() if isinstance(v, torch.Tensor)}
        return self._replace(**tensors)


def scene_of(seed: int, kind: str) -> Scene:
    if kind == IMAGE:
        return make_image(seed)
    n_frames, _, n_events = kind.partition("x")
    return train_scene(seed, int(n_frames), int(n_events) if n_events else None)


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


def to_pixels(frames: np.ndarray) -> torch.Tensor:
    """uint8 [..., H, W, 3] to float32 [..., 3, H, W], normalised as the processor does."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in MEAN_STD)
    return (torch.from_numpy(np.array(frames)).movedim(-1, -3).float() / 255 - mean) / std


def visual_tokens(pool: Pool) -> int:
    """Placeholders of a clip in the prompt, the newline of a video included."""
    return IMAGE_TOKENS if pool.kind == IMAGE else TOKENS_PER_FRAME * pool.n_frames + 1


def make_batch(
    pool: Pool,
    clips: np.ndarray,
    tokenizer: PreTrainedTokenizerFast,
    rng: np.random.Generator,
    n_pairs: int = 12,
    span: int = 0,
    types: tuple[str, ...] | None = None,
) -> Batch:
    """These clips (rows of the pool) with up to `n_pairs` questions each, of these types (None: all).

    With `span` above the clip's frames, the position ids are those of a video of that many frames of which only these
    are shown: the positions of a long video without its length.
    """
    encode = partial(tokenizer.encode, add_special_tokens=False)
    n_visual = visual_tokens(pool)
    asked = [sample_questions(pool.scenes[clip], rng, n_pairs, types) for clip in clips]
    rows = [[(encode(q.text + ANSWER), encode(q.answer + EOS)) for q in row] for row in asked]
    width = 1 + n_visual + max(sum(len(question) + len(answer) for question, answer in row) for row in rows)
    bos, pad, visual = tokenizer.convert_tokens_to_ids([BOS, PAD, IMAGE_TOKEN if pool.kind == IMAGE else VIDEO])
    ids = torch.full((len(clips), width), pad)
    labels = torch.full((len(clips), width), IGNORED)
    positions = torch.zeros(len(clips), width, dtype=torch.long)
    part = torch.full((len(clips), width), -1)
    for b, row in enumerate(rows):
        ids[b, 0], ids[b, 1 : 1 + n_visual], part[b, : 1 + n_visual] = bos, visual, 0
        prefix = _prefix_positions(pool, clips[b], rng, span)
        positions[b, : 1 + n_visual] = prefix
        start = 1 + n_visual
        for k, (question, answer) in enumerate(row, 1):
            stop = start + len(question) + len(answer)
            ids[b, start:stop] = torch.tensor(question + answer)
            labels[b, start + len(question) : stop] = torch.tensor(answer)
            positions[b, start:stop] = prefix[-1] + 1 + torch.arange(stop - start)
            part[b, start:stop] = k
            start = stop
    asked_types = tuple(tuple(question.type for question in row) for row in asked)
    return Batch(torch.from_numpy(clips), ids, labels, positions, _visibility(part), part, asked_types)


def _prefix_positions(pool: Pool, clip: int, rng: np.random.Generator, span: int) -> torch.Tensor:
    """int64 [1 + visual tokens]: of `<bos>` and the clip."""
    n_frames, events = pool.n_frames, pool.scenes[clip].events
    if span <= n_frames or pool.kind == IMAGE:
        return torch.arange(1 + visual_tokens(pool))
    # Frames of one event stay neighbours; all other frames move apart, as blank frames between them would have it.
    loose = [t for t in range(n_frames) if not any(event.start < t < event.stop for event in events)]
    extra = np.sort(rng.integers(0, span - n_frames + 1, len(loose)))
    moved = np.arange(n_frames) + extra[np.searchsorted(loose, np.arange(n_frames), "right") - 1]
    frames = 1 + torch.from_numpy(moved)[:, None] * TOKENS_PER_FRAME + torch.arange(TOKENS_PER_FRAME)
    newline = 1 + span * TOKENS_PER_FRAME
    return torch.cat([torch.tensor([0]), frames.flatten(), torch.tensor([newline])])


def _visibility(part: torch.Tensor) -> torch.Tensor:
    """Causal; the clip is seen by all, a pair by itself; padding sees itself (a row that sees nothing would be NaN)."""
    width = part.shape[1]
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    same = (part[:, None, :] == part[:, :, None]) | (part[:, None, :] == 0)
    return (causal & same)[:, None]
