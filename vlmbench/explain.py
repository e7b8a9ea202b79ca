"""`vlmbench explain A B`: in which recorded conditions two runs differ, and what each of them is known to do.

Numbers fail to reproduce for few reasons, and all of them are in the headers. What is said of each is either how this
program works or what users of other tools reported; the latter names its thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from vlmbench.loaded import Loaded, texts
from vlmbench.plain import cell
from vlmbench.spec import Spec
from vlmbench.tables import wrote

CAN = {"answers": "answers", "time": "times and memory", "both": "answers, times and memory"}


class Effect(NamedTuple):
    changes: str
    """A key of `CAN`."""
    text: str


EFFECTS: Mapping[str, Effect] = {
    "model": Effect("both", "another model"),
    "weights_hash": Effect("both", "other weights under the same name"),
    "revision": Effect("both", "weights and configuration of another commit of the hub repository"),
    "method": Effect("both", "what is meant to differ when methods are compared"),
    "params": Effect("both", "another setting of the method"),
    "method_hash": Effect("both", "the method's file changed; records are found by parameters, not by code"),
    "suite": Effect("both", "other questions"),
    "suite_version": Effect("answers", "samples, prompt or scorer changed: figures of two versions are not comparable"),
    "suite_hash": Effect("answers", "the data files differ, so the same id may be another question"),
    "frames": Effect(
        "both",
        "accuracy on video moves with the number of frames, and papers use different ones (Video-MME #32); prefill grows "
        "at least in proportion",
    ),
    "fps": Effect("both", "how many frames are taken, see frames"),
    "sampler": Effect("answers", "which frames are taken: at least four rules are in use among harnesses"),
    "decoder": Effect(
        "answers",
        "decoders can disagree about which picture a frame index names (decord #194); `vlmbench check invariance` counts flips",
    ),
    "max_pixels": Effect(
        "both",
        "the pixel budget sets the visual tokens; adapters of other tools hide theirs (lmms-eval #571, #808, #874, #920)",
    ),
    "min_pixels": Effect("both", "the pixel budget sets the visual tokens"),
    "prompt_style": Effect("answers", "the wording of the question and of its cue"),
    "max_new_tokens": Effect(
        "both", "longer answers take longer, and a cut one may not be readable; latency passes decode exactly so many"
    ),
    "attention": Effect(
        "both",
        "the kernel alone can move a score (transformers #35749: 81.6 against 72.6); `vlmbench check invariance` counts flips",
    ),
    "kernel": Effect(
        "both", "the attention that torch dispatched; a speed-up over a slower dense kernel is larger (VisionZip #24)"
    ),
    "vision_kernel": Effect("both", "the attention of the vision tower"),
    "dtype": Effect(
        "both", "near ties of greedy decoding flip with rounding; `vlmbench check invariance` counts flips"
    ),
    "device_type": Effect("both", "CPU and CUDA round differently; seconds are not comparable, ratios hardly"),
    "card": Effect(
        "time", "seconds are not comparable, and a speed-up depends on the card's ratio of compute to bandwidth"
    ),
    "driver": Effect("time", "kernels and clocks may differ"),
    "threads": Effect("time", "on a CPU both sides of a speed-up change, rarely by the same factor"),
    "torch": Effect("both", "kernels, and which of them dispatches"),
    "transformers": Effect(
        "both",
        "processors and chat templates change between versions; below 5.17 some mixes of media are encoded wrongly, and "
        "this program refuses them",
    ),
    "triton": Effect("time", "code generation of kernels"),
    "python": Effect("time", "overhead of the host"),
    "vlmbench": Effect("both", "this program"),
    "commit": Effect("both", "this program's source"),
    "dirty": Effect("both", "changes in the source that no commit holds"),
    "seed": Effect("both", "random weights; methods have seeds of their own"),
    "warmup": Effect("time", "rounds before the first that counts"),
    "repeats": Effect("time", "rounds that count: width of intervals, not their place"),
    "decoded_frames": Effect("both", "frames that the models were shown of the same samples, as recorded"),
    "frame_size": Effect("both", "pixels of the frames that were decoded from the same samples, as recorded"),
    "status": Effect("answers", "an unfinished run holds other samples"),
}
"""Field -> what a difference in it does; a package that is not named here: `OTHER`."""
OTHER = Effect("both", "no effect of it is known")


def explain(a: Loaded, b: Loaded) -> list[dict[str, Any]]:
    """A row for each recorded field that differs: field, a, b, changes, effect; those that change answers first."""
    facts = [_facts(run) for run in (a, b)]
    for each, more in zip(facts, _shown(a, b), strict=True):
        each |= more
    names = [*EFFECTS, *sorted((facts[0].keys() | facts[1].keys()) - EFFECTS.keys())]
    rows = []
    for name in names:
        first, second = (each.get(name, "none") for each in facts)
        if first != second and not (name == "method_hash" and a.method != b.method):
            effect = EFFECTS.get(name, OTHER)
            rows.append({"field": name, "a": first, "b": second, "changes": effect.changes, "effect": effect.text})
    return sorted(rows, key=lambda row: ("answers", "both", "time").index(row["changes"]))


def _facts(run: Loaded) -> dict[str, str]:
    spec, header, sessions = run.spec, run.header, wrote(run.view)
    found = {name: spec[name] for name in EFFECTS if name in spec and name not in ("method", "suite")}
    found |= {
        "method": run.method,
        "params": run.params,
        "suite": str(Spec(spec["suite"], texts(spec["suite_params"]))),
    }
    found |= {name: header.get(name) for name in ("method_hash", "suite_hash", "status")}
    several: dict[str, list[Any]] = {
        "card": [each["device"]["cpu" if each["device"]["type"] == "cpu" else "name"] for each in sessions],
        "kernel": [each["kernels"]["attention"] for each in sessions],
        "vision_kernel": [each["kernels"]["vision"] for each in sessions],
        **{name: [each.get(name) for each in sessions] for name in ("driver", "commit", "dirty")},
        **{name: [each["measure"][name] for each in sessions] for name in ("threads", "warmup", "repeats")},
    }
    for package in {name for each in sessions for name in each["versions"]}:
        several[package] = [each["versions"].get(package) for each in sessions]
    joined = {name: " and ".join(sorted({_text(value) for value in values})) for name, values in several.items()}
    return {name: _text(value) for name, value in found.items()} | joined


def _shown(a: Loaded, b: Loaded) -> tuple[dict[str, str], dict[str, str]]:
    """What was decoded of the samples that both hold, where that differs: of the first such sample."""
    found: tuple[dict[str, str], dict[str, str]] = ({}, {})
    for id_ in sorted(a.samples.keys() & b.samples.keys()):
        pair = (a.samples[id_], b.samples[id_])
        indices = [[frame.index for frame in each.frames] for each in pair]
        if indices[0] != indices[1] and "decoded_frames" not in found[0]:
            for each, own in zip(found, indices, strict=True):
                each["decoded_frames"] = f"{len(own)} of {id_}{_ends(own)}"
        if pair[0].size != pair[1].size and "frame_size" not in found[0]:
            for each, record in zip(found, pair, strict=True):
                each["frame_size"] = " × ".join(map(str, record.size)) if record.size else "none"
    return found


def _ends(indices: Sequence[int]) -> str:
    return f" ({indices[0]} to {indices[-1]})" if indices else ""


def _text(value: object) -> str:
    return "none" if value is None else str(value)


def to_markdown(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """A line for each difference, or one sentence when there is none."""
    if not rows:
        return f"{names[0]} and {names[1]} differ in nothing that is recorded.\n"
    lines = ["| what | A | B | it can change | known |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        cells = (row["field"], row["a"], row["b"], CAN[row["changes"]], row["effect"])
        lines.append(f"| {' | '.join(map(cell, cells))} |")
    return "\n".join([*lines, "", f"- A: {cell(names[0])}", f"- B: {cell(names[1])}"]) + "\n"
