"""What a stage will take before anyone pays for the card: FLOPs, least bytes, KV cache, peak memory and roofline time.

Nothing is loaded and nothing runs on data: shapes come from the configuration, decisions from the method's own `prepare`
on a made-up prompt, FLOPs of the language model from `vlmbench.work`, and peaks from the adapter's own code followed on
tensors without storage. A roofline time is a floor, not a forecast.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vlmbench import cost, counted
from vlmbench.cards import Card
from vlmbench.composed import parts_of
from vlmbench.errors import UsageError
from vlmbench.layout import Prompt, TokenLayout
from vlmbench.loaded import typed
from vlmbench.madeup import Shape, after_clip, bare, frames_per_unit, positions_of
from vlmbench.method import one_token
from vlmbench.models.catalogue import FRAME_TOKENS
from vlmbench.spec import joined, nearest, params_of
from vlmbench.trace import Trace

if TYPE_CHECKING:
    from vlmbench.method import Method
    from vlmbench.models.base import Inputs, ModelAdapter

COLUMNS = (
    *("model", "method", "params", "stage", "tokens", "visual_tokens", "frames", "frame_tokens", "layers", "dtype"),
    *("device", "flops", "bytes", "roofline_s", "bound", "kv_bytes", "peak_bytes", "memory_bytes", "fits"),
    *("positions", "max_positions", "note"),
)


def plan(
    model: str, method: Method, shape: Shape, card: str, dtype: torch.dtype, new_tokens: int
) -> list[dict[str, Any]]:
    """A row each for vision, prefill and one decoded token. Raises `UsageError`."""
    from vlmbench.cards import card as find

    if not method.traits.uses_model:
        raise UsageError(f"{method.name} never calls the model, so there is nothing to plan.")
    if "weights" in method.traits.takes:
        raise UsageError(
            f"{method.name} keeps weights in another form or place, which plan does not count; plan what it is joined with."
        )
    if new_tokens < 1:
        raise UsageError(f"--max-new-tokens must be at least 1, not {new_tokens}.")
    found = find(card)
    adapter = counted.model_without_storage(config_of(model), dtype)
    adapter.check_prompted()
    method.check(adapter)
    if adapter.fixed_resolution:
        own: int = adapter._tokens_per_frame  # type: ignore[attr-defined]
        shape = replace(shape, frame_tokens=FRAME_TOKENS.get(model.partition("@")[0], own))
    trace = Trace(sample_id="plan")
    less = after_clip(method, shape, frames_per_unit(adapter), trace)
    rows = stages(adapter, method, less.layout(), made_up_inputs(adapter, less), found, new_tokens, trace)
    about = {
        "model": model,
        "method": method.name,
        "params": params_of(method),
        "frames": shape.frames,
        "frame_tokens": shape.frame_tokens,
        "layers": adapter.shapes.layers,
        "dtype": str(dtype).removeprefix("torch."),
        "device": card.lower(),
    }
    return [{name: (row | about).get(name) for name in COLUMNS} for row in rows]


def stages(
    adapter: ModelAdapter,
    method: Method,
    layout: TokenLayout,
    inputs: Inputs,
    card: Card,
    new_tokens: int,
    trace: Trace | None = None,
) -> list[dict[str, Any]]:
    """The same for any prompt; `adapter` is one without storage."""
    shapes, size = adapter.shapes, adapter.dtype.itemsize
    trace = trace or Trace(sample_id="plan")
    if not method.traits.sees_vision:
        pixels = tuple(each.to("meta") for key, each in inputs.items() if key.startswith("pixel"))
        seen = counted.Stage(cost.Cost(0, 0), bytes_of(*counted.weights(adapter), *pixels))
    elif "vision" in method.traits.stages:  # what it leaves out of the tower, and of the prompt, shows in its own pass
        with method.attach(adapter) as inside:
            inside.facts |= trace.facts  # what it did to the frames
            seen = counted.vision(adapter, inputs)
        trace = inside
    else:
        seen = counted.vision(adapter, inputs)
    positions = positions_of(adapter, layout)
    whole = replace(bare(layout), positions=positions, next_position=int(positions.max()) + 1)
    prompt = method.prepare(whole, trace)
    work = method.work(prompt, shapes, trace)
    peak, left = counted.prefill_peak(adapter, _empty(adapter, prompt), new_tokens)
    # What a method does not know of its decoding counts as all of it.
    last = method.decode_work(prompt, shapes, trace, new_tokens - 2, size) or one_token(
        prompt.length + new_tokens - 1, shapes
    )
    costs = {
        "vision": (seen.cost, seen.peak_bytes),
        "prefill": (cost.prefill(work, shapes, size), peak + last.own_bytes),
        # The last of the decoded tokens, which sees most.
        "decode": (cost.decode(last, shapes, size), left + last.own_bytes),
    }
    unknown = "; ".join(filter(None, (part.unplanned(prompt.layout) for part in parts_of(method))))
    flops_per_s = card.rate(adapter.dtype)
    whole_peak = max(peak for _, peak in costs.values())
    # The first of the answer's tokens is the prefill's, the last is never fed back.
    reach = max(int(prompt.positions.max()) + 1, prompt.next_position + new_tokens - 1)
    return [
        {
            "stage": name,
            "tokens": prompt.length,
            "visual_tokens": prompt.layout.n_visual,
            "flops": one.flops,
            "bytes": one.bytes,
            "roofline_s": one.roofline_s(flops_per_s, card.bytes_per_s),
            "bound": "matrix" if one.flops / flops_per_s > one.bytes / card.bytes_per_s else "memory",
            # The last token's own keys are never needed.
            "kv_bytes": cost.kv_bytes(prompt.length + new_tokens - 1, shapes, size),
            "peak_bytes": peak,
            "memory_bytes": card.memory_bytes,
            "fits": whole_peak <= card.memory_bytes,
            "positions": reach,
            "max_positions": getattr(adapter.text.config, "max_position_embeddings", None),
            "note": trace.reason or (None if name == "vision" else unknown) or None,
        }
        for name, (one, peak) in costs.items()
    ]


def to_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows for people, and whether it fits."""
    first = rows[0]
    lines = [
        f"{first['model']}, {joined(first['method'], typed(first['params']))}, {first['tokens']} tokens "
        f"({first['visual_tokens']} visual), {first['dtype']}, on one {first['device']}:"
    ]
    for row in rows:
        lines.append(
            f"  {row['stage']:<8} {row['flops'] / 1e12:10.3f} TFLOP  {row['bytes'] / 2**30:8.3f} GiB moved at least  "
            f"{row['roofline_s']:10.4g} s at best ({row['bound']})  peak {row['peak_bytes'] / 2**30:7.2f} GiB"
        )
    peak = max(row["peak_bytes"] for row in rows)
    fits = "It fits" if first["fits"] else "It does not fit"
    lines.append(
        f"KV cache {first['kv_bytes'] / 2**30:.3f} GiB. {fits}: a peak of {peak / 1e9:.1f} GB against "
        f"{first['memory_bytes'] / 1e9:.0f} GB."
    )
    if first["max_positions"] is not None and first["positions"] > first["max_positions"]:
        lines.append(
            f"Too long for the model: it needs {first['positions']:,} positions, its configuration has "
            f"{first['max_positions']:,}; times and memory hold, answers would be worth nothing."
        )
    if first["note"]:
        lines.append(f"The method has nothing to do here: {first['note']}.")
    elif note := next(filter(None, (row["note"] for row in rows)), None):
        lines.append(f"At most: {note}.")
    return "\n".join(lines)


def config_of(model: str) -> Any:
    """The configuration of a preset (with or without ``@random``), a shipped model, a folder or a hub id.

    Raises `UsageError`.
    """
    from transformers import AutoConfig

    from vlmbench.models.catalogue import PRESETS, split_preset, suggestion
    from vlmbench.models.presets import config_of as preset_config
    from vlmbench.reference import SHIPPED

    preset = split_preset(model)
    name, params = (model, {}) if preset is None else (preset[0], preset[1].params)
    if preset is not None or name in PRESETS:
        if name not in PRESETS:
            raise UsageError(f"No preset is called {name!r} (known: {', '.join(PRESETS)}).{nearest(name, PRESETS)}")
        config = preset_config(name)
        if layers := params.get("layers"):
            if not layers.isdigit() or layers == "0" or set(params) != {"layers"}:
                raise UsageError(f"{model!r} must be {name}@random or {name}@random:layers=n with n at least 1.")
            from vlmbench.models.presets import cut

            cut(config, int(layers))
        return config
    source = str(SHIPPED.get(name, name))
    if not Path(source).is_dir() and ("/" not in name or name.startswith((".", "/"))):
        raise UsageError(f"No model is called {name!r}, and no folder has that path.{suggestion(name)}")
    offline = Path(source).is_dir() or os.environ.get("HF_HUB_OFFLINE", "") in ("1", "ON", "YES", "TRUE")
    try:
        return AutoConfig.from_pretrained(source, local_files_only=offline)
    except (OSError, ValueError) as error:
        says = str(error).strip().split("\n", 1)[0][:200].rstrip(".")
        raise UsageError(
            f"The configuration of {name!r} cannot be read ({says}); give a folder or a preset."
        ) from error


def made_up_inputs(adapter: ModelAdapter, shape: Shape) -> Inputs:
    """What the processor would hand over for a video of this shape: pixels without storage, grids with their numbers."""
    vision = adapter.vision_config
    if adapter.fixed_resolution:
        size = (1, shape.frames, 3, vision.image_size, vision.image_size)
        return {"pixel_values_videos": torch.empty(size, dtype=adapter.dtype, device="meta")}
    rows, columns = (side * vision.spatial_merge_size for side in shape.grid)
    patch = 3 * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.empty(shape.frames * rows * columns, patch, dtype=adapter.dtype, device="meta")
    return {"pixel_values_videos": pixels, "video_grid_thw": torch.tensor([[shape.frames, rows, columns]])}


def bytes_of(*tensors: torch.Tensor) -> int:
    """Bytes of tensors, shared ones once."""
    return sum({id(each): each.numel() * each.element_size() for each in tensors}.values())


def _empty(adapter: ModelAdapter, prompt: Prompt) -> Prompt:
    """The prepared prompt with embeddings and positions of the family's shape, without storage."""
    n = prompt.length
    axes = (3, 1, n) if adapter.decode_positions(0).dim() == 3 else (1, n)
    embeds = torch.empty(1, n, adapter.shapes.hidden, dtype=adapter.dtype, device="meta")
    positions = torch.empty(axes, dtype=torch.long, device="meta")
    return replace(prompt, embeds=embeds, positions=positions, extras={})
