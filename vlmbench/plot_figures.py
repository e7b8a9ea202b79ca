"""How the figures of `vlmbench plot` are drawn: units on every axis, intervals at every point, colours that all can tell.

Colours are Okabe and Ito's and the maps are cividis, which keep their order for colour-blind readers and in grey; markers
tell methods apart once more. No figure touches pyplot, so nothing outlives the call.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from vlmbench.loaded import BASELINE, Loaded
from vlmbench.plain import printable
from vlmbench.report import span_seconds
from vlmbench.spec import joined, parse
from vlmbench.stats import MIN_CLUSTERS, t_quantile

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C8C")
MARKERS = "osD^vPX*<>"
LINES = ("-", "--", "-.", ":")
"""Lines that lie on each other, as memory often does, still show how many they are."""
STAGES = ("video", "preprocess", "transfer", "vision", "prepare", "prefill", "decode", "other")
STAGE_COLOURS = ("#8C8C8C", "#F0E442", "#E69F00", "#56B4E9", "#CC79A7", "#0072B2", "#009E73", "#D9D9D9")


@dataclass(frozen=True)
class Point:
    """A run with its row of the table."""

    run: Loaded
    row: Mapping[str, Any]

    @property
    def name(self) -> str:
        return joined(self.run.method, self.run.params)

    @property
    def length(self) -> int | None:
        found = self.run.spec["suite_params"].get("length")
        return None if found is None else int(found)

    @property
    def depth(self) -> float | None:
        found = self.run.spec["suite_params"].get("depth")
        return None if found is None else float(found)


def labels(points: Sequence[Point]) -> dict[str, str]:
    """Name -> the method, with those of its parameters in which the figure's runs of it differ."""
    runs = {each.name: each.run for each in points}
    found = {}
    for name, run in runs.items():
        twins = [parse(f"m:{other.params}").params for other in runs.values() if other.method == run.method]
        own = parse(f"m:{run.params}").params
        differ = [key for key in own if any(other.get(key) != own[key] for other in twins)]
        shown = ",".join(f"{key}={own[key]}" for key in differ)
        found[name] = text(joined(run.method, shown))
    return found


def text(value: object) -> str:
    """A label: control characters and formulas are shown, not obeyed."""
    return printable(value).replace("$", r"\$")


def _looks(points: Sequence[Point]) -> dict[str, tuple[str, str]]:
    """Name -> (colour, marker), the same in every panel, full attention black."""
    names = sorted({each.name: None for each in points}, key=lambda name: (name != BASELINE, name))
    return {name: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(names)}


def _figure(width: float, height: float, columns: int = 1, **options: Any) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    found = figure.subplots(1, columns, squeeze=False, **options)
    return figure, list(found[0])


def _where(point: Point, suite: str = "") -> str:
    """What was measured on what; `suite` where the figure has several of its lengths."""
    spec, device = point.run.spec, point.run.header["device"]
    name = device["cpu"] if device["type"] == "cpu" else device["name"]
    return text(f"{spec['model']} on {suite or point.run.suite}, {name}, {spec['dtype']}")


def _seconds(row: Mapping[str, Any], dense: float | None, span: str) -> tuple[float, float]:
    """How far the interval reaches below and above the row's seconds: the speed-up's, in the seconds of full attention."""
    value, low, high = row[f"{span}_s"], row[f"speedup_{span}_low"], row[f"speedup_{span}_high"]
    middle = row[f"speedup_{span}"]
    if dense is None or low is None or not middle:
        return 0.0, 0.0
    return value * (1 - middle / high), value * (middle / low - 1)


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (seconds, accuracy) that no other beats in both, from the fastest on."""
    found: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not found or points[index][1] > points[found[-1]][1]:
            found.append(index)
    return found


def pareto(points: Sequence[Point]) -> Figure:
    """Accuracy against the time of a sample, with the front of those that none beats in both."""
    figure, (axes,) = _figure(7, 4.6)
    looks, names = _looks(points), labels(points)
    dense = next((each.row["e2e_s"] for each in points if each.run.method == BASELINE), None)
    places = [(each.row["e2e_s"], 100 * each.row["accuracy"]) for each in points]
    best = front(places)
    line = [places[i] for i in best]
    axes.plot(*zip(*line, strict=True), color="#8C8C8C", linewidth=1, drawstyle="steps-post", zorder=1)
    for index, (each, (x, y)) in enumerate(zip(points, places, strict=True)):
        colour, marker = looks[each.name]
        left, right = _seconds(each.row, dense, "e2e")
        low, high = (100 * each.row[f"accuracy_{end}"] for end in ("low", "high"))
        fill = colour if index in best else "white"
        axes.errorbar(
            x, y, xerr=[[left], [right]], yerr=[[y - low], [high - y]], color=colour, marker=marker, markersize=7,
            markerfacecolor=fill, linewidth=0, elinewidth=1, capsize=2, label=names[each.name], zorder=2,
        )  # fmt: skip
    axes.set_xscale("log")
    _plain_ticks(axes, "x")
    axes.set_xlabel("end to end, s a sample (log)")
    axes.set_ylabel("accuracy, %")
    axes.set_title(_where(points[0]), fontsize=9)
    axes.grid(alpha=0.25)
    _legend(axes)
    _below(figure, "filled and joined: beaten by none in both; bars: 95 % intervals, times by the speed-up's")
    return figure


def scaling(points: Sequence[Point]) -> Figure:
    """Time to the first token and peak memory against length, both axes logarithmic."""
    figure, panels = _figure(10, 4.2, 2)
    looks, names = _looks(points), labels(points)
    dense = {each.row["full_tokens"]: each.row["ttft_s"] for each in points if each.run.method == BASELINE}
    for number, (name, (colour, marker)) in enumerate(looks.items()):
        own = sorted((each for each in points if each.name == name), key=lambda each: each.row["full_tokens"])
        x = [each.row["full_tokens"] for each in own]
        errors = [_seconds(each.row, dense.get(each.row["full_tokens"]), "ttft") for each in own]
        style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 6, "linewidth": 1.3}
        style |= {"linestyle": LINES[number % len(LINES)], "markerfacecolor": "none"}
        axes = panels[0]
        axes.errorbar(
            x, [each.row["ttft_s"] for each in own], yerr=list(zip(*errors, strict=True)), capsize=2,
            label=names[name], **style,
        )  # fmt: skip
        held = [(a, each.row["peak_bytes"] / 2**30) for a, each in zip(x, own, strict=True) if each.row["peak_bytes"]]
        if held:
            panels[1].plot(*zip(*held, strict=True), label=names[name], **style)
    for axes, label in zip(panels, ("first token, s (log)", "peak memory, GiB (log)"), strict=True):
        axes.set_xscale("log")
        axes.set_yscale("log")
        _plain_ticks(axes, "x")
        _plain_ticks(axes, "y")
        axes.set_xlabel("visual tokens of full attention (log)")
        axes.set_ylabel(label)
        axes.grid(alpha=0.25)
    figure.suptitle(_where(points[0], points[0].run.spec["suite"]), fontsize=9)
    _legend(panels[1] if panels[1].lines else panels[0])
    _below(figure, "bars: 95 % intervals of the speed-up over full attention in turns; bytes have no error")
    return figure


def stages(points: Sequence[Point]) -> Figure:
    """Where the seconds of a sample go: means over videos, which add up to the whole."""
    figure, (axes,) = _figure(8, 1.4 + 0.38 * len(points))
    names = labels(points)
    shown, drawn = [], False
    for place, each in enumerate(points):
        timings = [record.timing for record in each.run.latency.values() if record.timing]
        left = 0.0
        for stage, colour in zip(STAGES, STAGE_COLOURS, strict=True):
            seconds = [sum(t.decode_s) if stage == "decode" else getattr(t, f"{stage}_s") for t in timings]
            axes.barh(place, fmean(seconds), left=left, color=colour, edgecolor="white", linewidth=0.4,
                      label=None if place else stage)  # fmt: skip
            left += fmean(seconds)
        whole = [span_seconds(timing, "e2e") for timing in timings]
        if len(whole) >= MIN_CLUSTERS:
            half = t_quantile(len(whole) - 1) * stdev(whole) / math.sqrt(len(whole))
            axes.errorbar(fmean(whole), place, xerr=half, color="black", capsize=2, linewidth=0, elinewidth=1)
            drawn = True
        shown.append(names[each.name])
    axes.set_yticks(range(len(shown)), shown)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds a sample, mean over videos")
    axes.set_title(_where(points[0]), fontsize=9)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    _legend(axes)
    interval = "lines: 95 % interval of the whole over videos, which differ in length"
    said = interval if drawn else f"no interval: fewer than {MIN_CLUSTERS} videos"
    _below(figure, f"{said}; compare methods by their ratios")
    return figure


def needle(points: Sequence[Point]) -> Figure:
    """Accuracy by length and depth of the only event, a map for each method."""
    names, looks = labels(points), _looks(points)
    lengths, depths = (sorted({getattr(each, name) or 0 for each in points}) for name in ("length", "depth"))
    wide, high = 1.2 + 0.75 * len(lengths), 1.6 + 0.42 * len(depths)
    figure, panels = _figure(wide * len(looks) + 1, high, len(looks), sharey=True)
    for axes, name in zip(panels, looks, strict=True):
        known = {(each.length or 0, each.depth): each.row for each in points if each.name == name}
        grid = [[_percent(known.get((length, depth))) for length in lengths] for depth in depths]
        image = axes.imshow(grid, cmap="cividis", vmin=0, vmax=100, aspect="auto")
        for y, depth in enumerate(depths):
            for x, length in enumerate(lengths):
                row = known.get((length, depth))
                if row is not None:
                    half = 50 * (row["accuracy_high"] - row["accuracy_low"])
                    value = _percent(row)
                    colour = "black" if value > 55 else "white"
                    axes.text(x, y, f"{value:.0f}\n±{half:.0f}", ha="center", va="center", fontsize=7, color=colour)
        axes.set_xticks(range(len(lengths)), [str(each) for each in lengths])
        axes.set_yticks(range(len(depths)), [f"{100 * each:.0f}" for each in depths])
        axes.set_xticks([x + 0.5 for x in range(len(lengths) - 1)], minor=True)
        axes.set_yticks([y + 0.5 for y in range(len(depths) - 1)], minor=True)
        axes.grid(which="minor", color="white")
        axes.tick_params(which="minor", length=0)
        axes.set_xlabel("frames")
        axes.set_title(names[name], fontsize=9)
    panels[0].set_ylabel("depth, % of the video")
    figure.colorbar(image, ax=panels, label="accuracy, %")
    figure.suptitle(text(f"{points[0].run.spec['model']} on {points[0].run.spec['suite']}"), fontsize=9)
    _below(figure, "±: half of the 95 % interval, clustered by video")
    return figure


def _percent(row: Mapping[str, Any] | None) -> float:
    return math.nan if row is None else 100 * float(row["accuracy"])


def _plain_ticks(axes: Axes, which: str) -> None:
    """0.05 and 20000 instead of powers, and a label also where the axis spans less than a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _legend(axes: Axes) -> None:
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False)


def _below(figure: Figure, said: str) -> None:
    figure.supxlabel(said, fontsize=7, color="#555555")
