"""The layouts of `vlmbench table --layout`, as papers print their results; each is made of the rows of `report`.

A layout says which fields may differ between the runs that it shows together; any other difference is refused by
`comparable.check`. Accuracies are in percent here, and unscaled, as everywhere, in CSV and JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from vlmbench import comparable
from vlmbench.comparable import Item
from vlmbench.errors import UsageError
from vlmbench.laid_lines import Pair, by_retention, by_training, line, method_name, methods
from vlmbench.laid_notes import notes
from vlmbench.laid_out import Band, Column, Table
from vlmbench.loaded import BASELINE, Loaded
from vlmbench.report import loaded_rows

FREE: Mapping[str, tuple[str, ...]] = {
    "efficiency": (),
    "image-retention": comparable.OF_SUITE,
    "video-retention": comparable.OF_SUITE,
    "models-as-bands": (*comparable.OF_MODEL, *comparable.OF_SUITE),
    "scaling": comparable.OF_LENGTH,
}
"""Layout of stored runs -> fields that differ on purpose between its places."""
NAMES = (*FREE, "latency-budget")


def tables(folder: Path, layout: str, split: str | None = None) -> list[Table]:
    """The tables of a results folder, one unless they are split. Raises `UsageError`."""
    if layout == "latency-budget":
        from vlmbench import budget_layout

        return budget_layout.tables(folder, split)
    pairs = _with_full(loaded_rows(folder))
    if not pairs:
        raise UsageError(f"{folder} holds no results of a real model; name a folder that `vlmbench run --out` wrote.")
    try:
        known = [(comparable.facts(run), (run, row)) for run, row in pairs]
    except (KeyError, TypeError) as error:
        raise UsageError(f"{folder} holds a run whose header lacks {error}; run it again with --fresh.") from error
    parts = comparable.split(known, split) if split else {"": pairs}
    facts = {run.view.folder: each for each, (run, _) in known}
    found = []
    for value, part in parts.items():
        places = {run.view.folder: _place(layout, run) for run, _ in part}
        items = [Item(method_name(run), facts[run.view.folder], places[run.view.folder]) for run, _ in part]
        comparable.check(items, FREE[layout])
        _refuse_twins(items)
        table = _MAKE[layout](part)
        table.split = f"{split}={value}" if split else ""
        found.append(table)
    return found


def _with_full(pairs: Sequence[tuple[Loaded, dict[str, Any]]]) -> list[Pair]:
    """Every row knows under ``full`` the row of full attention on the same work."""
    full = {run.group: row for run, row in pairs if run.method == BASELINE}
    return [(run, {**row, "full": full.get(run.group)}) for run, row in pairs]


def _place(layout: str, run: Loaded) -> tuple[str, ...]:
    return {
        "efficiency": (),
        "models-as-bands": (str(run.spec["model"]), run.suite),
        "scaling": (run.suite, str(run.spec["frames"])),
    }.get(layout, (run.suite,))


def _refuse_twins(items: Sequence[Item]) -> None:
    """A method twice in one place, which no field of `comparable` tells apart."""
    seen: set[tuple[str, Any]] = set()
    for item in items:
        if (item.name, item.place) in seen:
            raise UsageError(f"The folder holds {item.name} twice for the same work; name one that holds it once.")
        seen.add((item.name, item.place))


# The layouts.

_ACCURACY = {"scale": 100.0, "form": ".1f", "kind": "accuracy"}


def _efficiency(pairs: Sequence[Pair]) -> Table:
    """What a method costs: bands by visual tokens that are left."""
    columns = [
        Column("n_visual_tokens", "visual tokens", form=".0f"),
        Column("prefill_s", "s", "prefill"),
        Column("speedup_prefill", "×", "prefill", form=".2f", kind="speed", span="prefill"),
        Column("ttft_s", "s", "first token"),
        Column("speedup_ttft", "×", "first token", form=".2f", kind="speed", span="ttft"),
        Column("decode_s_per_token", "ms", "decode, a token", scale=1e3),
        Column("speedup_decode", "×", "decode, a token", form=".2f", kind="speed", span="decode"),
        Column("e2e_s", "s", "end to end"),
        Column("speedup_e2e", "×", "end to end", form=".2f", kind="speed", span="e2e"),
        Column("peak_bytes", "peak, GiB", scale=2.0**-30, kind="exact", better=-1),
        Column("kv_bytes", "KV, MiB", scale=2.0**-20, kind="exact", better=-1),
        Column("flops", "TFLOPs", scale=1e-12, kind="exact", better=-1),
        Column("accuracy", "accuracy, %", **_ACCURACY),  # type: ignore[arg-type]
    ]
    lines = [line([(run.suite, run, row)], columns) for run, row in pairs]
    first = pairs[0][0]
    title = f"{first.spec['model']} on {first.suite}"
    return Table("efficiency", title, columns, by_retention(lines), notes(pairs, columns))


def _retention(layout: str, more: Sequence[Column]) -> Callable[[Sequence[Pair]], Table]:
    """Accuracy on every suite at each budget of visual tokens."""

    def make(pairs: Sequence[Pair]) -> Table:
        suites = list(dict.fromkeys(run.suite for run, _ in pairs))
        columns = [*more, *_suite_columns(suites)]
        lines = [line(runs, columns, len(suites)) for runs in methods(pairs)]
        title = str(pairs[0][0].spec["model"])
        return Table(layout, title, columns, by_retention(lines), notes(pairs, columns))

    return make


_VIDEO = (
    Column("flops", "TFLOPs", "prefill", scale=1e-12, kind="exact", better=-1),
    Column("flops_share", "of full, %", "prefill", scale=100.0, kind="exact", better=-1),
    Column("ttft_s", "ms", "first token", scale=1e3),
    Column("speedup_ttft", "×", "first token", form=".2f", kind="speed", span="ttft"),
    Column("tokens_per_s", "tokens/s"),
    Column("retained", "tokens kept, %", scale=100.0),
)


def _suite_columns(suites: Sequence[str]) -> list[Column]:
    own = [
        Column(f"accuracy:{suite}", suite, "accuracy, %", place=suite, **_ACCURACY)  # type: ignore[arg-type]
        for suite in suites
    ]
    average = Column("accuracy_share", "mean, % of full", scale=100.0, form=".1f", kind="average")
    return [*own, average]


def _models(pairs: Sequence[Pair]) -> Table:
    """One band a model, and one for those of its methods that were trained."""
    suites = list(dict.fromkeys(run.suite for run, _ in pairs))
    share = Column("flops_share", "FLOPs, % of full", scale=100.0, kind="exact", better=-1)
    columns = [share, *_suite_columns(suites)]
    bands = []
    for model, group in groupby(pairs, key=lambda pair: str(pair[0].spec["model"])):
        own = list(group)
        places = len({run.suite for run, _ in own})
        full = [row for run, row in own if run.method == BASELINE and row["n_visual_tokens"] is not None]
        counts = "/".join(dict.fromkeys(f"{row['n_visual_tokens']:.0f}" for row in full))
        frames = "/".join(dict.fromkeys(str(row["frames"]) for row in full if row["frames"] is not None))
        parts = [model, f"{frames} frames" if frames else "", f"{counts} visual tokens" if counts else ""]
        lines = [line(runs, columns, places) for runs in methods(own)]
        for kind in ("", "trained"):
            if chosen := [each for each in lines if each.trained == bool(kind)]:
                bands.append(Band(", ".join(filter(None, (*parts, kind))), chosen))
    return Table("models-as-bands", "Models", columns, bands, notes(pairs, columns))


def _scaling(pairs: Sequence[Pair]) -> Table:
    """Time to the first token at every length; a length is known by full attention's visual tokens."""
    tokens: dict[str, float] = {}
    for run, row in pairs:
        place = _length(run)
        tokens[place] = max(tokens.get(place, 0.0), row["n_visual_tokens"] or 0.0)
    places = sorted(tokens, key=lambda place: tokens[place])
    columns = []
    for place in places:
        head = f"{tokens[place]:.0f} tokens ({place})" if len(places) > len(set(tokens.values())) else ""
        group = head or f"{tokens[place]:.0f} tokens"
        columns += [
            Column(f"ttft_s:{place}", "s", group, place=place),
            Column(f"speedup_ttft:{place}", "×", group, form=".2f", kind="speed", span="ttft", place=place),
            Column(f"peak_bytes:{place}", "GiB", group, scale=2.0**-30, kind="exact", better=-1, place=place),
        ]
    lines = [line(runs, columns) for runs in methods(pairs, _length)]
    first = pairs[0][0]
    title = f"{first.spec['model']} on {first.spec['suite']}, first token and peak memory by visual tokens of full attention"
    return Table("scaling", title, columns, by_training(lines, ""), notes(pairs, columns))


def _length(run: Loaded) -> str:
    return run.suite if run.spec["frames"] is None else f"{run.suite} at {run.spec['frames']} frames"


_MAKE: Mapping[str, Callable[[Sequence[Pair]], Table]] = {
    "efficiency": _efficiency,
    "image-retention": _retention("image-retention", ()),
    "video-retention": _retention("video-retention", _VIDEO),
    "models-as-bands": _models,
    "scaling": _scaling,
}
