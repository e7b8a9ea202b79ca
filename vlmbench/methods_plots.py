"""Pictures of ``methods.json``: accuracy over what each setting costs, a panel a suite, beside trivial methods as dear."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmbench.methods_text import TITLES, ordered
from vlmbench.plot_figures import COLOURS, MARKERS
from vlmbench.plot_figures import text as label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, Any]
ACROSS = 2
"""Panels beside each other."""
BANDS = [band for band in TITLES if band not in ("references", "trivial")]


def draw(data: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write ``MODEL.png`` for every model that has rows and return the paths. Raises `OSError`."""
    import matplotlib
    from matplotlib.figure import Figure
    from PIL import Image

    paths = []
    with matplotlib.rc_context({"font.size": 7, "axes.titlesize": 8}):
        for model in (each["model"] for each in data["models"]):
            rows = [row for row in data["rows"] if row["model"] == model and row.get("flops_share") is not None]
            suites = ordered(row["suite"] for row in rows)
            if not suites:
                continue
            down = ceil(len(suites) / ACROSS)
            figure = Figure(figsize=(9.5, 0.9 + 3.0 * down), dpi=100, layout="constrained")
            panels = figure.subplots(down, ACROSS, squeeze=False, sharey=True).flatten()
            for axes, suite in zip(panels, suites, strict=False):
                _panel(axes, [row for row in rows if row["suite"] == suite])
                axes.set_title(label(suite))
                axes.set_xlabel("FLOPs of the language model's prefill, full attention's = 1")
            for axes in panels[len(suites) :]:
                axes.set_axis_off()
            named = {
                name: handle for axes in panels for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)
            }
            figure.legend(named.values(), named, loc="outside lower center", ncols=5, frameon=False)
            figure.suptitle(label(f"{model}: accuracy over cost"), fontsize=9)
            figure.supylabel("accuracy, % (95 % interval)", fontsize=8)
            folder.mkdir(parents=True, exist_ok=True)
            paths.append(folder / f"{model}.png")
            whole = io.BytesIO()
            figure.savefig(whole, metadata={"Software": None})
            Image.open(whole).convert("RGB").quantize(256).save(paths[-1], optimize=True)
    return paths


def _panel(axes: Axes, rows: Sequence[Row]) -> None:
    for reference, line in (("full", "--"), ("blind", ":")):
        for row in rows:
            if row["method"] == reference:
                axes.axhline(100 * row["accuracy"], color=COLOURS[0], linestyle=line, linewidth=0.8, label=reference)
    if as_dear := trivial_points(rows):
        x, height = zip(*as_dear, strict=True)
        axes.plot(x, height, "_", color="#8C8C8C", markersize=9, markeredgewidth=1.5, label="best trivial, as dear")
    for number, band in enumerate(BANDS, 1):
        own = [row for row in rows if row["band"] == band]
        if not own:
            continue
        y = [100 * row["accuracy"] for row in own]
        bars = [[100 * abs(row["accuracy"] - row[f"accuracy_{end}"]) for row in own] for end in ("low", "high")]
        axes.errorbar(
            [row["flops_share"] for row in own], y, yerr=bars, label=TITLES[band], linestyle="none", elinewidth=0.4,
            color=COLOURS[number % len(COLOURS)], marker=MARKERS[number % len(MARKERS)], markersize=4,
        )  # fmt: skip
    axes.set_xlim(0, 1.1)
    axes.set_ylim(0, 102)
    axes.grid(alpha=0.25)


def trivial_points(rows: Sequence[Row]) -> list[tuple[float, float]]:
    """(FLOPs, accuracy in %) of the best trivial method at every setting's budget, and of the table's own trivial ones."""
    found = {(row["flops_share"], 100 * row["accuracy"]) for row in rows if row["band"] == "trivial"}
    for row in rows:
        # Beside a method that saves nothing stand those that spend less: they are elsewhere on the axis.
        if row.get("best") and row["budget"] * row["kept_share"] < row["kept"]:
            best = next(each for each in row["rivals"] if each["method"] == row["best"])
            found.add((row["flops_share"], 100 * best["accuracy"]))
    return sorted(found)
