"""``pevlm.json`` as Markdown. Every number and every verdict is read from the rows; what a paper said names its source."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from vlmbench import claims_text_accuracy as accuracy
from vlmbench import claims_text_time as time

Row = Mapping[str, Any]


class Part(NamedTuple):
    title: str
    said: str
    """What was claimed, and by whom, or what is asked."""
    tell: Callable[[Sequence[Row]], Iterable[str]]
    """Tables and sentences of one model's rows."""


PARTS: dict[str, Part] = {
    "ladder": Part(
        "From plain blocks to PEVLM",
        "Reviewers of the paper: of its three steps, sequential positions bring the most visible gain, blocks of frames a "
        "marginal one, frames in the sink the rest.",
        accuracy.ladder,
    ),
    "rivals": Part(
        "Against the other parallel encodings, and against full attention",
        "The paper: up to 8.37 points above earlier methods on LongVideoBench (first version), and on a par with full "
        "attention. Here: `block`, `ape` and `star` with their defaults.",
        accuracy.rivals,
    ),
    "grid": Part(
        "Sink and block",
        "Reviewers of the paper: accuracy is sensitive to both, and no choice is best everywhere.",
        accuracy.grid,
    ),
    "cuts": Part(
        "Videos with many scene cuts",
        "Asked by us: the same events and questions, with the background cut often and never.",
        accuracy.cuts,
    ),
    "better": Part(
        "Where PEVLM is better than full attention",
        "The paper: it matches full attention, and in some settings is better.",
        accuracy.better,
    ),
    "latency": Part(
        "Accuracy under a latency limit",
        "The paper: from 23.26 % to 61.03 % under a strict limit, of which the model and the limit are not known to us.",
        time.latency,
    ),
    "lengths": Part(
        "Prefill time against length",
        "The paper: from O((T·n)²) to O(T·n) query-key pairs.",
        time.lengths,
    ),
    "speed": Part(
        "Prefill, its bound, and the price",
        "Asked by us: at least 0.8 of Amdahl's bound on prefill, at most 2 points below full attention with the lower end of "
        "the interval above −5.",
        time.speed,
    ),
    "questions": Part(
        "More questions on one video",
        "Asked by us: which methods may keep a video's keys and values for the next question, and what that is worth.",
        time.questions,
    ),
}


def to_markdown(data: Mapping[str, Any]) -> str:
    """The whole report."""
    names = [each["model"] for each in data["models"]]
    parts = [
        "# PEVLM's claims in miniature",
        "Written from `pevlm.json` by `make claims`; do not edit. Generated videos (`synthvideo`, all frames), float32, on a "
        "CPU: read ratios, not seconds. Brackets are 95 % intervals clustered by video; a difference is over the same "
        "questions, and one that failed counts as wrong. *Order* questions ask what came when, *other* ones do not. A "
        "verdict is about these models and videos alone: **Held** and **Did not hold** mean that the whole interval says so, "
        "**Open** that it holds both or is not known; frames in time and tokens are counted, and have none.",
        *(
            f"`{each['model']}` is not shipped in this checkout: nothing of it is measured."
            for each in data["models"]
            if each["weights_hash"] is None
        ),
    ]
    for name, part in PARTS.items():
        parts += [f"## {part.title}", part.said]
        for model in names:
            rows = [row for row in data["rows"] if (row["part"], row["model"]) == (name, model)]
            parts += [f"**{model}**", *part.tell(rows)] if rows else [f"**{model}**: not measured."]
        if name == "grid":
            parts += accuracy.optima([row for row in data["rows"] if row["part"] == name])
    parts += ["## Measured on", *_threads(data["measured_on"]), _machines(data["measured_on"])]
    return "\n\n".join(parts) + "\n"


def _threads(origins: Sequence[Mapping[str, str]]) -> list[str]:
    """A sentence where answers of several numbers of threads stand in one section, which no row tells."""
    counts: dict[tuple[str, str], set[str]] = {}
    for each in origins:
        if found := re.search(r"(\d+) threads", each["on"]):
            counts.setdefault((each["part"], each["model"]), set()).add(found[1])
    mixed = [f"{part} of {model}" for (part, model), threads in counts.items() if len(threads) > 1]
    if not mixed:
        return []
    return [
        f"In these sections runs of several numbers of threads stand together, and which row is of which was not recorded: "
        f"{', '.join(mixed)}. A ratio is of rounds of one process, and so of one number; seconds of two rows need not be."
    ]


def _machines(origins: Sequence[Mapping[str, str]]) -> str:
    ordered = sorted(origins, key=lambda each: each["on"])
    lines = []
    for on, group in groupby(ordered, key=lambda each: each["on"]):
        where = dict.fromkeys(f"{each['part']} of {each['model']}" for each in group)
        lines.append(f"- {on} ({', '.join(where)})")
    return "\n".join(lines) or "Nothing."
