"""`vlmbench check invariance`: how many answers flip when nothing but arithmetic or the decoder changes.

The same questions under sdpa and eager attention, in float32 and bfloat16, and through every video decoder that is here.
A difference between two methods that is no larger than these flips is not about the methods. Nothing is stored.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from vlmbench import stats
from vlmbench.errors import UsageError
from vlmbench.fidelity import fidelity, said
from vlmbench.machine import pick_device, pick_dtype
from vlmbench.plain import cell
from vlmbench.progress import Progress
from vlmbench.record import FINISHED, SampleRecord
from vlmbench.request import RunRequest
from vlmbench.runner import scored
from vlmbench.session import Session
from vlmbench.spec import nearest
from vlmbench.video import DECODERS, default_decoder

KINDS = ("attention", "dtype", "decoder")
MODULES = {"pyav": "av", "decord": "decord"}
"""Decoder -> the package that it needs."""


@dataclass(frozen=True)
class Variant:
    """One thing that should not matter, changed; None leaves it as it is."""

    name: str
    attention: str | None = None
    dtype: str | None = None
    decoder: str | None = None


class Row(NamedTuple):
    """One variant against the first run of all, the reference."""

    variant: str
    reference: str
    n: int
    """Questions that both finished."""
    flips: int
    """Of them, with another answer."""
    flips_high: float
    """Upper end of the 95 % interval of their share."""
    first_token_kl: float | None
    accuracy: float
    reference_accuracy: float


def variants(request: RunRequest) -> list[Variant]:
    """What is tried besides the run as asked for."""
    # What the device makes of no --dtype: on CUDA bfloat16, which would be compared with itself.
    dtype = "float32" if pick_dtype(request.dtype, pick_device(request.device)).itemsize < 4 else "bfloat16"
    others = [name for name in DECODERS if name != default_decoder() and importlib.util.find_spec(MODULES[name])]
    other = "sdpa" if request.attention == "eager" else "eager"
    return [
        Variant(f"attention {other}", attention=other),
        Variant(f"dtype {dtype}", dtype=dtype),
        *(Variant(f"decoder {name}", decoder=name) for name in others),
    ]


def check(request: RunRequest, progress: Progress, only: str | None = None) -> Iterator[Row]:
    """A row for each variant. Raises `UsageError` when the model cannot be asked so, or nothing can be compared."""
    if only not in (None, *KINDS):
        raise UsageError(f"--only must be one of {', '.join(KINDS)}, not {only!r}.{nearest(only or '', KINDS)}")
    tried = [each for each in variants(request) if only in (None, each.name.split()[0])]
    reference, records = _asked(request, Variant("as asked"), progress)
    if not any(record.status in FINISHED for record in records.values()):
        first = next(iter(records.values()))
        raise UsageError(f"No question was answered ({first.status}: {first.error}); run it with --limit 1 to see why.")
    for variant in tried:
        yield _row(variant.name, reference, _asked(request, variant, progress)[1], records)


def _asked(request: RunRequest, variant: Variant, progress: Progress) -> tuple[str, dict[str, SampleRecord]]:
    """(what ran, its records by id). Raises `UsageError`."""
    own = replace(
        request, attention=variant.attention or request.attention, dtype=variant.dtype or request.dtype, baseline=False
    )
    session = Session(own, progress, stored=False)
    if variant.decoder:
        session.decoder_name = variant.decoder
    identity = session.backend.identity
    named = f"{identity.attention_kernel}, {identity.dtype}, {session.decoder_name}"
    if len(session.methods) != 1:
        raise UsageError(f"check invariance takes one --method, not {len(session.methods)}.")
    found = {}
    with session, session.backend.attach(session.methods[0]):
        for sample in session.each(session.samples, variant.name):
            found[sample.id] = scored(session, session.methods[0], sample)
    return named, found


def _row(name: str, reference: str, own: dict[str, SampleRecord], other: dict[str, SampleRecord]) -> Row:
    ids = [id_ for id_ in own if own[id_].status in FINISHED and other[id_].status in FINISHED]
    near = fidelity([(own[id_], other[id_]) for id_ in ids])
    flipped = [float(said(own[id_]) != said(other[id_])) for id_ in ids]
    share = stats.accuracy_interval(flipped, [own[id_].cluster for id_ in ids])
    scores = [sum(each.score for each in side.values() if each.status == "ok") / len(side) for side in (own, other)]
    high = 1.0 if share is None or share.high is None else share.high
    return Row(name, reference, len(ids), round(sum(flipped)), high, near.get("first_token_kl"), *scores)


def to_markdown(rows: list[Row]) -> str:
    lines = ["| changed | flips | of | at most | first token, KL | accuracy | reference |", "| --- |" + " ---: |" * 6]
    for row in rows:
        kl = "—" if row.first_token_kl is None else f"{row.first_token_kl:.2g}"
        cells = [cell(row.variant), str(row.flips), str(row.n), f"{row.flips_high:.1%}", kl]
        cells += [f"{row.accuracy:.3f}", f"{row.reference_accuracy:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    below = (
        f"- against {cell(rows[0].reference)}; `at most`: upper end of the 95 % interval of the share" if rows else ""
    )
    return "\n".join([*lines, "", below or "- nothing else is here to compare with"]) + "\n"
