"""Turbo behind the tower: which visual tokens the language model still reads, and with what features.

A merged token's placeholder is dropped after all positions were made for the full grid; the token that it went into keeps its
own position. Numbers of tokens follow from grids, choices from the tower's pass or from the features themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from vlmbench.kernels.token_merge import fold
from vlmbench.layout import VISUAL, Prompt, Span

if TYPE_CHECKING:
    from vlmbench.turbo_plan import Rule
    from vlmbench.turbo_tower import Call
    from vlmbench.turbo_vision import Seen


class Medium(NamedTuple):
    """A medium of the prompt and the tower's pass over it."""

    spans: list[Span]
    call: Call
    number: int
    """Of this medium in that pass."""

    @property
    def frames(self) -> int:
        return len(self.spans)

    @property
    def where(self) -> Tensor:
        """``[T, n]``: the places of its tokens in the prompt; text may stand between frames."""
        return torch.tensor([span.start for span in self.spans])[:, None] + torch.arange(self.per_frame)

    @property
    def per_frame(self) -> int:
        return len(self.spans[0])

    @property
    def left(self) -> int:
        """Tokens of a frame that are kept: the share that the plan leaves, one at least."""
        kept, there = self.call.asked.kept(self.number)
        return max(1, (2 * self.per_frame * kept + there) // (2 * there))


class Kept(NamedTuple):
    """Tokens of the prompt to keep, and, where they change, their features ``[n, C]`` in that order."""

    where: Tensor
    features: Tensor | None


def shorten(prompt: Prompt, seen: Seen, rule: Rule, *, temporal: bool) -> tuple[Prompt, list[int]]:
    """The prompt without merged tokens, and the indices kept in it."""
    embeds = prompt.embeds
    changed = embeds.clone()
    kept = [prompt.layout.indices("text", "separator")]
    for medium in media_of(prompt, seen):
        found = _kept(embeds[0], medium, seen, rule, temporal)
        kept.append(found.where.cpu())
        if found.features is not None:
            changed[0, found.where.to(embeds.device)] = found.features.to(embeds.dtype)
    keep = torch.cat(kept).sort().values
    whole = Prompt(changed, prompt.positions, prompt.layout, prompt.next_position, prompt.extras)
    return whole.select(keep), keep.tolist()


def media_of(prompt: Prompt, seen: Seen) -> Iterator[Medium]:
    """Media in prompt order; a tower takes all pictures before all videos."""
    queues: dict[str, list[tuple[Call, int]]] = {"image": [], "video": []}
    for call in seen.calls:
        # A LLaVA's pass over pictures is over their crops: they are all shortened alike.
        queues[call.kind] += [(call, number) for number in range(len(call.plan.media))]
    visual = (span for span in prompt.layout if span.kind in VISUAL)
    for _, group in groupby(visual, key=lambda span: span.media):
        spans = list(group)
        queue = queues[spans[0].kind]
        alike = spans[0].kind == "image" and not seen.units_are_tokens
        yield Medium(spans, *(queue[0] if alike else queue.pop(0)))


def _kept(embeds: Tensor, medium: Medium, seen: Seen, rule: Rule, temporal: bool) -> Kept:
    video = medium.spans[0].kind == "video"
    if medium.call.keep.is_meta:  # `vlmbench plan`: numbers alone
        return Kept(_stand_in(medium, temporal and video), None)
    if temporal and video:
        return merge_in_time(embeds, medium, rule)
    if seen.units_are_tokens:
        return Kept(surviving_tokens(medium), None)
    return fold_frames(embeds, medium, rule) if video else fold_picture(embeds, medium, rule, seen.newline)


def surviving_tokens(medium: Medium) -> Tensor:
    """Of a tower whose units are tokens: the others hold copies of these since they were unmerged."""
    call = medium.call
    before = call.plan.media[: medium.number]
    first = sum(each.frames * each.units for each in before)
    units, protected = call.plan.media[medium.number].units, call.plan.protected
    own = call.keep.cpu().sort().values - first
    own = own[(own >= 0) & (own < medium.frames * units) & (own % units >= protected)]  # without class tokens
    raster = torch.arange(units) - protected if call.raster is None else torch.tensor(call.raster[medium.number])
    return medium.where[own // units, raster[own % units]]


def fold_frames(embeds: Tensor, medium: Medium, rule: Rule) -> Kept:
    """Behind a pooling: tokens of a frame merge by their own features, each with mass 1 since it covers an equal area."""
    x = _frames(embeds, medium)
    shared = medium.frames if rule.shared else 1
    importance = pooled_importance(medium, rule)
    index, features = _folded(x, importance, x.shape[1] - medium.left, rule, medium.call, shared)
    return Kept(medium.where.to(index.device).gather(1, index).flatten(), features.flatten(0, 1))


def fold_picture(embeds: Tensor, medium: Medium, rule: Rule, newline: Tensor | None) -> Kept:
    """A LLaVA's picture: the base view and then the rows of the fine one, as many tokens at a time as the tower has.

    By similarity alone, since packing leaves no grid to pool importances on. Newlines stay.
    """
    span = medium.spans[0]
    x = embeds[span.start : span.stop]
    is_newline = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    if newline is not None and x.shape[1]:
        is_newline = (x == newline.to(x)).all(-1)
    kept, there = medium.call.asked.kept(medium.number)
    indices, features = [is_newline.nonzero().flatten()], [x[is_newline]]
    for part in (~is_newline).nonzero().flatten().split(there):
        n = len(part)
        left = max(1, (2 * n * kept + there) // (2 * there))
        index, merged = _folded(x[part][None], None, n - left, rule, medium.call, 1)
        indices.append(part[index[0]])
        features.append(merged[0])
    return Kept(span.start + torch.cat(indices), torch.cat(features))


def _folded(
    x: Tensor, importance: Tensor | None, remove: int, rule: Rule, call: Call, frames: int
) -> tuple[Tensor, Tensor]:
    """(``[G, left]`` positions, ``[G, left, C]``) of ``x [G, n, C]``."""
    metric = normalize(x.float(), dim=-1)
    mass = torch.ones(x.shape[:2], dtype=metric.dtype, device=x.device)
    weight = 0.0 if importance is None else rule.weight(call.plan.used)
    alone = importance is not None and rule.score == "value"
    found = fold(x, mass, metric, importance, remove, weight=weight, redundancy=not alone, frames=frames)
    return found.keep, found.x


def pooled_importance(medium: Medium, rule: Rule) -> Tensor | None:
    """``[T, n]``: the last used block's importance of each language token; adds up to 1 in a frame, or to n if normalised."""
    call = medium.call
    if call.importance is None:
        return None
    plan = call.plan
    before = sum(each.frames * each.units for each in plan.media[: medium.number])
    units = plan.media[medium.number].units
    own = call.importance[before : before + medium.frames * units].view(medium.frames, units).float()
    own = own[:, plan.protected :]
    if call.raster is not None:
        raster = torch.tensor(call.raster[medium.number], device=own.device)
        found = torch.empty_like(own)
        found[:, raster] = own
    else:
        side = int(own.shape[1] ** 0.5)
        grid = own.view(medium.frames, 1, side, side)
        found = interpolate(grid, size=medium.spans[0].grid, mode="bilinear").flatten(1)
    found = found / found.sum(-1, keepdim=True)
    return found * found.shape[1] if rule.normalise else found


def merge_in_time(embeds: Tensor, medium: Medium, rule: Rule) -> Kept:
    """Tokens of frame t go into the most similar of the same or a neighbouring place in frame t - 1.

    From the second frame on every frame loses the same number, so many that the video keeps what it would keep by merging
    inside frames. A chain ends in the first token of it that was not merged itself; all of it is averaged there.
    """
    x = _frames(embeds, medium)
    frames, n, _ = x.shape
    remove = removed_in_time(medium)
    where = medium.where.flatten().to(x.device)
    if not remove:
        return Kept(where, None)
    height, width = medium.spans[0].grid or (1, n)
    h = normalize(x.float(), dim=-1)
    best, partner = _nearest_before(h, height, width)  # [T - 1, n]
    importance = pooled_importance(medium, rule)
    score = best if rule.score != "value" or importance is None else torch.zeros_like(best)
    if importance is not None:
        score = score - (rule.weight(medium.call.plan.used) if rule.score != "value" else 1.0) * importance[1:]
    merged = torch.zeros_like(score, dtype=torch.bool)
    merged.scatter_(1, score.argsort(dim=-1, descending=True, stable=True)[:, :remove], True)
    total, mass = x.float(), torch.ones(frames, n, device=x.device)
    sums = list(total.unbind())
    masses = list(mass.unbind())
    places = torch.arange(n, device=x.device)
    for t in range(frames - 1, 0, -1):  # from the end, so that a chain arrives whole
        into = ((partner[t - 1] == places[:, None]) & merged[t - 1]).to(x.device, torch.float32)  # [n before, n]
        sums[t - 1] = sums[t - 1] + into @ sums[t]
        masses[t - 1] = masses[t - 1] + into @ masses[t]
    means = torch.stack(sums) / torch.stack(masses)[..., None]
    left = torch.cat([torch.ones_like(merged[:1]), ~merged])
    # As many in every frame: a sort instead of a search keeps the shape independent of the data.
    order = (~left).flatten().to(torch.int8).argsort(stable=True)[: frames * n - remove * (frames - 1)]
    return Kept(where[order], means.flatten(0, 1)[order])


def removed_in_time(medium: Medium) -> int:
    """Tokens that every frame but the first loses."""
    if medium.frames < 2:
        return 0
    total = (medium.per_frame - medium.left) * medium.frames
    return min(medium.per_frame, total // (medium.frames - 1))


def _nearest_before(h: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """(cosine, place in the frame before), each ``[T - 1, n]``, over the 3 × 3 places around; the same place wins ties."""
    _, n, _ = h.shape
    rows, columns = torch.arange(n, device=h.device) // width, torch.arange(n, device=h.device) % width
    best = partner = None
    for down, right in [(0, 0), *((a, b) for a in (-1, 0, 1) for b in (-1, 0, 1) if a or b)]:
        row, column = rows + down, columns + right
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        place = torch.where(inside, row * width + column, 0)
        similar = torch.where(inside, (h[1:] * h[:-1, place]).sum(-1), float("-inf"))
        if best is None or partner is None:
            best, partner = similar, place.expand_as(similar)
        else:
            better = similar > best
            best, partner = torch.where(better, similar, best), torch.where(better, place, partner)
    assert best is not None  # noqa: S101 (nine places were looked at)
    assert partner is not None  # noqa: S101
    return best, partner


def _frames(embeds: Tensor, medium: Medium) -> Tensor:
    """``[T, n, C]``."""
    return embeds[medium.where.to(embeds.device)]


def _stand_in(medium: Medium, temporal: bool) -> Tensor:
    """The right number of tokens, any of them."""
    n = medium.per_frame
    lost = [0, *[removed_in_time(medium)] * (medium.frames - 1)] if temporal else [n - medium.left] * medium.frames
    return torch.cat(
        [torch.arange(span.start, span.stop - less) for span, less in zip(medium.spans, lost, strict=True)]
    )
