"""Turbo inside a vision tower: attention with mass, merging between attention and MLP, and the way back to the full grid.

One pass of a tower is a `Call`. It begins at the first block and ends at the last one whose output is read; all of its state
lives in it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface

from vlmbench.kernels.token_merge import Importance, attention, fold, match, merge, unit_metric
from vlmbench.turbo_parts import Heads, Parts, Place
from vlmbench.turbo_plan import Plan


class _Bucket(NamedTuple):
    """Groups of one medium that lose the same number of units."""

    old: Tensor
    """``[frames · groups, n]``: packed units before."""
    new: Tensor
    """``[frames · groups, n - r]``: after."""
    merged: int
    frames: int


class Placed:
    """A plan's index tensors on a device, each made once; they depend on sizes alone."""

    def __init__(self, plan: Plan, device: torch.device, asked: Plan) -> None:
        """`asked` is the plan by whose numbers the media are shortened, here or behind the tower."""
        self.plan, self.device, self.asked = plan, device, asked
        self._chunks: dict[Any, list[Tensor | None]] = {}
        self._buckets: dict[int, list[_Bucket]] = {}

    def chunks(self, block: int) -> list[Tensor | None]:
        """``[chunks, length]`` rows of every chunk of attention of one length; None for all rows as they stand."""
        plan = self.plan
        whole = block in plan.whole_frames
        sizes = tuple(plan.step(i, block).before for i in range(len(plan.media)))
        if (whole, sizes) not in self._chunks:
            by_length: dict[int, list[Tensor]] = {}
            for medium, first, groups in zip(plan.media, self._firsts(sizes), sizes, strict=True):
                parts = (sum(groups),) if whole else groups
                for length in dict.fromkeys(parts):
                    by_length.setdefault(length, []).append(_positions(first, medium.frames, parts, length))
            orders = [torch.cat(each) for each in by_length.values()]
            rows = [(order[..., None] * plan.unit + torch.arange(plan.unit)).flatten(1) for order in orders]
            as_they_stand = len(rows) == 1 and bool((rows[0].flatten().diff() == 1).all())
            self._chunks[whole, sizes] = [None] if as_they_stand else [each.to(self.device) for each in rows]
        return self._chunks[whole, sizes]

    def buckets(self, block: int) -> list[_Bucket]:
        if block not in self._buckets:
            plan = self.plan
            steps = [plan.step(i, block) for i in range(len(plan.media))]
            olds, news = (self._firsts(tuple(sizes)) for sizes in ([s.before for s in steps], [s.after for s in steps]))
            found = []
            for medium, step, old, new in zip(plan.media, steps, olds, news, strict=True):
                kinds = list(zip(step.before, step.merged, strict=True))
                for kind in dict.fromkeys(kinds):
                    chosen = [i for i, other in enumerate(kinds) if other == kind]
                    places = (
                        _positions(old, medium.frames, step.before, kind[0], chosen).to(self.device),
                        _positions(new, medium.frames, step.after, kind[0] - kind[1], chosen).to(self.device),
                    )
                    found.append(_Bucket(*places, kind[1], medium.frames))
            self._buckets[block] = found
        return self._buckets[block]

    def frames(self, block: int) -> int:
        """Frames of all media: how many chunks a block of whole frames attends over."""
        return sum(medium.frames for medium in self.plan.media)

    def _firsts(self, sizes: tuple[tuple[int, ...], ...]) -> list[int]:
        """The first packed unit of every medium."""
        found, cursor = [], 0
        for medium, groups in zip(self.plan.media, sizes, strict=True):
            found.append(cursor)
            cursor += medium.frames * sum(groups)
        return found


def _positions(first: int, frames: int, sizes: tuple[int, ...], length: int, chosen: list[int] | None = None) -> Tensor:
    """``[frames · groups, length]``: packed units of the chosen groups (by default all of that length), frame by frame."""
    offsets = [sum(sizes[:i]) for i in range(len(sizes))] if len(sizes) < 64 else _cumulative(sizes)
    picked = [i for i, size in enumerate(sizes) if size == length] if chosen is None else chosen
    starts = torch.tensor([offsets[i] for i in picked])
    frame = first + torch.arange(frames) * sum(sizes)
    return (frame[:, None, None] + starts[:, None] + torch.arange(length)).flatten(0, 1)


def _cumulative(sizes: tuple[int, ...]) -> list[int]:
    return (torch.tensor(sizes).cumsum(0) - torch.tensor(sizes)).tolist()


class Call:
    """One pass of a tower: masses and who went where, from block to block."""

    def __init__(self, placed: Placed, kind: str, rows: Tensor, place: Place, raster: list[list[int]] | None) -> None:
        self.plan, self.asked, self._placed, self.kind, self.place = placed.plan, placed.asked, placed, kind, place
        self.raster = raster
        """Of a tower whose units are the language model's tokens: for every medium, the token of each unit of a frame."""
        units = rows.shape[0] // self.plan.unit
        self.keep = self.into = torch.arange(units, device=rows.device)
        """keep ``[U']``: the original unit whose place each unit has. into ``[U]``: where each original unit is now."""
        self.mass: Tensor | None = None
        self.importance: Tensor | None = None
        """``[U]``: of each original unit in the last block that counts, on any scale; None unless wanted."""

    def through(self, parts: type[Parts], block: Any, index: int, x: Tensor, *, report: bool) -> Tensor:
        """Rows ``[N, C]`` through one block; fewer come out where it merges. `report` keeps importances for later."""
        plan = self.plan
        first_norm, second_norm = parts.norms(block)
        heads = parts.heads(block, first_norm(x), self.place)
        merging = plan.merges(index)
        wanted = plan.rule.values and (merging or report)
        mixed, importance = self._attend(parts, block, index, heads, wanted)
        x = x + parts.out(block)(mixed)
        if importance is not None and report:
            each = importance if self.mass is None else importance / self.mass
            self.importance = each[self.into]
        if merging:
            x = self._merge(index, x, heads.unrotated, importance)
        return x + block.mlp(second_norm(x))

    def _attend(
        self, parts: type[Parts], block: Any, index: int, heads: Heads, wanted: bool
    ) -> tuple[Tensor, Tensor | None]:
        """(``[N, C]``, importance of units ``[U]`` or None)."""
        plan, rule = self.plan, self.plan.rule
        rows = heads.q.shape[0]
        log_mass = None
        if self.mass is not None and rule.proportional:
            log_mass = self.mass.log().repeat_interleave(plan.unit)
        kind: Importance | None = ("class" if plan.protected else "column") if wanted else None
        dense = partial(_dense, parts.attention(block), scale=parts.scale(block))
        out = torch.empty_like(heads.v)
        found = torch.empty(rows, dtype=_precise(heads.v.dtype), device=out.device) if wanted else None
        for order in self._placed.chunks(index):
            whole = order is None
            count = self._chunk_count(index) if order is None else order.shape[0]
            q, k, v = (
                (t.unflatten(0, (count, -1)) if order is None else t[order]).transpose(1, 2) for t in heads[:3]
            )  # each [chunks, H, length, D]
            bias = None if log_mass is None else log_mass.view(count, -1) if order is None else log_mass[order]
            attended = attention(
                q,
                k,
                v,
                scale=parts.scale(block),
                log_mass=bias,
                importance=kind,
                dense=dense,
            )
            mixed = attended.out.transpose(1, 2)
            if whole:
                out = mixed.flatten(0, 1)
            else:
                out[order] = mixed.to(out.dtype)
            if found is not None and attended.importance is not None:
                values = attended.importance * (q.shape[2] if rule.normalise else 1)
                if whole:
                    found = values.flatten()
                else:
                    found[order] = values
        if found is not None:
            by_unit = found.view(-1, plan.unit)
            # Attention adds up over a unit's rows; in multiples of the mean unit that is the mean over its rows.
            found = by_unit.mean(1) if rule.normalise else by_unit.sum(1)
        return out.reshape(rows, -1), found

    def _chunk_count(self, index: int) -> int:
        plan = self.plan
        if index in plan.whole_frames:
            return self._placed.frames(index)
        return sum(medium.frames * len(medium.groups) for medium in plan.media)

    def _merge(self, index: int, x: Tensor, keys: Tensor, importance: Tensor | None) -> Tensor:
        plan, rule, unit = self.plan, self.plan.rule, self.plan.unit
        units = x.view(-1, unit * x.shape[1])
        metric = unit_metric(keys.view(-1, unit, *keys.shape[1:]))
        mass = torch.ones(len(units), dtype=_precise(x.dtype), device=x.device) if self.mass is None else self.mass
        buckets = self._placed.buckets(index)
        left = sum(bucket.new.numel() for bucket in buckets)
        new_units, new_mass = units.new_empty(left, units.shape[1]), mass.new_empty(left)
        chosen, moved = self.keep.new_empty(left), self.keep.new_empty(len(units))
        for bucket in buckets:
            old = bucket.old
            options: dict[str, Any] = {
                "weight": rule.weight(index),
                "class_token": bool(plan.protected),
                "redundancy": rule.score != "value",
                "frames": bucket.frames if rule.shared and self.kind == "video" else 1,
            }
            about = (metric[old], None if importance is None else importance[old], bucket.merged)
            if rule.once:
                merged, masses, keep, into = fold(units[old], mass[old], *about, **options)
            else:
                decision = match(*about, **options)
                (merged, masses), keep, into = merge(units[old], mass[old], decision), decision.keep, decision.into
            new_units[bucket.new], new_mass[bucket.new] = merged, masses
            chosen[bucket.new] = old.gather(1, keep)
            moved[old] = bucket.new.gather(1, into)
        self.mass, self.keep, self.into = new_mass, self.keep[chosen], moved[self.into]
        if self.place is not None:  # a merged unit has the rotation of the one that it went into
            cos, sin = (each.view(-1, unit, each.shape[-1])[chosen].flatten(0, 1) for each in self.place)
            self.place = cos, sin
        return new_units.view(-1, x.shape[1])

    def kept_in_raster(self, first: int = 0) -> list[int]:
        """Original units whose place is still taken, sorted, counted in raster order from `first`, without class tokens."""
        packed = self.keep.cpu().sort().values
        if self.raster is None:
            units, protected = self.plan.media[0].units, self.plan.protected  # every picture has as many
            frame, place = packed // units, packed % units - protected
            return (first + frame * (units - protected) + place)[place >= 0].tolist()
        found, start = [], 0
        for medium, order in zip(self.plan.media, self.raster, strict=True):
            units = medium.units
            own = packed[(packed >= start) & (packed < start + medium.frames * units)] - start
            found.append((first + start + own // units * units + torch.tensor(order)[own % units]).sort().values)
            start += medium.frames * units
        return torch.cat(found).tolist()

    def unmerge(self, x: Tensor) -> Tensor:
        """Rows of units ``[U' · q, C]`` (or of their outputs ``[U', C]``) back to every original unit."""
        by_unit = x.view(len(self.keep), -1)
        return by_unit[self.into].view(-1, x.shape[-1])


def _dense(module: Any, q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    """The tower's own kernel, as long as no token stands for several."""
    name = module.config._attn_implementation
    attend: Callable[..., Any] = _eager if name == "eager" else AttentionInterface()[name]
    out, _ = attend(module, q, k, v, attention_mask=None, scaling=scale, dropout=0.0, is_causal=False)
    return out.transpose(1, 2)


def _eager(module: Any, q: Tensor, k: Tensor, v: Tensor, *, scaling: float, **_: Any) -> tuple[Tensor, None]:
    scores = (q @ k.transpose(-1, -2) * scaling).softmax(-1, dtype=torch.float32).to(q.dtype)
    return (scores @ v).transpose(1, 2), None


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
