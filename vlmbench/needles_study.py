"""What is measured of MMInference: maps of length × depth, needles in text and frames, accuracy against cost, recall by head.

Each part takes a `Study`, runs what its store lacks, and gives rows; `Scale.lengths` and `Scale.limit` override a part's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

import torch

from vlmbench.claims_study import Row, Study, accuracies, difference, pairs_relative
from vlmbench.fidelity import recall as traced_recall
from vlmbench.madeup import Shape
from vlmbench.methods.mminference import Mminference
from vlmbench.mm_recall import model_recall, planted_recall
from vlmbench.mm_search import seen_prompt
from vlmbench.session import Session, make_methods
from vlmbench.suites._synth.captions import FROM_FRAMES, len_captions, make_remarks
from vlmbench.suites._synth.scene import COLOURS, SHAPES, make_scene

if TYPE_CHECKING:
    from vlmbench.record import SampleRecord
    from vlmbench.suite import Sample

FULL = "full"
FITTED = "mminference:artefact=auto"
BUDGET = 0.5
"""Of the maps: half of the published sizes."""
LINES = ("mminference:pattern=grid", "mminference:pattern=vs")
PATTERNS = ("a_shape", "tri", "grid", "vs")
BASELINES = ("sf-fixed", "sf-strided", "minference")
"""Of the paper's table 1, which know no boundary."""
BOUNDARIES = ("q", "2d")
"""Beside none; K-boundary is none, since a pattern's indices hold for every row."""
LENGTHS = (32, 128, 384)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
MAP_TYPE = "colour"
"""One event, one question: what color is the SHAPE?"""
CELLS = {32: 8, 128: 6, 384: 4}
"""Frames up to which -> questions of a cell: fewer the longer an answer takes; rows of all cells together have the rest."""
MIXED_LENGTHS, MIXED = (64, 128), 18
"""Frames, and questions of a length: three of every type."""
THIRDS = ("first", "middle", "last")
CURVE = {"synthvideo:length=384": 66, "synthvideo:length=128": 66, "synthmixed:length=128": 66}
"""Suite -> questions: multiples of its types."""
LONG = "length=384"
DENSE_TEXT = "mminference:pattern=vs,boundary=q,text=dense"
"""Text sees everything, as behind the pictures under `grid` and `tri`."""
CAREFUL = f"{FITTED},dense_layers=2,budget=1.5"


def map_methods() -> list[str]:
    """Every pattern alone and under every boundary, the baselines alone, and the fitted file."""
    budget = f",budget={BUDGET:g}"
    found = [f"mminference:pattern={pattern}{budget}" for pattern in (*PATTERNS, *BASELINES)]
    found += [f"mminference:pattern={each}{budget},boundary={boundary}" for each in PATTERNS for boundary in BOUNDARIES]
    return [FULL, *found, f"{FITTED}{budget}"]


def curve_methods(suite: str) -> list[str]:
    """The patterns with an online index at published sizes and at twice them, the fitted file; below `LONG` more care too."""
    found = [FULL, *LINES, f"{LINES[1]},budget=2", FITTED]
    return found if LONG in suite else [*found, DENSE_TEXT, CAREFUL]


def maps(study: Study) -> list[Row]:
    """V-NIAH: a row for every method, length and depth, and one for all cells of a method together (no depth)."""
    rows, methods = [], map_methods()
    own: dict[str, dict[str, SampleRecord]] = {method: {} for method in methods}
    for length in study.scale.lengths or LENGTHS:
        for depth in DEPTHS:
            suite = f"synthvideo:length={length},depth={depth:g},type={MAP_TYPE}"
            limit = study.scale.limit or next((n for most, n in CELLS.items() if length <= most), 1)
            found = study.answers(suite, methods, limit)
            for method in methods:
                rows.append({"length": length, "depth": depth, **_row(found.of, method, found.ids())})
                own[method] |= found.of[method]
    return rows + [_row(own, method, list(own[FULL])) for method in methods]


def mixed(study: Study) -> list[Row]:
    """MM-NIAH: needles in frames, in text and in both, by length and by how deep the needle lies."""
    rows, methods = [], map_methods()
    own: dict[str, dict[str, SampleRecord]] = {method: {} for method in methods}
    asks: dict[str, list[str]] = {}
    for length in study.scale.lengths or MIXED_LENGTHS:
        found = study.answers(f"synthmixed:length={length}", methods, study.scale.limit or MIXED)
        thirds: dict[str, list[str]] = {}
        for sample in found.samples:
            third = THIRDS[min(2, int(3 * needle_depth(sample)))]
            thirds.setdefault(third, []).append(sample.id)
            asks.setdefault(modality(sample), []).append(sample.id)
        for method in methods:
            own[method] |= found.of[method]
            for third in THIRDS:
                if ids := thirds.get(third):
                    rows.append({"length": length, "depth": third, **_row(found.of, method, ids)})
    for method in methods:
        rows.append(_row(own, method, list(own[FULL])))
        rows += [{"asks": kind, **_row(own, method, ids)} for kind, ids in sorted(asks.items())]
    return rows


def modality(sample: Sample) -> str:
    """Where the answer of a `synthmixed` question lies."""
    kind = sample.strata["type"]
    return "frames" if kind in FROM_FRAMES else "frames and text" if kind == "beside" else "text"


def needle_depth(sample: Sample) -> float:
    """How far into the video the caption or the event lies that a `synthmixed` question is about, from 0 to 1."""
    scene = make_scene(sample.extra["seed"], int(sample.strata["length"]))
    words = {*sample.question.split()}
    for remark in make_remarks(scene):
        if words & {remark.animal, remark.number}:
            return remark.caption / len_captions(scene.n_frames)
    for event in scene.events:
        named = words & {*COLOURS}, words & {*SHAPES}
        if all(not names or own in names for names, own in zip(named, (event.colour, event.shape), strict=True)):
            return event.start / scene.n_frames
    raise ValueError(f"{sample.id} asks about nothing in its video")


def curve(study: Study) -> list[Row]:
    """Accuracy against cost on whole suites; no setting was chosen on these questions."""
    asked = CURVE
    if study.scale.lengths:
        asked = {f"synthvideo:length={length}": 22 for length in study.scale.lengths}
    rows = []
    for suite, limit in asked.items():
        methods = curve_methods(suite)
        found = study.answers(suite, methods, study.scale.limit or limit)
        rows += [{"suite": suite, **_row(found.of, method, found.ids())} for method in methods]
    return rows


@torch.inference_mode()
def recall(study: Study) -> list[Row]:
    """Layer × head of every pattern on one prompt of each suite, and of planted heads."""
    adapter = study.backend.adapter  # type: ignore[attr-defined]
    methods = {name: _method(f"mminference:pattern={name}") for name in PATTERNS}
    fitted = methods["fitted"] = _method(FITTED)
    fitted.check_weights(study.backend.identity)
    rows: list[Row] = []
    length = max(study.scale.lengths or (128,))
    for suite in (f"synthvideo:length={length}", f"synthmixed:length={length}"):
        request = study.request(suite, [FULL], limit=1)
        with Session(request, study.progress, backend=study.backend, stored=False) as session:
            found = model_recall(adapter, seen_prompt(session, adapter, session.samples[0]), methods)
        rows += [{"suite": suite, "pattern": name, "recall": values} for name, values in found.items()]
    shape = Shape(64, 64, 5, 5, 64)
    planted = planted_recall(shape, _method("mminference:pattern=mix"))
    return rows + [{"planted": shape.tokens, **row} for row in planted]


def _method(spec: str) -> Mminference:
    (found,) = make_methods((spec,))
    return found  # type: ignore[return-value]


def _row(of: Mapping[str, Mapping[str, SampleRecord]], method: str, ids: Sequence[str]) -> Row:
    """Accuracy, the difference from full attention on the same questions, pairs and FLOPs of full attention's, and recall."""
    own, full = of[method], of[FULL]
    none, boundary, _ = method.partition(",boundary=")
    seen = [share for id_ in ids if (share := traced_recall(own[id_])) is not None]
    flops = [mine["flops"] / theirs["flops"] for id_ in ids if (mine := own[id_].work) and (theirs := full[id_].work)]
    return {
        "method": method,
        **accuracies(own, ids),
        **(difference("delta", own, full, ids) if method != FULL else {}),
        **(difference("gain", own, of[none], ids) if boundary else {}),
        "pairs_relative": pairs_relative(own, full, ids),
        "flops_relative": fmean(flops) if flops else None,
        "recall": fmean(seen) if seen else None,
    }
