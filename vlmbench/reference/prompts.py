"""Prompts of a batch: the clip, then several question–answer pairs, each of which sees the clip and itself alone.

Every pair starts at the same position, so that it looks exactly like the one question of an inference prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerFast

from vlmbench.reference.build import (
    ANSWER,
    BOS,
    EOS,
    FRAME,
    IMAGE,
    PAD,
    PAIR,
    PATCH,
    QWEN,
    TIME_STEP,
    TOKENS_PER_UNIT,
    VIDEO,
    VISION_END,
    VISION_START,
)
from vlmbench.suites._synth.captions import EVERY, WORDS
from vlmbench.suites._synth.questions import Question

IGNORED = -100
_SIDE = FRAME // PATCH // 2
_ROW = FRAME // PATCH
LLAVA_NEWLINES = (*[False] * _ROW**2, *([False] * _ROW + [True]) * _ROW)
"""Of the tokens of one picture, which are not pooled: the whole, then its only tile with a newline after each row."""
LLAVA_IMAGE_TOKENS = len(LLAVA_NEWLINES)


class Batch(NamedTuple):
    ids: torch.Tensor
    """int64 [B, L]."""
    labels: torch.Tensor
    """int64 [B, L]: the token itself where it belongs to an answer or ends one, else IGNORED."""
    positions: torch.Tensor
    """int64 [B, L], or [3, B, L] (time, height, width) for Qwen2.5-VL."""
    mask: torch.Tensor
    """bool [B, 1, L, L]: which token sees which."""
    part: torch.Tensor
    """int64 [B, L]: 0 the clip, 1 … the pairs, -1 padding."""
    visual: torch.Tensor
    """bool [L]: where the clip's features go, the same in every row."""
    newline: torch.Tensor
    """bool [L]: where LLaVA-OneVision's learned newline goes."""
    types: tuple[tuple[str, ...], ...]
    """Of the questions of each row."""

    def answer_weights(self, by_type: Mapping[str, float]) -> torch.Tensor:
        """[answer tokens of the batch]: what is given for the type of its question, else 1."""
        weights = torch.ones(self.part.shape)
        for b, types in enumerate(self.types):
            for k, kind in enumerate(types, 1):
                weights[b][self.part[b].cpu() == k] = by_type.get(kind, 1.0)
        return weights[:, 1:].to(self.labels.device)[self.labels[:, 1:] != IGNORED]

    def to(self, device: torch.device | str) -> Batch:
        tensors: dict[str, Any] = {k: v.to(device) for k, v in self._asdict().items() if isinstance(v, torch.Tensor)}
        return self._replace(**tensors)


class Prefix(NamedTuple):
    """All before the questions, for one family and length."""

    tokens: tuple[str, ...]
    """Special tokens; the blank where a word of a caption goes."""
    unit: tuple[int, ...]
    """Of each token: the unit with which it moves; -1 before the first, and the number of units behind the last."""
    visual: tuple[bool, ...]
    newline: tuple[bool, ...]
    positions: torch.Tensor
    """int64 [axes, P], without gaps."""
    next: int
    """Position of the first token of a question."""
    step: int
    """By how much a blank unit in between moves what follows; with captions a blank medium and its caption."""
    moves: torch.Tensor
    """bool [axes, P]: on which axes a token moves with its unit; what follows the clip moves on all."""


def video_prefix(model: str, n_units: int, captions: bool) -> Prefix:
    """A video of so many units, one medium, or with captions one for every EVERY frames of it."""
    qwen = model == QWEN
    per_medium = (EVERY // (PAIR if qwen else 1)) if captions else n_units
    tokens, unit, visual = [BOS], [-1], [False]
    places, cursor, newlines = [(0, 0, 0)], 1, set[int]()
    for first in range(0, n_units, per_medium):
        units = range(first, min(first + per_medium, n_units))
        if qwen:
            _text([VISION_START], first if captions else -1, tokens, unit, visual)
            places.append((cursor,) * 3)
            cursor += 1
        for u in units:
            for token in range(TOKENS_PER_UNIT):
                tokens.append(VIDEO)
                unit.append(u)
                visual.append(True)
                if qwen:
                    row, column = divmod(token, _SIDE)
                    places.append((cursor + TIME_STEP * (u - first), cursor + row, cursor + column))
                else:
                    places.append((cursor + (u - first) * TOKENS_PER_UNIT + token,) * 3)
        closing = [VISION_END if qwen else VIDEO, *([""] * WORDS if captions else [])]
        cursor = max(max(place) for place in places) + 1
        _text(closing, units[-1] if captions else n_units, tokens, unit, visual)
        newlines.add(len(tokens) - len(closing))
        places.extend((cursor + i,) * 3 for i in range(len(closing)))
        cursor += len(closing)
    axes = 3 if qwen else 1
    positions = torch.tensor(places).T[:axes].contiguous()
    moves = torch.ones_like(positions, dtype=torch.bool)
    if qwen and not captions:  # inside one medium the time axis alone moves
        moves[1:, torch.tensor(visual)] = False
    # What one more unit, or with captions one more medium and its caption, adds to the positions of all that follows.
    if captions:
        step = (2 + _SIDE if qwen else per_medium * TOKENS_PER_UNIT + 1) + WORDS
    else:
        step = TIME_STEP if qwen else TOKENS_PER_UNIT
    newline = tuple(i in newlines and not qwen for i in range(len(tokens)))
    return Prefix(tuple(tokens), tuple(unit), tuple(visual), newline, positions, cursor, step, moves)


def image_prefix(model: str) -> Prefix:
    """One picture."""
    if model == QWEN:
        whole = video_prefix(model, 1, captions=False)
        return whole._replace(tokens=tuple(IMAGE if token == VIDEO else token for token in whole.tokens))
    n = 1 + LLAVA_IMAGE_TOKENS
    positions = torch.arange(n)[None]
    newline = (False, *LLAVA_NEWLINES)
    visual = tuple(i > 0 and not is_newline for i, is_newline in enumerate(newline))
    moves = torch.ones_like(positions, dtype=torch.bool)
    return Prefix((BOS, *[IMAGE] * (n - 1)), (-1, *[0] * (n - 1)), visual, newline, positions, n, 0, moves)


def make_batch(
    prefix: Prefix,
    asked: Sequence[Sequence[Question]],
    tokenizer: PreTrainedTokenizerFast,
    captions: Sequence[Sequence[str]] | None = None,
    blanks: torch.Tensor | None = None,
) -> Batch:
    """One row for each clip with the questions asked about it.

    blanks: int64 [B, units + 1], how many unseen blank units (with captions: media) lie before each unit and before the end.
    The positions are then those of the longer video of which only these units are shown: far positions without the length.
    """
    encode = partial(tokenizer.encode, add_special_tokens=False)
    rows = [[(encode(q.text + ANSWER), encode(q.answer + EOS)) for q in row] for row in asked]
    n, size = len(prefix.tokens), len(rows)
    width = n + max(sum(len(question) + len(answer) for question, answer in row) for row in rows)
    axes = prefix.positions.shape[0]
    ids = torch.full((size, width), tokenizer.convert_tokens_to_ids(PAD))
    labels = torch.full((size, width), IGNORED)
    positions = torch.zeros(axes, size, width, dtype=torch.long)
    part = torch.full((size, width), -1)
    ids[:, :n] = torch.tensor([tokenizer.convert_tokens_to_ids(token or PAD) for token in prefix.tokens])
    part[:, :n] = 0
    moved = _moved(prefix, blanks, size)
    positions[:, :, :n], after = prefix.positions[:, None] + moved[0], prefix.next + moved[1]
    words = torch.tensor([not token for token in prefix.tokens])
    for b, row in enumerate(rows):
        if captions is not None:
            ids[b, :n][words] = torch.tensor(encode(" ".join(captions[b])))
        start = n
        for k, (question, answer) in enumerate(row, 1):
            stop = start + len(question) + len(answer)
            ids[b, start:stop] = torch.tensor(question + answer)
            labels[b, start + len(question) : stop] = torch.tensor(answer)
            positions[:, b, start:stop] = after[b] + torch.arange(stop - start)
            part[b, start:stop] = k
            start = stop
    visual, newline = torch.zeros(2, width, dtype=torch.bool)
    visual[:n], newline[:n] = torch.tensor(prefix.visual), torch.tensor(prefix.newline)
    types = tuple(tuple(question.type for question in row) for row in asked)
    return Batch(ids, labels, positions if axes > 1 else positions[0], visibility(part), part, visual, newline, types)


def _moved(prefix: Prefix, blanks: torch.Tensor | None, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """By how much each token of the prefix is moved, [axes, B, P], and what follows it, [B]."""
    if blanks is None:
        return torch.zeros(1, size, 1, dtype=torch.long), torch.zeros(size, dtype=torch.long)
    before = blanks.cumsum(1) * prefix.step  # [B, units + 1]
    unit = torch.tensor(prefix.unit)
    here = torch.where(unit < 0, 0, before[:, unit.clamp(0)])  # [B, P]
    return prefix.moves[:, None] * here, before[:, -1]


def visibility(part: torch.Tensor) -> torch.Tensor:
    """bool [B, 1, L, L]. Causal; the clip is seen by all, a pair by itself.

    Padding sees itself: a row that sees nothing would be NaN.
    """
    width = part.shape[1]
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    same = (part[:, None, :] == part[:, :, None]) | (part[:, None, :] == 0)
    return (causal & same)[:, None]


def _text(added: Sequence[str], unit: int, tokens: list[str], units: list[int], visual: list[bool]) -> None:
    tokens.extend(added)
    units.extend([unit] * len(added))
    visual.extend([False] * len(added))
