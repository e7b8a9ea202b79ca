"""How near a method's answers are to full attention's, beside whether they are right: two methods of one accuracy may
agree on every answer or on few.

Everything here is over pairs of accuracy records, the method's and the baseline's of the same sample.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from vlmbench.record import SampleRecord
from vlmbench.skim import StoredToken, read_arrays

COLUMNS = ("agreement", "first_token_match", "first_token_kl", "greedy_prefix")
RESOLUTION = 1e-7
"""Mass that a stored tail of nothing may hold: what float32 leaves of 1 − Σp."""
MANY = 256
"""Pairs that are compared at once."""

Pair = tuple[SampleRecord, SampleRecord]


def fidelity(pairs: Sequence[Pair]) -> dict[str, float]:
    """Means over pairs (own, baseline's); what no pair tells is left out.

    ``agreement`` share of the same answers; ``first_token_match`` of the same likeliest first token; ``first_token_kl``
    nats, see `kl`; ``greedy_prefix`` tokens before the first that differs, the whole answer where none does.
    """
    if not pairs:
        return {}
    tokens = [(own.first_token, full.first_token) for own, full in pairs if own.first_token and full.first_token]
    # What no model generated (`prior`) has no tokens; an answer that ends at once has none either, but a first one.
    generated = [(own, full) for own, full in pairs if full.output_ids and (own.output_ids or own.first_token)]
    prefixes = [common_prefix(own.output_ids, full.output_ids) for own, full in generated]
    found = {"agreement": fmean(said(own) == said(full) for own, full in pairs)}
    if tokens:
        found["first_token_match"] = fmean(_likeliest(own) == _likeliest(full) for own, full in tokens)
        found["first_token_kl"] = fmean(divergences([full for _, full in tokens], [own for own, _ in tokens]))
    if prefixes:
        found["greedy_prefix"] = fmean(prefixes)
    return found


def said(record: SampleRecord) -> str:
    """What the sample was answered with; two unreadable answers agree only when their texts do."""
    return record.raw_text if record.prediction is None else record.prediction


def kl(p: Mapping[str, Any], q: Mapping[str, Any]) -> float:
    """KL(p ‖ q) in nats of two stored first tokens (`engine.first_token`): a lower bound, and at least 0.

    Tokens that both lists name are compared one by one, those that only q names as one, and all others as one: lumping
    outcomes together never makes a divergence larger (data processing inequality). How much of p's tail lies on what
    only q names is not stored; the share that makes the divergence least is taken.
    """
    other = dict(zip(q["ids"], q["logprobs"], strict=True))
    parts, own_alone = [], []
    for id_, logprob in zip(p["ids"], p["logprobs"], strict=True):
        there = other.pop(id_, None)
        mass = math.exp(logprob)
        if there is None:
            own_alone.append(mass)
        else:
            parts.append(mass * (logprob - there))
    total, own_rest, other_alone = math.fsum(parts), math.fsum(own_alone), math.fsum(map(math.exp, other.values()))
    own_tail, other_tail = _tail(p), max(_tail(q), RESOLUTION)
    rest = own_rest + own_tail
    only_other = min(own_tail, rest * other_alone / (other_alone + other_tail))
    for mass, other_mass in ((only_other, other_alone), (rest - only_other, other_tail)):
        if mass > 0:
            total += mass * math.log(mass / other_mass)
    return max(0.0, total)


def divergences(ps: Sequence[Mapping[str, Any]], qs: Sequence[Mapping[str, Any]]) -> list[float]:
    """`kl` of each pair; in arrays where all lists are of one length, since a table asks it ten thousand times."""
    read_arrays([each for each in (*ps, *qs) if isinstance(each, StoredToken)])
    own, other = ([_lists(each) for each in side] for side in (ps, qs))
    lengths = {len(each) for lists in (*own, *other) for each in lists}
    if len(ps) < MANY or len(lengths) != 1:
        return [kl(p, q) for p, q in zip(ps, qs, strict=True)]
    tails, other_tails = ([_tail(each) for each in side] for side in (ps, qs))
    found: list[float] = []
    for start in range(0, len(ps), MANY):
        part = slice(start, start + MANY)
        found += _divergences(own[part], tails[part], other[part], other_tails[part])
    return found


Lists = tuple[Any, Any]
"""ids and logprobs, lists or arrays."""


def _divergences(
    own: Sequence[Lists], tails: list[float], other: Sequence[Lists], other_tails: list[float]
) -> list[float]:
    import numpy as np

    ids, other_ids = (np.array([each for each, _ in side]) for side in (own, other))
    logprobs, other_logprobs = (np.array([each for _, each in side], dtype=float) for side in (own, other))
    at = (ids[:, :, None] == other_ids[:, None, :]).argmax(
        2
    )  # [pairs, k]: where the other list names it, else anywhere
    both = np.take_along_axis(other_ids, at, 1) == ids
    theirs = np.zeros_like(both)
    pair, place = np.nonzero(both)
    theirs[pair, at[pair, place]] = True
    masses, there = np.exp(logprobs), np.take_along_axis(other_logprobs, at, 1)
    total = np.where(both, masses * (logprobs - there), 0.0).sum(1)
    own_tail, other_tail = np.array(tails), np.maximum(np.array(other_tails), RESOLUTION)
    rest = np.where(both, 0.0, masses).sum(1) + own_tail
    other_alone = np.where(theirs, 0.0, np.exp(other_logprobs)).sum(1)
    only_other = np.minimum(own_tail, rest * other_alone / (other_alone + other_tail))
    for mass, other_mass in ((only_other, other_alone), (rest - only_other, other_tail)):
        held = mass > 0
        total[held] += mass[held] * np.log(mass[held] / other_mass[held])
    return list(map(float, np.maximum(total, 0.0)))


def _lists(stored: Mapping[str, Any]) -> Lists:
    return (stored.arrays if isinstance(stored, StoredToken) else None) or (stored["ids"], stored["logprobs"])


def _tail(stored: Mapping[str, Any]) -> float:
    return 0.0 if stored["tail"] is None else math.exp(stored["tail"])


def _likeliest(stored: Mapping[str, Any]) -> list[int]:
    return stored.likeliest if isinstance(stored, StoredToken) else stored["ids"][:1]


def common_prefix(own: Sequence[int], other: Sequence[int]) -> int:
    """Tokens before the first that differs."""
    return next((n for n, (a, b) in enumerate(zip(own, other, strict=False)) if a != b), min(len(own), len(other)))


def recall(record: SampleRecord) -> float | None:
    """Attention mass that the method's pattern keeps, where its trace says so: a number, or one each head or layer."""
    return _mean((record.trace or {}).get("recall"))


def _mean(value: Any) -> float | None:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        known = [mean for each in value if (mean := _mean(each)) is not None]
        return fmean(known) if known else None
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
