"""Which slots of MemVP's memory fire for which question: numbers of one model, and the picture of all that are stored."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vlmbench.memvp_prompt import units_of
from vlmbench.memvp_results import Row, stored
from vlmbench.memvp_train import frozen
from vlmbench.patch import Patcher
from vlmbench.suites._synth.scene import PLACES, make_image

if TYPE_CHECKING:
    from vlmbench.memvp_data import Question
    from vlmbench.memvp_learner import MemoryLearner
    from vlmbench.suite import Sample

PICTURE = "memvp.png"
BATCH = 32
PARTS_OF = 10**5


@torch.no_grad()
def firing(learner: MemoryLearner, questions: Sequence[Question]) -> Tensor:
    """``[N, E]``: |φ(u·K)| times the length of V where the answer begins, as shares of their sum, mean over layers.

    E is the number of slots of the largest sample; slots that pad a smaller one are zero.
    """
    found = []
    with frozen(learner.adapter.model), learner.attached(), Patcher(learner.adapter) as patch:
        learner.train(False)
        at: Tensor
        shares: list[Tensor] = []

        def look(module: Any, args: Any, kwargs: Any, output: Tensor) -> None:
            memory = learner.held
            assert memory is not None  # noqa: S101  # set by `prompts`
            u = args[0][torch.arange(len(at)), at]  # [B, d]
            fired = F.silu(torch.einsum("bd,bed->be", u, memory.keys)).abs() * memory.values.norm(dim=-1)
            if memory.mask is not None:
                fired = fired * memory.mask
            shares.append(fired / fired.sum(1, keepdim=True))

        for layer in learner.adapter.layers:
            patch.post(layer.mlp, look)
        for i in range(0, len(questions), BATCH):
            part = questions[i : i + BATCH]
            at = torch.tensor([prompt.length - 1 for prompt in learner.prompts(part)])
            shares.clear()
            learner.teach(part)
            found.append(torch.stack(shares).mean(0))
    most = max(part.shape[1] for part in found)
    return torch.cat([F.pad(part, (0, most - part.shape[1])) for part in found])


def slot_map(learner: MemoryLearner, questions: Sequence[Question], samples: Mapping[str, Sample]) -> Row:
    """Mean firing by type of question and, of pictures, by the quarter in which the thing asked for is."""
    fired = firing(learner, questions)
    asked = [samples[question.id] for question in questions]
    places = [place_of(sample) for sample in asked]
    groups: dict[str, list[int]] = {}
    for row, (sample, place) in enumerate(zip(asked, places, strict=True)):
        groups.setdefault(sample.strata["type"] + (f", {place}" if place else ""), []).append(row)
    slots = [learner.slots_of(question) for question in questions]
    seen = torch.stack([F.pad(each.present, (0, fired.shape[1] - len(each.present))) for each in slots])
    right = [(row, place) for row, place in enumerate(places) if place]
    units = units_of(learner.material.whole(learner.adapter, questions[0]))
    grid = units[0][1] if len(units) == 1 else None
    there = None
    if grid is not None and right:
        in_grid = fired[:, : grid[0] * grid[1]]
        there = [float(in_grid[row, quarter(place, grid)].sum() / fired[row, seen[row]].sum()) for row, place in right]
    return {
        "n": len(questions),
        "slots": fired.shape[1],
        "visual": int(seen.sum(1).float().mean()),
        "visual_share": float((fired * seen).sum(1).mean()),
        "place_share": None if there is None else sum(there) / len(there),
        "place_chance": None if there is None else 1 / len(PLACES),
        "groups": {name: packed(fired[rows].mean(0)) for name, rows in sorted(groups.items())},
        "picture": PICTURE,
    }


def packed(shares: Tensor) -> str:
    """Slot by slot in parts of `PARTS_OF`, as a string: a line of JSON instead of one a slot."""
    return " ".join(f"{value:.0f}" for value in (PARTS_OF * shares).tolist())


def unpacked(text: str) -> list[float]:
    return [int(part) / PARTS_OF for part in text.split()]


def place_of(sample: Sample) -> str | None:
    """The quarter of the picture in which the one thing is that the question names; None when there is no such thing."""
    if sample.media[0].kind != "image":
        return None
    words = sample.question.split()
    named = {"colour": lambda e: e.shape in words, "shape": lambda e: e.colour in words}
    named["place"] = lambda e: e.shape in words and e.colour in words
    kind = sample.strata["type"]
    found = [event.place for event in make_image(sample.extra["seed"]).events if kind in named and named[kind](event)]
    return found[0] if len(found) == 1 else None


def quarter(place: str, grid: tuple[int, int]) -> Tensor:
    """bool ``[rows · columns]``: the slots of a grid that lie in this quarter."""
    rows, columns = grid
    row, column = torch.arange(rows)[:, None] * 2 // rows, torch.arange(columns)[None] * 2 // columns
    return ((row == ("bottom" in place)) & (column == ("right" in place))).flatten()


def draw(out: Path) -> None:
    """The stored maps as one PNG, a panel a model and suite."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from PIL import Image

    maps = [row for row in stored(out)["rows"] if row["part"] == "slots"]
    heights = [1 + 0.17 * len(row["groups"]) for row in maps]
    with rc_context({"font.size": 7, "axes.titlesize": 8}):
        figure = Figure(figsize=(8, 0.5 + sum(heights)), dpi=110, layout="constrained")
        panels = figure.subplots(len(maps), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axis, row in zip(panels, maps, strict=True):
            values = 100 * np.array([unpacked(text) for text in row["groups"].values()])
            most = float(np.quantile(values, 0.99))
            image = axis.imshow(values, aspect="auto", cmap="cividis", vmin=0, vmax=most, interpolation="nearest")
            axis.set_yticks(range(len(row["groups"])), list(row["groups"]))
            axis.set_title(
                f"{row['model']} on {row['suite']}: {row['visual']} slots see something, the others are learned"
            )
            axis.axvline(row["visual"] - 0.5, color="white", linewidth=0.8)
            axis.set_xlabel("slot")
            figure.colorbar(image, ax=axis, label="% of what memory adds", pad=0.01)
        whole = io.BytesIO()
        figure.savefig(whole, metadata={"Software": None})
    Image.open(whole).convert("RGB").quantize(128).save(out / PICTURE, optimize=True)
