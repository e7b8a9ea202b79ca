"""The claims about accuracy: the ladder, the rivals, the (sink, block) grid, videos with many cuts, where PEVLM is better.

Each part takes a `Study`, runs what its store lacks, and gives rows. What the rows mean is written in `claims_text`.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import TYPE_CHECKING

from vlmbench import significance
from vlmbench.claims_study import (
    QUESTIONS,
    Answers,
    Row,
    Study,
    accuracies,
    asks,
    contrast,
    difference,
    estimate,
    pairs_relative,
    score,
    suite_of,
)
from vlmbench.stats import paired_delta

if TYPE_CHECKING:
    from vlmbench.record import SampleRecord

OWN = "pevlm"
"""With its defaults."""
RIVALS = ("full", "block", "ape", "star")
BLOCK = 8
"""Temporal units of a block on the ladder: the method's own default."""
SINKS, BLOCKS = (1, 4, 8, 16), (4, 8, 16, 32)
"""The grid, in temporal units: the sweep of the authors' scripts."""
GRID_SHARE = 2
"""The grid asks one question in so many of what the other parts ask at its length: it has sixteen settings."""
FRAMES_A_SCENE = 4
"""Of the videos with many cuts, on average."""
EXAMPLES = 5


def ladder(study: Study) -> list[Row]:
    """Plain parallel encoding, then the paper's three steps, one at a time; the last rung is PEVLM.

    Rung 0 and 1 are blocks of tokens that end in the middle of a frame, half a frame larger than rung 2's blocks of frames.
    """
    rows = []
    for length in study.scale.lengths[:2]:
        suite, limit = suite_of(length), study.scale.questions(length)
        rungs = _rungs(study, suite)
        found = study.answers(suite, ["full", *(method for _, method in rungs)], limit)
        for questions in QUESTIONS:
            ids = found.ids(questions)
            before: Mapping[str, SampleRecord] | None = None
            for step, method in rungs:
                own = found.of[method]
                gained = difference("gain", own, before, ids) if before is not None else estimate("gain", None)
                row = {"length": length, "questions": questions, "step": step, "method": method}
                rows.append(row | accuracies(own, ids) | difference("delta", own, found.of["full"], ids) | gained)
                before = own
    return rows


def _rungs(study: Study, suite: str) -> list[tuple[str, str]]:
    """(step, method), from the plainest up. M-RoPE has a plainer one: all its axes flattened, as the authors' prototype did."""
    frames = f"{OWN}:sink=0,block={BLOCK}"
    one = study.answers(suite, [frames], 1)
    (record,) = one.of[frames].values()
    start, stop = (record.trace or {})["plan"]["blocks"][0]
    tokens = stop - start + (stop - start) // (2 * BLOCK)
    blocks = f"{OWN}:unit=token,block={tokens}"
    flat = [("0, axes flattened", f"{blocks},positions=reused-1d")] if _has_axes(study) else []
    return [
        *flat,
        ("0", f"{blocks},positions=reused"),
        ("1", blocks),
        ("2", frames),
        ("3", OWN),
    ]


def _has_axes(study: Study) -> bool:
    adapter = getattr(study.backend, "adapter", None)
    return adapter is not None and "mrope_section" in (adapter.text.config.rope_parameters or {})


def rivals(study: Study) -> list[Row]:
    """PEVLM minus each of full attention and the encodings it is compared with, at every length."""
    rows = []
    for length in study.scale.lengths:
        found = study.answers(suite_of(length), [OWN, *RIVALS], study.scale.questions(length))
        for questions in QUESTIONS:
            ids = found.ids(questions)
            own, full = found.of[OWN], found.of["full"]
            for method, theirs in found.of.items():
                gap = estimate("delta", None) if method == OWN else difference("delta", own, theirs, ids)
                row = {"length": length, "questions": questions, "method": method, **accuracies(theirs, ids), **gap}
                rows.append(row | {"pairs_relative": pairs_relative(theirs, full, ids)})
    return rows


def grid(study: Study) -> list[Row]:
    """Every (sink, block), and what the largest of each is worth over the smallest, averaged over the other."""
    length = study.scale.middle
    settings = {(s, b): f"{OWN}:sink={s},block={b}" for s, b in product(SINKS, BLOCKS)}
    limit = max(1, study.scale.questions(length) // GRID_SHARE)
    found = study.answers(suite_of(length), ["full", OWN, *settings.values()], limit)
    rows: list[Row] = []
    for questions in QUESTIONS:
        ids = found.ids(questions)
        at = {"length": length, "questions": questions}
        full = found.of["full"]
        rows.append(at | {"kind": "default", **accuracies(found.of[OWN], ids)})
        for (sink, block), method in settings.items():
            own = found.of[method]
            row = at | {"kind": "cell", "sink": sink, "block": block, **accuracies(own, ids)}
            rows.append(row | difference("delta", own, full, ids) | {"pairs_relative": pairs_relative(own, full, ids)})
        for axis, values in (("sink", SINKS), ("block", BLOCKS)):
            most, least = (
                [found.of[method] for pair, method in settings.items() if pair[axis == "block"] == value]
                for value in (values[-1], values[0])
            )
            effect = contrast("effect", most, least, ids)
            rows.append(at | {"kind": "effect", "axis": axis, "from": values[0], "to": values[-1], **effect})
    return rows


def cuts(study: Study) -> list[Row]:
    """The same events and questions without a cut and with many; whether PEVLM loses more of them than full attention."""
    length = study.scale.shortest
    numbers = (0, length // FRAMES_A_SCENE)
    methods = [OWN, "full", "block"]
    found = {n: study.answers(suite_of(length, cuts=n), methods, study.scale.questions(length)) for n in numbers}
    rows: list[Row] = []
    for questions in QUESTIONS:
        at = {"length": length, "questions": questions}
        for n, asked in found.items():
            ids = asked.ids(questions)
            for method, own in asked.of.items():
                gap = difference("delta", own, asked.of["full"], ids)
                rows.append(at | {"kind": "cell", "cuts": n, "method": method, **accuracies(own, ids), **gap})
        none, many = (asked.ids(questions) for asked in found.values())
        for method in (OWN, "block"):
            lost = _loss_more(found[numbers[0]], found[numbers[1]], method, none, many)
            rows.append(at | {"kind": "effect", "method": method, "from": numbers[0], "to": numbers[1], **lost})
    return rows


def _loss_more(none: Answers, many: Answers, method: str, before: list[str], after: list[str]) -> Row:
    """(method − full) with many cuts minus (method − full) without one, question by question, from −2 to 2."""
    # The interval is made for differences of scores in 0–1: half of each side is one, and the result is doubled again.
    plus, minus = [], []
    for one, other in zip(before, after, strict=True):
        plus.append((score(many.of[method][other]) + score(none.of["full"][one])) / 2)
        minus.append((score(many.of["full"][other]) + score(none.of[method][one])) / 2)
    half = paired_delta(plus, minus, [none.of["full"][one].cluster for one in before])
    return {key: value if value is None else 2 * value for key, value in estimate("effect", half).items()}


def better(study: Study) -> list[Row]:
    """Who is right where the other is wrong, by length and type of question; and some questions that only PEVLM gets."""
    rows: list[Row] = []
    for length in study.scale.lengths:
        found = study.answers(suite_of(length), [OWN, "full"], study.scale.questions(length))
        own, full = found.of[OWN], found.of["full"]
        kinds = dict.fromkeys(sample.strata["type"] for sample in found.samples)
        groups = {name: found.ids(name) for name in QUESTIONS}
        groups |= {kind: [each.id for each in found.samples if each.strata["type"] == kind] for kind in kinds}
        for name, ids in groups.items():
            if not ids:
                continue
            mine, theirs = ([score(each[id_]) for id_ in ids] for each in (own, full))
            clusters = [own[id_].cluster for id_ in ids]
            pairs = list(zip(mine, theirs, strict=True))
            counts = {
                "both": sum(a == b == 1 for a, b in pairs),
                "only_own": sum(a > b for a, b in pairs),
                "only_full": sum(a < b for a, b in pairs),
            }
            row = {
                "kind": "group",
                "length": length,
                "type": name,
                "order": asks("order", name),
                "n": len(ids),
                **counts,
            }
            p = significance.mcnemar(mine, theirs, clusters)
            rows.append(row | {"p": p, **estimate("delta", paired_delta(mine, theirs, clusters))})
        only = [each for each in found.samples if score(own[each.id]) > score(full[each.id])]
        for sample in only[:EXAMPLES]:
            said = {name: " ".join(each[sample.id].raw_text.split()) for name, each in (("own", own), ("full", full))}
            asked = {"id": sample.id, "question": sample.question, "answer": sample.answer}
            rows.append({"kind": "example", "length": length, **asked, **said})
    return rows
