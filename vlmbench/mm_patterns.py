"""What a head of MMInference may be told to do, and its sizes on one prompt.

Sizes are published for prompts of about `REFERENCE` tokens. Shorter prompts scale them down with their length, since a
window of 4096 tokens would be dense there; longer ones keep them, as published. Strides are of the prompt itself: how many
tokens its frames and rows have, never what an earlier prompt had.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from vlmbench.layout import VISUAL

if TYPE_CHECKING:
    from vlmbench.layout import TokenLayout

REFERENCE = 20_240
"""Tokens of LLaVA-Video's prompt in table 1 of the paper, to which the published sizes belong."""
Kind = Literal["dense", "a_shape", "tri", "grid", "vs"]
Inter = Literal["none", "k", "q", "2d"]
KINDS: tuple[Kind, ...] = ("dense", "a_shape", "tri", "grid", "vs")
INTERS: tuple[Inter, ...] = ("none", "k", "q", "2d")
STRIDES = ("auto", "frame", "row")
_SIZES = {"dense": (), "a_shape": ("sink", "local"), "tri": ("sink", "local"), "grid": ("sink", "local")}
SIZES: Mapping[str, tuple[str, ...]] = {**_SIZES, "vs": ("columns", "slashes")}
"""Kind -> its sizes in tokens."""
Pattern = Literal["grid", "a_shape", "tri", "vs", "dense", "mix", "sf-fixed", "sf-strided", "minference"]
"""What all heads may be told to do at once: a kind, a baseline of table 1, or the fixed workload's mix."""
KIND_OF: Mapping[str, Kind] = {"sf-fixed": "grid", "sf-strided": "grid", "minference": "vs"}
PUBLISHED: Mapping[str, dict[str, int]] = {
    "grid": {"sink": 128, "local": 1024},
    "a_shape": {"sink": 128, "local": 4096},
    "tri": {"sink": 128, "local": 4096},
    "vs": {"columns": 1000, "slashes": 2048},
    "dense": {},
    "mix": {},
    "sf-fixed": {"sink": 1},
    "sf-strided": {"sink": 1},
    "minference": {"columns": 1000, "slashes": 6096},
}
"""Tables 3 and 4 of the paper; MInference's own default for a head without an entry."""
_GRID = ("lines", "stride", "phase", "sink", "local")
USED: Mapping[str, tuple[str, ...]] = {
    "grid": _GRID,
    **dict.fromkeys(("a_shape", "tri", "sf-fixed", "sf-strided"), ("sink", "local")),
    **dict.fromkeys(("vs", "minference"), ("columns", "slashes")),
    "dense": (),
    "mix": (*_GRID, "columns", "slashes"),
}
"""Pattern -> parameters that change it."""
OF_A_PATTERN = ("pattern", "boundary", "text", "lines", "stride", "phase", "sink", "local", "columns", "slashes")
"""What only counts where no artefact has a pattern for each head."""


@dataclass(frozen=True)
class Intra:
    """One head's pattern inside a modality, sizes as published; which fields count depends on the kind."""

    kind: Kind = "grid"
    sink: int = 128
    local: int = 1024
    columns: int = 1000
    slashes: int = 2048
    stride: str = "auto"
    """``frame`` or ``row``, ``auto`` for the better of the two on the prompt, or a number of tokens."""
    phase: int | None = None
    """None: found on the prompt."""
    horizontal: bool = True
    vertical: bool = True
    slash: bool = False
    exact: frozenset[str] = frozenset()
    """Sizes that were given for this prompt and are not scaled."""

    @property
    def online(self) -> bool:
        """Whether it is found from the last queries of the prompt."""
        return self.kind == "vs" or (self.kind == "grid" and (self.phase is None or self.stride == "auto"))

    def scaled(self, factor: float) -> Intra:
        """Every size of its kind times `factor`, at least one token."""
        sizes = {
            name: max(1, round(getattr(self, name) * factor)) for name in SIZES[self.kind] if name not in self.exact
        }
        return replace(self, **sizes)

    def to_json(self) -> dict[str, Any]:
        """As in the artefact. A stride of its own is never written: see `from_json`."""
        found: dict[str, Any] = {"type": self.kind, **{name: getattr(self, name) for name in SIZES[self.kind]}}
        if self.kind == "grid":
            lines = {"h": self.horizontal, "v": self.vertical, "s": self.slash}
            found |= {"stride": self.stride, "phase": self.phase, **lines}
        return found

    @classmethod
    def from_json(cls, data: Any) -> Intra:
        """Raises `ValueError` with what is wrong."""
        if not isinstance(data, dict) or data.get("type") not in KINDS:
            raise ValueError(f"{data!r} is no pattern")
        kind = data["type"]
        values: dict[str, Any] = {"kind": kind}
        for name in SIZES[kind]:
            size = data.get(name)
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} of a {kind} head is {size!r}")
            values[name] = size
        if kind == "grid":
            if data.get("stride") not in STRIDES:  # a number would be another video's frame
                raise ValueError(f"stride of a grid head is {data.get('stride')!r}, not {', '.join(STRIDES)}")
            phase = data.get("phase")
            if phase is not None and (isinstance(phase, bool) or not isinstance(phase, int) or phase < 0):
                raise ValueError(f"phase of a grid head is {phase!r}")
            values |= {"stride": data["stride"], "phase": phase}
            for name, key in (("horizontal", "h"), ("vertical", "v"), ("slash", "s")):
                if not isinstance(data.get(key), bool):
                    raise ValueError(f"{key} of a grid head is {data.get(key)!r}")
                values[name] = data[key]
        if extra := sorted(data.keys() - cls(**values).to_json().keys()):
            raise ValueError(f"a {kind} head has an unknown key {extra[0]}")
        return cls(**values)


@dataclass(frozen=True)
class Head:
    """One query head: how modalities are kept apart, and the pattern in each of them."""

    vision: Intra
    text: Intra
    inter: Inter = "none"

    def to_json(self) -> dict[str, Any]:
        return {"inter": self.inter, "intra": {"vision": self.vision.to_json(), "text": self.text.to_json()}}

    @classmethod
    def from_json(cls, data: Any) -> Head:
        """Raises `ValueError` with what is wrong."""
        if not isinstance(data, dict) or data.get("inter") not in INTERS:
            raise ValueError(f"inter of a head is {data.get('inter') if isinstance(data, dict) else data!r}")
        intra = data.get("intra")
        if not isinstance(intra, dict) or set(intra) != {"vision", "text"}:
            raise ValueError(f"intra of a head is {intra!r}")
        return cls(Intra.from_json(intra["vision"]), Intra.from_json(intra["text"]), data["inter"])

    def scaled(self, factor: float) -> Head:
        return replace(self, vision=self.vision.scaled(factor), text=self.text.scaled(factor))


class Run(NamedTuple):
    """Tokens ``[start, stop)`` of one modality that stand together."""

    vision: bool
    start: int
    stop: int


@dataclass(frozen=True)
class Scene:
    """What patterns need to know of a prompt: where its pictures are, and how many tokens a frame and a row have."""

    runs: tuple[Run, ...]
    frame: int
    row: int

    @classmethod
    def of(cls, layout: TokenLayout) -> Scene:
        """Separators count as text; a prompt of text alone has frames and rows of one token, and no vision."""
        frames = [span for span in layout if span.kind in VISUAL]
        runs: list[Run] = []
        for span in layout:
            vision = span.kind in VISUAL
            start = runs.pop().start if runs and runs[-1].vision == vision else span.start
            runs.append(Run(vision, start, span.stop))
        # The commonest size: a picture beside a video, or a frame that lost tokens, does not set the stride.
        size = Counter(len(span) for span in frames).most_common(1)[0][0] if frames else 1
        row = next((span.grid[1] for span in frames if span.grid is not None and len(span) == size), size)
        return cls(tuple(runs), size, row)

    def selected(self, layout: TokenLayout, keep: list[int]) -> Scene:
        """When other tokens than those at `keep` have left: that of what there is."""
        return Scene.of(layout)

    @property
    def length(self) -> int:
        return self.runs[-1].stop

    @cached_property
    def vision(self) -> tuple[int, int]:
        """From the first visual token to behind the last, text between them included; nothing at the end without any."""
        seen = [run for run in self.runs if run.vision]
        return (seen[0].start, seen[-1].stop) if seen else (self.length, self.length)

    @property
    def shrink(self) -> float:
        """By how much published sizes shrink on this prompt: 1 from `REFERENCE` tokens on."""
        return min(1.0, self.length / REFERENCE)

    def strides(self, stride: str) -> tuple[int, ...]:
        """The strides to choose from, in tokens."""
        named = {"frame": (self.frame,), "row": (self.row,), "auto": (self.frame, self.row)}
        return named[stride] if stride in named else (int(stride),)
