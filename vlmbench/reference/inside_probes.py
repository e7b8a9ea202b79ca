"""The probes of a model, averaged over test questions: what ``reference.json`` holds under ``probes``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from scipy.special import stdtrit
from torch import Tensor

from vlmbench.reference import probes
from vlmbench.session import make_suite
from vlmbench.suite import limited
from vlmbench.suites._synth.scene import make_scene
from vlmbench.video import Decoder

if TYPE_CHECKING:
    from vlmbench.models.base import ModelAdapter
    from vlmbench.progress import Progress

PROBE_QUESTIONS = 40
PROBE_FRAMES = 32


def probe(adapter: ModelAdapter, n: int, progress: Progress) -> dict[str, Any]:
    """Means over `n` test questions, taken evenly over the types in `probes.PROBED`, each on its whole video."""
    suite = make_suite(f"synthvideo:length={PROBE_FRAMES}")
    samples = limited([each for each in suite.samples() if each.strata["type"] in probes.PROBED], n)
    progress.start(len(samples), "probes")
    shares: dict[str, list[Tensor]] = {name: [] for name in probes.CLASSES}
    tokens: dict[str, list[float]] = {name: [] for name in probes.CLASSES}
    top: dict[str, list[Tensor]] = {"question": [], "visual": []}
    overlaps: dict[str, list[Tensor]] = {"needle-question": [], "other-question": [], "needle-other": []}
    with Decoder() as decoder:
        for sample in samples:
            suite.materialise(sample)
            (media,) = sample.media
            clip = decoder.read(media.path, kind=media.kind, frames=None, rule=suite.default_sampler)
            inside = probes.look(adapter, clip, suite.asked(sample, clip.times_s).question)
            layout = inside.layout
            scene = make_scene(sample.extra["seed"], PROBE_FRAMES)
            needle = probes.needle_units(probes.events_of(sample, scene), clip, len(layout.units))
            classes = probes.span_classes(layout, needle)
            for name, share in probes.answer_shares(inside.attention, classes).items():
                shares[name].append(share)
                tokens[name].append(len(classes[name]))
            question = probes.question_tokens(layout)
            top["question"].append(probes.top_share(inside.attention, question))
            top["visual"].append(probes.top_share(inside.attention, layout.indices("video")))
            others = probes.span_classes(layout, probes.other_units(needle, len(layout.units)))["needle"]
            sets = {"needle": classes["needle"], "other": others, "question": question}
            core = {name: probes.core_neurons(inside.neurons[:, ids]) for name, ids in sets.items()}
            for pair in overlaps:
                a, b = pair.split("-")
                overlaps[pair].append(probes.overlap(core[a], core[b]))
            progress.advance()
    progress.finish()
    more = differences(overlaps["needle-question"], overlaps["other-question"], [each.cluster for each in samples])
    return {
        "frames": PROBE_FRAMES,
        "n": len(samples),
        "videos": len({each.cluster for each in samples}),
        "types": list(probes.PROBED),
        "tokens": {name: _round(sum(counts) / len(counts)) for name, counts in tokens.items()},
        "shares": {name: _mean(each) for name, each in shares.items()},
        "top_keys": probes.TOP_KEYS,
        "top": {name: _mean(each) for name, each in top.items()},
        "top_neurons": probes.TOP_NEURONS,
        "overlap": {name: _mean(each) for name, each in overlaps.items()},
        "overlap_chance": _round(probes.chance_overlap(adapter.shapes.intermediate)),
        "overlap_more": more,
    }


def differences(a: Sequence[Tensor], b: Sequence[Tensor], clusters: Sequence[str]) -> list[dict[str, float | None]]:
    """Mean of a − b by layer with Student's 95 % interval over videos; `a` and `b` hold ``[L]`` for every question.

    `stats.paired_delta` is made for answers that are right or wrong: for shares its interval would be far too wide.
    """
    by_video: dict[str, list[Tensor]] = {}
    for first, second, cluster in zip(a, b, clusters, strict=True):
        by_video.setdefault(cluster, []).append(first - second)
    means = torch.stack([torch.stack(each).double().mean(0) for each in by_video.values()])  # [videos, L]
    if len(means) < 2:
        return [{"value": _round(value), "low": None, "high": None} for value in means[0].tolist()]
    half = float(stdtrit(len(means) - 1, 0.975)) * means.std(0) / len(means) ** 0.5
    return [
        {"value": _round(value), "low": _round(value - error), "high": _round(value + error)}
        for value, error in zip(means.mean(0).tolist(), half.tolist(), strict=True)
    ]


def _mean(values: Sequence[Tensor]) -> Any:
    """Mean over the questions as nested lists; a question on which nothing could be measured (NaN) is left out."""
    return _round(torch.stack(list(values)).double().nanmean(0).tolist())


def _round(value: Any) -> Any:
    return [_round(each) for each in value] if isinstance(value, list) else round(value, 5)
