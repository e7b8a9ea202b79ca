"""Where Turbo takes hold of a model's vision tower: its geometry, the blocks' forwards, and the exit to the full grid.

The exits of all towers assume the full grid (pooling, newlines, the window permutation), so merging never leaves one: a
tower of a LLaVA hands out every token again, a Qwen tower does so behind its 2×2 merger, which itself runs on what is left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from vlmbench.errors import UsageError
from vlmbench.turbo_parts import Blip, Parts, Qwen, Vit, widths
from vlmbench.turbo_plan import Clipped, Medium, Plan, Rule, Widths
from vlmbench.turbo_tower import Call, Placed

if TYPE_CHECKING:
    from vlmbench.models.base import ModelAdapter
    from vlmbench.patch import Patcher
    from vlmbench.trace import Trace

Reader = Literal["grid", "prompt", "cross-attention"]
LLAVAS = frozenset({"llava", "llava_15", "llava_next_video"})
REMEMBERED = 4
"""Plans with their index tensors that are kept from sample to sample; they depend on sizes alone."""


@dataclass
class Seen:
    """What the tower did for one sample, in the order of its passes."""

    widths: Widths
    units_are_tokens: bool
    rule: Rule
    newline: Tensor | None = None
    """LLaVA's learned newline, which stands among a picture's tokens and is never merged."""
    calls: list[Call] = field(default_factory=list)

    @property
    def acts(self) -> bool:
        return any(call.plan.acts for call in self.calls)

    def note(self, trace: Trace) -> None:
        """Into the trace: tokens after each block, FLOPs, and the tokens of the tower whose place is still taken."""
        plans = [call.plan for call in self.calls]
        trace.facts["vision"] = {
            "tokens": [sum(each) for each in zip(*(plan.tokens for plan in plans), strict=True)],
            "flops": sum(plan.flops(self.widths) for plan in plans),
            "dense_flops": sum(plan.flops(self.widths, dense=True) for plan in plans),
        }
        if clipped := [tuple(each) for call in self.calls for each in call.asked.clipped]:
            trace.facts["clipped"] = [dict(zip(Clipped._fields, each, strict=True)) for each in clipped]
        if not any(call.keep.is_meta for call in self.calls):
            trace.kept["vision"] = [unit for first, call in self._numbered() for unit in call.kept_in_raster(first)]

    def _numbered(self) -> list[tuple[int, Call]]:
        """Passes with the number of their first unit that is no class token."""
        found, first = [], 0
        for call in self.calls:
            found.append((first, call))
            first += len(call.into) - call.plan.protected * sum(medium.frames for medium in call.plan.media)
        return found


@dataclass(frozen=True)
class Tower:
    """A model's tower as Turbo sees it."""

    parts: type[Parts]
    blocks: Any
    unit: int
    protected: int
    used: int
    whole_frames: frozenset[int]
    tokens: int | None
    """Of a picture; None where that depends on its size."""
    visual: Any = None
    """Of Qwen: the module with the merger."""
    window: int | None = None
    """Units along a window's side."""
    reader: Reader = "grid"
    """How what comes out of a ViT is read: as a whole grid that is pooled or packed, a token a patch, or by cross-attention,
    which takes any number."""

    @property
    def units_are_tokens(self) -> bool:
        """Whether the language model reads one token a unit."""
        return self.reader == "prompt" or self.visual is not None

    def widths(self) -> Widths:
        found = widths(self.parts, self.blocks[0])
        if self.visual is None:
            return found
        merger = sum(each.numel() for each in self.visual.merger.parameters() if each.dim() == 2)
        return found._replace(exit=merger)


def vit(blocks: Any, config: Any, *, class_token: bool, used: int | None = None, reader: Reader = "grid") -> Tower:
    """A CLIP or SigLIP encoder; `used` is the last block whose output is read, by default the last."""
    n = len(blocks)
    tokens = (config.image_size // config.patch_size) ** 2 + class_token
    last = n - 1 if used is None else used
    return Tower(Vit, blocks, 1, int(class_token), last, frozenset(range(n)), tokens, reader=reader)


def tower_of(adapter: ModelAdapter) -> Tower:
    """Raises `UsageError` for a family whose tower is not known here, or that reads several layers of it."""
    config = adapter.vision_config
    if adapter.name in LLAVAS:
        layer = adapter.config.vision_feature_layer
        n = len(adapter.vision_blocks)
        used = None if not isinstance(layer, int) else layer - 1 if layer >= 0 else n + layer
        if used is None or used < 0:
            raise UsageError(
                f"turbo hands out every token again at one layer of the vision tower, and this model reads "
                f"vision_feature_layer={layer}; choose a model that reads one layer behind a block."
            )
        clip = config.model_type == "clip_vision_model"
        reader: Reader = "prompt" if adapter.name == "llava_15" else "grid"
        return vit(adapter.vision_blocks, config, class_token=clip, used=used, reader=reader)
    if adapter.name == "blip":
        tower = vit(adapter.vision_blocks, config, class_token=True, reader="cross-attention")
        return replace(tower, parts=Blip)
    if adapter.name == "qwen_vl":
        blocks, merge = adapter.vision_blocks, config.spatial_merge_size
        windows = getattr(config, "window_size", None)
        whole = frozenset(range(len(blocks)) if windows is None else config.fullatt_block_indexes)
        side = None if windows is None else windows // merge // config.patch_size
        visual = adapter._vision_model()
        return Tower(Qwen, blocks, merge**2, 0, len(blocks) - 1, whole, None, visual, side)
    raise UsageError(
        f"turbo knows the vision towers of the LLaVAs, of Qwen-VL and of BLIP, not that of {adapter.name!r}, from whose "
        f"attention it could not read what a token matters; choose a model of those, or describe the tower in "
        f"vlmbench/turbo_vision.py."
    )


def windows_of(grid: tuple[int, int], side: int | None) -> tuple[tuple[int, ...], list[int]]:
    """(units in every window of one frame, the frame's raster index of every unit in window order)."""
    height, width = grid
    if side is None:
        return (height * width,), list(range(height * width))
    sizes, order = [], []
    for top in range(0, height, side):
        for start in range(0, width, side):
            window = [
                row * width + column
                for row in range(top, min(top + side, height))
                for column in range(start, min(start + side, width))
            ]
            sizes.append(len(window))
            order += window
    return tuple(sizes), order


class Plans:
    """The last few plans with their index tensors, found by what they depend on."""

    def __init__(self, tower: Tower, rule: Rule, still: frozenset[str] = frozenset()) -> None:
        """Media of a kind in `still` are left whole by the tower: they are shortened behind it."""
        self.tower, self.rule, self.still = tower, rule, still
        self._known: dict[Any, Placed] = {}

    def of(self, media: tuple[Medium, ...], kind: str, device: torch.device) -> Placed:
        """Raises `ValueError` when not one token of a picture would be left."""
        key = (media, kind in self.still, device)
        if key not in self._known:
            while len(self._known) >= REMEMBERED:
                del self._known[next(iter(self._known))]
            asked = self.plan(media)
            asked.check()
            none = replace(self.rule, schedule=(0,) * len(self.rule.schedule))
            self._known[key] = Placed(replace(asked, rule=none) if kind in self.still else asked, device, asked)
        return self._known[key]

    def plan(self, media: tuple[Medium, ...]) -> Plan:
        tower = self.tower
        return Plan(self.rule, media, tower.unit, tower.protected, len(tower.blocks), tower.used, tower.whole_frames)


def watch(
    patch: Patcher, tower: Tower, plans: Plans, begin: Callable[[Call], None], *, report: bool, drop: bool
) -> None:
    """Replace the forwards of the tower's blocks. `begin` gets every pass as it begins.

    With `drop` a tower that is read by cross-attention hands out merged tokens alone; others are shortened behind it.
    """
    if tower.reader == "cross-attention":
        watch_vit(patch, tower, plans, begin, lambda: "image", merged=drop)
        return
    kind = "image"

    def entered(name: str, stock: Any) -> Callable[..., Any]:
        def features(*args: Any, **kwargs: Any) -> Any:
            nonlocal kind
            kind = name
            return stock(*args, **kwargs)

        return features

    core = patch.adapter.model.model
    # A family that shows a video as pictures says itself which is which.
    owner, names = (core, "get_{}_features") if hasattr(core, "get_video_features") else (patch.adapter, "encode_{}")
    for each in ("image", "video"):
        name = names.format(each)
        patch.attr(owner, name, entered(each, getattr(owner, name)))
    if tower.visual is not None:
        watch_qwen(patch, tower, plans, begin, lambda: kind, report=report)
    else:
        watch_vit(patch, tower, plans, begin, lambda: kind, report=report)


def watch_vit(
    patch: Patcher,
    tower: Tower,
    plans: Plans,
    begin: Callable[[Call], None],
    kind: Callable[[], str],
    *,
    report: bool = False,
    merged: bool = False,
) -> None:
    call: Call | None = None

    def forward_of(index: int) -> Callable[..., Tensor]:
        def forward(hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Tensor:
            nonlocal call
            if attention_mask is not None:
                raise ValueError("turbo cannot merge in a padded batch of pictures: give it pictures of one size")
            count, n = hidden_states.shape[:2]
            rows = hidden_states.flatten(0, 1)
            if index == 0:
                # Where tokens are units, every picture is a medium of its own behind the tower.
                apart = tower.units_are_tokens and kind() == "image"
                media = (Medium(1, (n,)),) * count if apart else (Medium(count, (n,)),)
                placed = plans.of(media, kind(), rows.device)
                call = Call(placed, kind(), rows, None, None)
                begin(call)
            assert call is not None  # noqa: S101 (block 0 comes first)
            rows = call.through(tower.parts, tower.blocks[index], index, rows, report=report and index == tower.used)
            if index == tower.used and not merged:
                rows = call.unmerge(rows)
            return rows.unflatten(0, (count, -1))

        return forward

    for index in range(tower.used + 1):  # what comes behind is read by nobody
        patch.forward(tower.blocks[index], forward_of(index))


def watch_qwen(
    patch: Patcher,
    tower: Tower,
    plans: Plans,
    begin: Callable[[Call], None],
    kind: Callable[[], str],
    *,
    report: bool,
) -> None:
    call: Call | None = None
    grids: list[list[int]] = []
    side = patch.adapter.vision_config.spatial_merge_size

    def enter(module: Any, args: Any, kwargs: Any) -> None:
        nonlocal grids
        grids = (kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]).tolist()

    def forward_of(index: int) -> Callable[..., Tensor]:
        def forward(hidden_states: Tensor, *_: Any, position_embeddings: Any = None, **__: Any) -> Tensor:
            nonlocal call
            if index == 0:
                shapes = [(frames, *windows_of((h // side, w // side), tower.window)) for frames, h, w in grids]
                media = tuple(Medium(frames, sizes) for frames, sizes, _ in shapes)
                placed = plans.of(media, kind(), hidden_states.device)
                raster = [order for _, _, order in shapes]
                call = Call(placed, kind(), hidden_states, position_embeddings, raster)
                begin(call)
            assert call is not None  # noqa: S101 (block 0 comes first)
            last = report and index == tower.used
            return call.through(tower.parts, tower.blocks[index], index, hidden_states, report=last)

        return forward

    stock = tower.visual.merger.forward

    def merger(x: Tensor) -> Tensor:
        assert call is not None  # noqa: S101 (the blocks come first)
        return call.unmerge(stock(x))

    patch.pre(tower.visual, enter)
    for index, block in enumerate(tower.blocks):
        patch.forward(block, forward_of(index))
    patch.forward(tower.visual.merger, merger)
