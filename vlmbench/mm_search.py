"""Which pattern each head of a model gets: every candidate at one measured cost, by what it does to the attention output.

MMInference, algorithm 4 and section C.5. One train prompt goes through the model densely; in every layer each candidate runs
on the same queries, keys and values, its sizes scaled until its kernel computes as many pairs as A-shape with 1k global and
4k local tokens does on this prompt, corners of masks among them. A head takes a later candidate only when its output is
better by `GAIN`.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from vlmbench import header
from vlmbench.errors import RunError, UsageError
from vlmbench.kernels.calls import Tally, causal_rows
from vlmbench.mm_artefact import HeadPatterns, Table
from vlmbench.mm_attention import attention
from vlmbench.mm_patterns import SIZES, Head, Intra, Scene
from vlmbench.patch import Patcher

if TYPE_CHECKING:
    from vlmbench.fitting import Fitting
    from vlmbench.layout import Prompt
    from vlmbench.models.base import ModelAdapter
    from vlmbench.session import Session
    from vlmbench.suite import Sample

GAIN = 0.01
"""Recall by which a later candidate must be better: earlier ones have the faster kernels."""
LIMIT = 25_000
"""Tokens above which the search refuses a prompt, as published."""
STEPS = 6
"""Halvings of the interval in which a candidate's scale is looked for."""
TEXT = Intra("vs", columns=1000, slashes=2048)
BUDGET = Intra("a_shape", sink=1024, local=4096)


def _grid(stride: str, lines: str) -> Intra:
    return Intra("grid", stride=stride, horizontal="h" in lines, vertical="v" in lines, slash="s" in lines)


CANDIDATES = (
    _grid("frame", "v"),
    _grid("frame", "hv"),
    Intra("a_shape", local=4096),
    _grid("row", "v"),
    _grid("row", "hv"),
    _grid("frame", "s"),
    _grid("frame", "hvs"),
    Intra("vs", columns=1000, slashes=1024),
    Intra("vs", columns=1000, slashes=4096),
    Intra("vs", columns=3500, slashes=200),
)
"""Table 4 of the paper in the order of the research code; those with diagonals, which that code did not score, behind."""


class Fit(NamedTuple):
    """A candidate as it is on one layer."""

    name: str
    head: Head
    """Sizes as published, times whatever brings it to the cost."""
    pairs: float
    """That it computed, a head, corners of masks among them."""
    recall: Tensor
    """``[H]``"""


class Layer(NamedTuple):
    heads: tuple[Head, ...]
    recall: Tensor
    """``[H]``, of the choices."""
    target: float
    fits: list[Fit]
    taken: list[int]
    """Which of `fits` each head took."""


def output_recall(out: Tensor, dense: Tensor) -> Tensor:
    """``[B, H, N, D]`` both: 1 - |out - dense| / |dense| of each head's whole output, at least 0: ``[H]``.

    Not a mean over rows: most rows of a video say nothing, and what few say is in the large errors.
    """
    error, whole = ((x.double() ** 2).sum((0, 2, 3)).sqrt() for x in (out - dense, dense))
    return (1 - error / whole.clamp(min=1e-12)).clamp(min=0)


def choose(recalls: Sequence[Tensor]) -> list[int]:
    """``[H]`` of every candidate in order; which one each head takes: a later one only if it is better by `GAIN`."""
    best = recalls[0].clone()
    taken = torch.zeros(len(best), dtype=torch.long)
    for number, recall in enumerate(recalls[1:], 1):
        better = recall.cpu() > best.cpu() + GAIN
        taken[better] = number
        best = torch.where(better.to(best.device), recall, best)
    return taken.tolist()


def at_cost(
    head: Head, target: float, q: Tensor, k: Tensor, v: Tensor, dense: Tensor, scene: Scene, scale: float
) -> Fit | None:
    """The candidate scaled to compute at most `target` pairs a head, as near as `STEPS` halvings bring it, or None.

    `dense` is full attention's output.
    """
    shrink, found = scene.shrink, None
    options: dict[str, Any] = {"scale": scale, "probe": False}
    low, high = -5.0, 4.0  # powers of two
    for _ in range(STEPS):
        power = (low + high) / 2
        mine = replace(head, vision=head.vision.scaled(2**power))
        _, did = attention(q, k, v, [mine.scaled(shrink)] * q.shape[1], scene, dry=True, **options)
        pairs = did.tally.computed / (q.shape[0] * q.shape[1])
        if pairs > target:
            high = power
            continue
        low = power
        found = (mine, pairs)
    if found is None:
        return None
    mine, pairs = found
    out, _ = attention(q, k, v, [mine.scaled(shrink)] * q.shape[1], scene, **options)
    return Fit(_name(head), mine, pairs, output_recall(out, dense))


def _dense(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    shared = q.shape[1] // k.shape[1]
    wide, values = (x.repeat_interleave(shared, 1) for x in (k, v))
    return causal_rows(q, wide, values, 0, q.shape[2], scale=scale, tally=Tally()).out


def search_layer(q: Tensor, k: Tensor, v: Tensor, scene: Scene, budget: float, scale: float) -> tuple[Layer, Tensor]:
    """A pattern for each head of ``q [1, H, N, D]``: its intra-pattern first, then how modalities are kept apart.

    Full attention's output ``[1, H, N, D]`` comes with it.
    Raises `RunError` when no candidate is as cheap as the budget.
    """
    shrink = scene.shrink
    _, did = attention(
        q, k, v, [Head(BUDGET.scaled(budget * shrink), TEXT)] * q.shape[1], scene, scale=scale, probe=False, dry=True
    )
    dense = _dense(q, k, v, scale)
    target = did.tally.computed / (q.shape[0] * q.shape[1]) * 1.02  # whole tokens, so never exactly
    target = min(target, scene.length * (scene.length + 1) / 2)  # blocks of a short prompt cost more than all its pairs
    fits = [fit for each in CANDIDATES if (fit := at_cost(Head(each, TEXT), target, q, k, v, dense, scene, scale))]
    if not fits:
        raise RunError(f"No pattern is as cheap as the budget on {scene.length} tokens; give a larger budget.")
    taken = choose([fit.recall for fit in fits])
    heads = [fits[number].head for number in taken]
    recalls, apart = [], []
    for inter in ("none", "q", "2d"):
        apart.append([replace(head, inter=inter) for head in heads])
        out, _ = attention(q, k, v, [head.scaled(shrink) for head in apart[-1]], scene, scale=scale, probe=False)
        recalls.append(output_recall(out, dense))
    inters = choose(recalls)
    chosen = tuple(apart[inter][number] for number, inter in enumerate(inters))
    recall = torch.stack([recalls[inter][n] for n, inter in enumerate(inters)])
    return Layer(chosen, recall, target, fits, taken), dense


def text_only(head: Head) -> Head:
    """Without pictures there are no frames: a grid becomes vertical-slash (section 4.6), everything else stays."""
    intra = head.vision if head.vision.kind != "grid" else TEXT
    return Head(intra, intra)


def _name(head: Head) -> str:
    intra = head.vision
    if intra.kind == "grid":
        lines = "".join(key for key, on in (("h", intra.horizontal), ("v", intra.vertical), ("s", intra.slash)) if on)
        return f"grid {intra.stride} {lines}"
    return f"{intra.kind} {'/'.join(str(getattr(intra, size)) for size in SIZES[intra.kind])}"


@torch.inference_mode()
def search(fitting: Fitting, budget: float) -> HeadPatterns:
    """Raises `UsageError` and `RunError`."""
    begun_s = time.monotonic()
    adapter, progress = fitting.adapter, fitting.session.progress
    prompt = seen_prompt(fitting.session, adapter, fitting.samples[0])
    if not prompt.layout.n_visual:
        raise UsageError("mminference is fitted on a prompt with pictures; choose a suite that has them.")
    if prompt.length > LIMIT:
        raise UsageError(
            f"The first train prompt has {prompt.length} tokens, and the search is for at most {LIMIT}; ask for fewer --frames."
        )
    scene = Scene.of(prompt.layout)
    found: list[Layer] = []
    progress.start(len(adapter.layers), "fit · mminference")

    def watch(
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, *, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        progress.stage(f"layer {len(found)}")
        layer, out = search_layer(q, k, v, scene, budget, scaling)
        found.append(layer)
        progress.advance()
        return out.transpose(1, 2).contiguous(), None

    with Patcher(adapter) as patch:
        patch.attention(watch)
        adapter.prefill(prompt, adapter.new_cache(0))
    session, identity = fitting.session, fitting.session.backend.identity
    dense = prompt.length * (prompt.length + 1) / 2
    return HeadPatterns(
        layers=_table(found),
        text_only=tuple(tuple(text_only(head) for head in layer.heads) for layer in found),
        model=identity.model,
        revision=identity.revision,
        weights_hash=identity.weights_hash,
        suite=session.request.suite,
        suite_version=session.suite.version,
        data_hash=session.suite.data_hash,
        sampler=session.sampler,
        frames=session.frames,
        units=len(prompt.layout.units),
        tokens=prompt.length,
        budget=budget,
        pairs_relative=sum(layer.target for layer in found) / len(found) / dense,
        candidates=_rows(found, dense),
        recall=[float(layer.recall.mean()) for layer in found],
        seconds=round(time.monotonic() - begun_s, 1),
        versions=header.versions(),
        **header.source(),
        device={"type": identity.device_type, "name": identity.device_name, "dtype": identity.dtype},
    )


def _table(found: Sequence[Layer]) -> Table:
    return tuple(layer.heads for layer in found)


def _rows(found: Sequence[Layer], dense: float) -> list[dict[str, Any]]:
    """Means over the layers in which a candidate could be made as cheap as the others."""
    fits: dict[str, list[Fit]] = defaultdict(list)
    heads = Counter(layer.fits[number].name for layer in found for number in layer.taken)
    for layer in found:
        for fit in layer.fits:
            fits[fit.name].append(fit)
    return [
        {
            "name": name,
            "pairs_relative": sum(fit.pairs for fit in each) / len(each) / dense,
            "recall": float(torch.stack([fit.recall.mean() for fit in each]).mean()),
            "layers": len(each),
            "heads": heads[name],
        }
        for name, each in fits.items()
    ]


def seen_prompt(session: Session, adapter: ModelAdapter, sample: Sample) -> Prompt:
    """A question with its visual features. Raises `RunError` when its video cannot be used."""
    record = session.blank(sample, "accuracy")
    clips = session.clips(sample, record)
    if clips is None:
        raise RunError(f"The first video cannot be used: {record.error}")
    asked = session.asked(sample, clips)
    inputs = adapter.to_device(adapter.inputs(clips, asked.question, asked.captions))
    return adapter.splice(inputs, adapter.encode_vision(inputs))
