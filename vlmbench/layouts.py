"""The layouts of `vlmbench table --layout`, as papers print their results; each is made of the rows of `report`.

A layout says which fields may differ between the runs that it shows together; any other difference is refused by
`comparable.check`. Accuracies are in percent here, and unscaled, as everywhere, in CSV and JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from vlmbench import comparable
from vlmbench.comparable import Item
from vlmbench.errors import UsageError
from vlmbench.laid_out import Band, Cell, Column, Line, Table, mean_cell
from vlmbench.loaded import BASELINE, Loaded
from vlmbench.record import Pass
from vlmbench.report import REFERENCES, loaded_rows
from vlmbench.tables import MARKS, setting_text, timed_text, versions_text, wrote
from vlmbench.work import FORMULA

Pair = tuple[Loaded, Mapping[str, Any]]
"""A run and its row in the plain table."""

FREE: Mapping[str, tuple[str, ...]] = {
    "efficiency": (),
    "image-retention": comparable.OF_SUITE,
    "video-retention": comparable.OF_SUITE,
    "models-as-bands": (*comparable.OF_MODEL, *comparable.OF_SUITE),
    "scaling": comparable.OF_LENGTH,
}
"""Layout of stored runs -> fields that differ on purpose between its places."""
NAMES = (*FREE, "latency-budget")
_MARKED = ("below-trivial", "masked", "inactive>10%")
"""Marks that stand beside a method's name; the others hold for whole tables."""


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
        items = [Item(_name(run), facts[run.view.folder], places[run.view.folder]) for run, _ in part]
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


def _name(run: Loaded) -> str:
    return f"{run.method}:{run.params}" if run.params else run.method


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
    lines = [_line([(run.suite, run, row)], columns) for run, row in pairs]
    first = pairs[0][0]
    title = f"{first.spec['model']} on {first.suite}"
    return Table("efficiency", title, columns, _by_retention(lines), _notes(pairs, columns))


def _retention(layout: str, more: Sequence[Column]) -> Callable[[Sequence[Pair]], Table]:
    """Accuracy on every suite at each budget of visual tokens."""

    def make(pairs: Sequence[Pair]) -> Table:
        suites = list(dict.fromkeys(run.suite for run, _ in pairs))
        columns = [*more, *_suite_columns(suites)]
        lines = [_line(runs, columns, len(suites)) for runs in _methods(pairs)]
        title = str(pairs[0][0].spec["model"])
        return Table(layout, title, columns, _by_retention(lines), _notes(pairs, columns))

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
    """One band a model."""
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
        bands.append(Band(", ".join(filter(None, parts)), [_line(runs, columns, places) for runs in _methods(own)]))
    return Table("models-as-bands", "Models", columns, bands, _notes(pairs, columns))


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
    lines = [_line(runs, columns) for runs in _methods(pairs, _length)]
    first = pairs[0][0]
    title = f"{first.spec['model']} on {first.spec['suite']}, first token and peak memory by visual tokens of full attention"
    return Table("scaling", title, columns, _by_training(lines, ""), _notes(pairs, columns))


def _length(run: Loaded) -> str:
    return run.suite if run.spec["frames"] is None else f"{run.suite} at {run.spec['frames']} frames"


_MAKE: Mapping[str, Callable[[Sequence[Pair]], Table]] = {
    "efficiency": _efficiency,
    "image-retention": _retention("image-retention", ()),
    "video-retention": _retention("video-retention", _VIDEO),
    "models-as-bands": _models,
    "scaling": _scaling,
}


# Lines and bands.


def _methods(
    pairs: Iterable[Pair], place: Callable[[Loaded], str] = lambda run: run.suite
) -> list[list[tuple[str, Loaded, Any]]]:
    """(place, run, row) of every method, full attention first."""
    found: dict[str, list[tuple[str, Loaded, Any]]] = {}
    for run, row in pairs:
        found.setdefault(_name(run), []).append((place(run), run, row))
    return sorted(found.values(), key=lambda runs: runs[0][1].method != BASELINE)


def _line(
    runs: Sequence[tuple[str, Loaded, Mapping[str, Any]]], columns: Sequence[Column], places: int | None = None
) -> Line:
    """One method's figures. A mean is over all of `places`: without one of them there is none."""
    cells: dict[str, Cell] = {}
    for column in columns:
        own = [_cell(run, row, column.key.partition(":")[0]) for place, run, row in runs if column.place in ("", place)]
        whole = column.place or places in (None, len(own))
        cells[column.key] = mean_cell(own) if own and whole else Cell()
    for place, _, row in runs:
        cells[f"full:{place}"] = Cell(row["full"]["accuracy"] if row["full"] else None)
    cells["retained"] = mean_cell([_cell(run, row, "retained") for _, run, row in runs])
    _, run, _ = runs[0]
    marks = [mark for mark in _MARKED if any(mark in row["marks"] for _, _, row in runs)]
    by_place = {place: each for place, each, _ in runs}
    trained = any("trained" in row["marks"] for _, _, row in runs)
    return Line(
        run.method, run.params, by_place, cells, marks, run.method == BASELINE, run.method not in REFERENCES, trained
    )


def _cell(run: Loaded, row: Mapping[str, Any], name: str) -> Cell:
    """One figure of a run; the shares are of full attention's on the same work."""
    full = row["full"]
    if name in ("flops_share", "retained", "accuracy_share"):
        source = {"flops_share": "flops", "retained": "n_visual_tokens", "accuracy_share": "accuracy"}[name]
        own, dense = row[source], full[source] if full else None
        return Cell(own / dense) if own is not None and dense else Cell()
    if name == "tokens_per_s":
        return Cell(1 / row["decode_s_per_token"]) if row["decode_s_per_token"] else Cell()
    value, low, high = row[name], row.get(f"{name}_low"), row.get(f"{name}_high")
    if value is None:
        return Cell(oom=_ran_out(run, name))
    if name == "accuracy":
        statuses = {each.status for each in run.accuracy.values()}
        if statuses == {"oom"}:
            return Cell(oom=True)
        coverage = len(run.finished) / len(run.accuracy) if len(run.finished) < len(run.accuracy) else None
        return Cell(value, low, high, coverage=coverage)
    return Cell(value, low, high)


def _ran_out(run: Loaded, name: str) -> bool:
    pass_: Pass = "memory" if name.endswith("_bytes") else "latency"
    return name not in ("flops", "n_visual_tokens") and any(
        each.status == "oom" for each in run.view.records.of(pass_).values()
    )


def _by_retention(lines: Sequence[Line]) -> list[Band]:
    """Full attention, then bands from most to fewest visual tokens, those of trained methods beside them."""
    bands = [Band(_title(line, upper=True), [line]) for line in lines if line.reference]
    keyed: dict[tuple[float, bool], list[Line]] = {}
    for line in lines:
        if not line.reference:
            share = line.cells["retained"].value
            keyed.setdefault((-1.0 if share is None else round(share, 2), line.trained), []).append(line)
    both = any(trained for _, trained in keyed)
    for (_, trained), own in sorted(keyed.items(), key=lambda item: (-item[0][0], item[0][1])):
        kind = f", {'trained' if trained else 'training-free'}" if both else ""
        bands.append(Band(_title(own[0]) + kind, own))
    return bands


def _title(line: Line, upper: bool = False) -> str:
    counts = {run.n_visual_tokens for run in line.runs.values() if run.n_visual_tokens is not None}
    tokens = f"{counts.pop():.0f} visual tokens" if len(counts) == 1 else "visual tokens"
    share = line.cells["retained"].value
    if upper:
        return f"Full attention, {tokens} (100 %)"
    if share is None:
        return f"{tokens[:1].upper()}{tokens[1:]}"
    if round(share, 2) == 1:
        return f"All {tokens}"
    if share == 0:
        return "No visual tokens"
    return f"Retain {tokens} ({100 * share:.0f} %, ↓ {100 * (1 - share):.0f} %)"


def _by_training(lines: Sequence[Line], title: str) -> list[Band]:
    bands = []
    for trained in (False, True):
        own = [line for line in lines if line.trained == trained]
        if own:
            bands.append(Band("Trained methods" if trained else title, own))
    return bands


# What stands below.


def _notes(pairs: Sequence[Pair], columns: Sequence[Column]) -> list[str]:
    """From the headers and records: what the figures are, on what, with which versions."""
    runs = [run for run, _ in pairs]
    views = [run.view for run in runs]
    keys = {column.key.partition(":")[0] for column in columns}
    said = []
    if keys & {"accuracy", "accuracy_share"}:
        counts = sorted({len(run.accuracy) for run in runs if run.accuracy})
        said.append(f"accuracy: {span_text(counts)} questions each suite, unfinished ones wrong")
    if any(key.startswith("speedup") for key in keys):
        said.append(
            "×: over full attention with the best dense kernel, above 1 is faster, median of paired ratios of rounds in turns"
        )
    said.append(
        "bold: best of a band, underlined: second best, each only where the difference to the next exceeds its 95 % error "
        f"(clustered by video; times: paired rounds); {', '.join(REFERENCES)} are not ranked"
    )
    if keys & {"flops", "flops_share"}:
        said.append(f"FLOPs: {FORMULA}")
    used = {mark for _, row in pairs for mark in row["marks"]}
    said += [f"{mark}: {text}" for mark, text in MARKS.items() if mark in used]
    sessions = [(run.header, session) for run in runs for session in wrote(run.view)]
    said += dict.fromkeys(setting_text(header, session) for header, session in sessions)
    said.append(f"batch 1; {_pixels(runs)}")
    said += filter(None, [timed_text(views)])
    said += dict.fromkeys(versions_text(session) for _, session in sessions)
    for run in runs:
        if run.header["status"] != "done":
            said.append(f"{run.view.folder.name}: not complete ({run.header['status']})")
    return said


def _pixels(runs: Sequence[Loaded]) -> str:
    sizes = sorted({each.size for run in runs for each in run.samples.values() if each.size})
    shown = ", ".join(f"{width} × {height}" for height, width in sizes[:3]) + (", …" if len(sizes) > 3 else "")
    limits = {(run.spec["min_pixels"], run.spec["max_pixels"]) for run in runs}
    budgets = "; ".join(
        "the model's own pixel budget"
        if pair == (None, None)
        else f"pixels from {pair[0] or 'the least'} to {pair[1] or 'any'}"
        for pair in sorted(limits, key=str)
    )
    return f"decoded frames of {shown} pixels, {budgets}" if shown else budgets


def span_text(values: Sequence[int]) -> str:
    """``66`` or ``60 to 66``."""
    return "no" if not values else str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"
