"""Pictures of ``mminference.json``: needle maps of patterns and boundaries, accuracy against cost, recall by head."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmbench.plot_figures import COLOURS, MARKERS
from vlmbench.plot_figures import text as label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
MAP = "cividis"
ACROSS = 5
"""Maps beside each other."""


def draw(data: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write what there are rows for and return the paths: ``maps-MODEL.png`` and the like. Raises `OSError`."""
    import matplotlib
    from matplotlib.figure import Figure
    from PIL import Image

    paths = []
    with matplotlib.rc_context({"font.size": 7, "axes.titlesize": 7.5}):
        for part, fill in PICTURES.items():
            for model in data["models"]:
                rows = [row for row in data["rows"] if (row["model"], row["part"]) == (model, part)]
                if not rows:
                    continue
                figure = Figure(dpi=100, layout="constrained")
                fill(figure, rows)
                figure.suptitle(label(f"{model}: {TITLES[part]}"), fontsize=9)
                folder.mkdir(parents=True, exist_ok=True)
                paths.append(folder / f"{part}-{model}.png")
                whole = io.BytesIO()
                figure.savefig(whole, metadata={"Software": None})
                # A palette is enough for one colour map and text, and half the size.
                Image.open(whole).convert("RGB").quantize(256).save(paths[-1], optimize=True)
    return paths


def short(method: str) -> str:
    """``vs, q`` for ``mminference:pattern=vs,budget=0.5,boundary=q``: what tells the maps apart."""
    name, _, params = method.partition(":")
    given = dict(each.split("=", 1) for each in params.split(",") if each)
    given.pop("budget", None)
    if given.pop("artefact", None):
        return ", ".join(["fitted", *(f"{key}={value}" for key, value in given.items())])
    first = given.pop("pattern", name)
    boundary = given.pop("boundary", None)
    return ", ".join([first, *([boundary] if boundary else []), *(f"{key}={value}" for key, value in given.items())])


def _maps(figure: Figure, rows: Sequence[Row]) -> None:
    """Patterns beside each other and boundaries below each other; before them what knows no boundary."""
    cells = [row for row in rows if "depth" in row]
    lines = arranged(list(dict.fromkeys(row["method"] for row in cells)))
    lengths, depths = (list(dict.fromkeys(row[key] for row in cells)) for key in ("length", "depth"))
    figure.set_size_inches(1 + 1.75 * ACROSS, 0.5 + (0.8 + 0.24 * len(depths)) * len(lines))
    panels = figure.subplots(len(lines), ACROSS, squeeze=False)
    asked = {length: sorted({row["n"] for row in cells if row["length"] == length}) for length in lengths}
    for across, line in zip(panels, lines, strict=True):
        for axes, method in zip(across, line, strict=True):
            if method is None:
                axes.set_axis_off()
                continue
            known = {(row["length"], row["depth"]): row["accuracy"] for row in cells if row["method"] == method}
            _image(axes, [[known.get((length, depth), nan) for length in lengths] for depth in depths], short(method))
            axes.set_xticks(range(len(lengths)), [f"{length}\n({_span(asked[length])})" for length in lengths])
            names = [each if isinstance(each, str) else f"{100 * each:.0f} %" for each in depths]
            axes.set_yticks(range(len(depths)), names if axes is across[0] else [])
    figure.supxlabel("frames (questions of a cell)", fontsize=8)
    figure.supylabel("depth of the needle", fontsize=8)
    figure.colorbar(panels[0, 0].images[0], ax=list(panels.flatten()), label="accuracy", shrink=0.6)


def arranged(methods: Sequence[str]) -> list[list[str | None]]:
    """Lines of `ACROSS` places: settings without a boundary first, then a column a pattern and a line a boundary."""
    at: dict[str, dict[str, str]] = {}
    for method in methods:
        pattern, _, boundary = method.partition(",boundary=")
        at.setdefault(pattern, {})[boundary] = method
    alone = [method for each in at.values() if len(each) == 1 for method in each.values()]
    columns = [each for each in at.values() if len(each) > 1]
    lines: list[Sequence[str | None]] = [alone[first : first + ACROSS] for first in range(0, len(alone), ACROSS)]
    for first in range(0, len(columns), ACROSS):
        some = columns[first : first + ACROSS]
        lines += [
            [each.get(boundary) for each in some] for boundary in dict.fromkeys(key for each in some for key in each)
        ]
    return [[*line, *[None] * (ACROSS - len(line))] for line in lines]


def _span(numbers: Sequence[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}–{numbers[-1]}"


def _recall(figure: Figure, rows: Sequence[Row]) -> None:
    heads = [row for row in rows if "suite" in row]
    suites, patterns = (list(dict.fromkeys(row[key] for row in heads)) for key in ("suite", "pattern"))
    figure.set_size_inches(1 + 1.9 * len(patterns), 0.5 + 2.1 * len(suites))
    panels = figure.subplots(len(suites), len(patterns), squeeze=False)
    for line, suite in zip(panels, suites, strict=True):
        for axes, pattern in zip(line, patterns, strict=True):
            [values] = [row["recall"] for row in heads if (row["suite"], row["pattern"]) == (suite, pattern)]
            _image(axes, values, f"{pattern}\n{suite}")
            axes.set_xticks(range(len(values[0])))
            axes.set_yticks(range(len(values)))
    figure.supxlabel("head", fontsize=8)
    figure.supylabel("layer", fontsize=8)
    figure.colorbar(panels[0, 0].images[0], ax=list(panels.flatten()), label="attention kept", shrink=0.6)


def _curve(figure: Figure, rows: Sequence[Row]) -> None:
    suites = list(dict.fromkeys(row["suite"] for row in rows))
    figure.set_size_inches(2.9 * len(suites) + 1.2, 3.2)
    panels = figure.subplots(1, len(suites), squeeze=False, sharey=True)[0]
    names = list(dict.fromkeys(short(row["method"]) for row in rows))
    for axes, suite in zip(panels, suites, strict=True):
        for number, name in enumerate(names):
            own = [row for row in rows if row["suite"] == suite and short(row["method"]) == name]
            own.sort(key=lambda row: row["pairs_relative"])
            if not own:
                continue
            y = [100 * row["accuracy"] for row in own]
            bars = [[100 * abs(row["accuracy"] - row[f"accuracy_{end}"]) for row in own] for end in ("low", "high")]
            axes.errorbar(
                [row["pairs_relative"] for row in own], y, yerr=bars, label=name, capsize=2, elinewidth=0.7,
                color=COLOURS[number % len(COLOURS)], marker=MARKERS[number % len(MARKERS)], markersize=4, linewidth=1,
            )  # fmt: skip
        axes.set_title(suite)
        axes.set_xlim(0, 1.05)
        axes.set_xlabel("query-key pairs of full attention's")
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("accuracy, % (95 % interval)")
    panels[-1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)


def _image(axes: Axes, values: Sequence[Sequence[float]], title: str) -> None:
    """A map from 0 to 1 with its numbers written in; what was not asked stays empty."""
    axes.imshow(values, cmap=MAP, vmin=0, vmax=1, aspect="auto")
    axes.set_title(title)
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            if value == value:  # not NaN
                colour = "black" if value > 0.55 else "white"
                axes.text(x, y, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=5.5)


PICTURES: dict[str, Callable[[Figure, Sequence[Row]], None]] = {
    "maps": _maps,
    "mixed": _maps,
    "curve": _curve,
    "recall": _recall,
}
TITLES = {
    "maps": "needles in videos",
    "mixed": "needles in videos with text between the frames",
    "curve": "accuracy against cost",
    "recall": "attention that each head's pattern keeps",
}
