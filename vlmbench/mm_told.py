"""What MMInference did, told to the trace, and what it will do, told to ``vlmbench plan``."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from vlmbench.kernels.calls import LAST
from vlmbench.mm_attention import PROBED, Layer, attention
from vlmbench.mm_patterns import Head, Intra, Scene

if TYPE_CHECKING:
    from vlmbench.trace import Trace

DID = "mminference"
"""Key of `Trace.scratch`: what each layer counted."""


def note(trace: Trace, scene: Scene, layer: int, heads: int, did: Layer) -> None:
    """Density, recall and strides of a layer into the trace; a prompt on which every pair was computed is inactive.

    All but the mark `masked` is told when the trace is read: numbers of a GPU are only there when it has done its work.
    """
    counted = trace.scratch.setdefault(DID, {})
    counted[layer] = did
    if did.tally.written:
        trace.facts["masked"] = True
    did.dense = heads * scene.length * (scene.length + 1) // 2
    trace.later(DID, lambda: _tell(trace, scene, counted))


def _tell(trace: Trace, scene: Scene, counted: dict[int, Layer]) -> None:
    density, recall, strides = {}, {}, Counter[str]()
    for layer, did in counted.items():
        did.settle()
        density[str(layer)] = round(did.allowed / did.dense, 4)
        if did.recalls:
            every = torch.cat(did.recalls).tolist()
            recall[str(layer)] = round(sum(every) / len(every), 4)
        strides.update(map(str, did.strides))
    told = {"density": density, "recall": recall, "strides": dict(strides)}
    trace.facts.update({name: value for name, value in told.items() if value})
    if all(each.allowed == each.dense for each in counted.values()):
        trace.inactive(
            f"every pattern holds all pairs of {scene.length} tokens; give a smaller budget or smaller sizes"
        )
    else:
        trace.applied, trace.reason = True, ""


class Expected(NamedTuple):
    """Of one head, before anything ran."""

    pairs: int
    """That the pattern allows."""
    extra: int
    """That are computed besides."""
    scores: int
    """That the index comes from."""


def expected(intra: Intra, scene: Scene) -> Expected:
    """What `vlmbench plan` counts: lines from the first place of a frame on, columns and diagonals side by side."""
    n = scene.length
    last = min(LAST if intra.online else PROBED, n) if intra.kind != "dense" else 0
    scores = last * (n - last) + last * (last + 1) // 2
    if intra.kind in ("dense", "vs"):
        most = n if intra.kind == "dense" else intra.columns + intra.slashes
        return Expected(int((torch.arange(n) + 1).clamp(max=most).sum()), 0, scores)
    phase = intra.phase or 0
    known = replace(intra, stride=str(scene.strides(intra.stride)[0]), phase=phase)
    blank = torch.zeros(1, 1, n, 1)
    _, did = attention(blank, blank, blank, [Head(known, known)], scene, probe=False, dry=True)
    return Expected(did.allowed, did.extra, scores)
