"""``reference.json`` as Markdown. Every number in the text is read from the data; claims about large models name a paper."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from vlmbench.reference.inside_format import Model, beyond, difference, interval, mean, percent, table, two
from vlmbench.reference.inside_large import differences
from vlmbench.reference.inside_plots import PICTURES, types_of

ALT = {
    "types": "Accuracy by question type and length of the video",
    "needle": "Accuracy by depth of the needle and length of the video",
    "spans": "Attention of the answer token by layer, head and kind of token",
    "top": "Attention mass on the top keys by layer and head",
    "overlap": "Shared core neurons by layer",
}
NAMED_HEADS = 3
WORTH_NAMING = 0.01
"""Smallest share for which a head is named."""


def to_markdown(data: Mapping[str, Any], pictures: Sequence[str]) -> str:
    """The whole report; `pictures` are the paths of `PICTURES`, relative to it."""
    models: Mapping[str, Model] = data["models"]
    shown = {name: f"![{ALT[name]}]({path})" for name, path in zip(PICTURES, pictures, strict=True)}
    parts = [
        "# Inside the reference models",
        "Written from `reference.json` by `make reference-report`; do not edit. Full attention, float32, on a CPU; videos of "
        "the test split of `synthvideo`, all frames. Brackets are 95 % intervals clustered by video. Layers and heads count "
        "from 0.",
        _models(models),
        "## Accuracy by question type and length",
        shown["types"],
        *_each(models, _types),
        "## Accuracy by depth of the needle and length",
        "Each video holds a single event (the needle), at depth 0 at its very start and at depth 1 at its very end.",
        shown["needle"],
        *_each(models, _needle),
        "## Where the answer token looks",
        _probed(models),
        shown["spans"],
        *_each(models, _spans),
        "## What the top keys hold",
        _about_top(models),
        shown["top"],
        *_each(models, _top),
        "## Which neurons are active together",
        _about_overlap(models),
        shown["overlap"],
        *_each(models, _overlap),
        "## Where tiny models differ from large ones",
        "No large model was measured here. What is said of them is what the papers named found on theirs.",
        differences(models),
        "## Measured on",
        "\n".join(f"- {_machine(each)}" for each in data["measured_on"]),
    ]
    return "\n\n".join(parts) + "\n"


def _each(models: Mapping[str, Model], tell: Callable[[Model], Iterable[str]]) -> Iterable[str]:
    for name, found in models.items():
        yield f"**{name}**"
        yield from tell(found)


def _models(models: Mapping[str, Model]) -> str:
    rows = [
        [
            f"`{name}`",
            f"{found['parameters']:,}",
            str(found["layers"]),
            str(found["heads"]),
            str(found["neurons"]),
            f"`{(found['weights_sha256'] or found['checkpoint_hash'])[:12]}`",
            str(found["n_failed"]),
        ]
        for name, found in models.items()
    ]
    head = ["model", "parameters", "layers", "heads", "FFN neurons", "weights (SHA-256)", "questions that failed"]
    return table(head, rows)


# -- accuracies --------------------------------------------------------------------------------------------------------


def _types(found: Model) -> Iterable[str]:
    rows = {(row["type"], row["length"]): row for row in found["types"]}
    lengths = sorted({length for _, length in rows})
    head = ["type", *(f"{length} frames (n = {rows['all', length]['n']})" for length in lengths)]
    kinds = types_of({"": found})
    yield table(head, [[kind, *(interval(rows.get((kind, length))) for length in lengths)] for kind in kinds])
    for length in lengths:
        single = [rows[kind, length] for kind in kinds if kind != "all" and (kind, length) in rows]
        low, high = _ends(single)
        yield (
            f"At {length} frames {two(rows['all', length])} of the answers are right; the weakest type is {low['type']} "
            f"({interval(low)}), the strongest {high['type']} ({interval(high)})."
        )


def _needle(found: Model) -> Iterable[str]:
    rows = {(row["depth"], row["length"]): row for row in found["needle"]}
    depths, lengths = sorted({depth for depth, _ in rows}), sorted({length for _, length in rows})
    head = ["depth", *(f"{length} frames" for length in lengths)]
    yield table(head, [[f"{depth:g}", *(interval(rows[depth, length]) for length in lengths)] for depth in depths])
    for length in lengths:
        low, high = _ends([rows[depth, length] for depth in depths])
        if low["accuracy"] == high["accuracy"]:
            yield f"At {length} frames ({low['n']} questions a depth): {interval(low)} at every depth."
            continue
        apart = "do not overlap" if low["high"] < high["low"] else "overlap"
        yield (
            f"At {length} frames ({low['n']} questions a depth): lowest at depth {low['depth']:g} ({interval(low)}), highest "
            f"at depth {high['depth']:g} ({interval(high)}); these intervals {apart}."
        )


def _ends(rows: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The row with the lowest and the one with the highest accuracy."""
    return min(rows, key=lambda row: row["accuracy"]), max(rows, key=lambda row: row["accuracy"])


# -- inside ------------------------------------------------------------------------------------------------------------


def _probed(models: Mapping[str, Model]) -> str:
    probes = next(iter(models.values()))["probes"]
    return (
        f"Measured on {probes['n']} questions about {probes['videos']} videos of {probes['frames']} frames, of the types "
        f"{', '.join(probes['types'])}: those are about one or two events. The attention is that of the last prompt token, "
        "from which the answer's first token is read, with the family's eager attention. The sink is the first token; "
        "the needle is every visual token of the temporal units in which an event that the question is about is "
        "visible; separators are learned tokens that end a video. Shares of a head sum to 1."
    )


def _spans(found: Model) -> Iterable[str]:
    probes = found["probes"]
    shares, tokens = probes["shares"], probes["tokens"]
    kinds = [kind for kind in shares if tokens[kind]]
    total = sum(tokens.values())
    rows = [[str(layer), *(f"{fmean(shares[kind][layer]):.2f}" for kind in kinds)] for layer in range(found["layers"])]
    rows.append(["share of the prompt's tokens", *(f"{tokens[kind] / total:.3f}" for kind in kinds)])
    yield table(["layer, mean over heads", *kinds], rows)
    yield f"The prompt has {total:.0f} tokens on average, {tokens['needle']:.0f} of them in the needle."
    most = dict.fromkeys(kinds, 0)
    for layer, head in _heads(found):
        most[max(kinds, key=lambda kind: shares[kind][layer][head])] += 1
    n_heads = found["layers"] * found["heads"]
    yield (
        f"Of {n_heads} heads, the largest part goes to "
        + ", ".join(f"{kind} in {count}" for kind, count in most.items())
        + "."
    )
    due = tokens["needle"] / total
    lifts = [share / due for row in shares["needle"] for share in row]
    yield (
        f"{sum(lift > 1 for lift in lifts)} of {n_heads} heads give the needle more than its share of the tokens, at most "
        f"{max(lifts):.1f} times as much."
    )
    yield "\n".join(f"- most on {kind}: {_strongest(found, shares[kind])}" for kind in kinds)


def _strongest(found: Model, values: Sequence[Sequence[float]]) -> str:
    ranked = sorted(_heads(found), key=lambda place: -values[place[0]][place[1]])[:NAMED_HEADS]
    found_shares = [(layer, head, values[layer][head]) for layer, head in ranked]
    told = [f"layer {layer} head {head} ({share:.2f})" for layer, head, share in found_shares if share >= WORTH_NAMING]
    return ", ".join(told) or f"no head gives them {WORTH_NAMING}"


def _heads(found: Model) -> Iterable[tuple[int, int]]:
    return ((layer, head) for layer in range(found["layers"]) for head in range(found["heads"]))


def _about_top(models: Mapping[str, Model]) -> str:
    probes = next(iter(models.values()))["probes"]
    return (
        f"The attention mass on the top {percent(probes['top_keys'])} of each query's keys, averaged over queries with at "
        f"least as many keys as make this one whole key; uniform attention would give {probes['top_keys']:.2f}. Question "
        "tokens are all text behind the video."
    )


def _top(found: Model) -> Iterable[str]:
    top = found["probes"]["top"]
    rows = [[str(layer), *(_spread(top[kind][layer]) for kind in top)] for layer in range(found["layers"])]
    yield table(["layer", *(f"{kind} tokens: mean (lowest to highest head)" for kind in top)], rows)
    means = ", ".join(f"{mean(values):.2f} for {kind} tokens" for kind, values in top.items())
    yield f"Over all layers and heads: {means}."


def _spread(values: Sequence[float]) -> str:
    return f"{fmean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _about_overlap(models: Mapping[str, Model]) -> str:
    probes = next(iter(models.values()))["probes"]
    return (
        f"A token uses the {percent(probes['top_neurons'])} of FFN neurons (of act(gate) · up) that are largest by "
        "magnitude; the core of a set of tokens is the same number of neurons, those used by most of them. The table gives "
        "the intersection over union of two cores; the sets are the needle, as many other units spread over the video, and "
        "the question's tokens. CoreMatching (Wang et al. 2025) keeps the visual tokens that share most neurons with the "
        "prompt's core, of which the question is the part that says what to look for. The last column has Student's interval "
        "over videos."
    )


def _overlap(found: Model) -> Iterable[str]:
    probes = found["probes"]
    pairs, more = probes["overlap"], probes["overlap_more"]
    rows = [
        [
            str(layer),
            *(f"{values[layer]:.2f}" for values in pairs.values()),
            difference(each),
        ]
        for layer, each in enumerate(more)
    ]
    named = [pair.replace("-", " and ").replace("other", "other frames") for pair in pairs]
    yield table(["layer", *named, "first less second column"], rows)
    above, below = beyond(more)
    yield (
        f"By chance: {probes['overlap_chance']:.3f}. Beyond the error, the needle shares more neurons with the question than "
        f"other frames do in {above} of {found['layers']} layers, and fewer in {below}."
    )


# -- small things ------------------------------------------------------------------------------------------------------


def _machine(origin: Mapping[str, Any]) -> str:
    shown = ("python", "torch", "transformers", "numpy")
    packages = ", ".join(f"{name} {origin['versions'][name]}" for name in shown if name in origin["versions"])
    commit = f" at {origin['commit'][:10]}{' with changes' if origin['dirty'] else ''}" if origin["commit"] else ""
    return (
        f"{origin['cpu']}, cores: {origin['cores']}, threads: {origin['threads']}; vlmbench "
        f"{origin['versions']['vlmbench']}{commit}, {packages}"
    )
