"""Pictures of ``reference.json``: one PNG a question, the models side by side. Colours are safe for the colour-blind."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAP = "cividis"
LINES = {
    "needle-question": ("#0072B2", "o", "-", "needle and question"),
    "other-question": ("#E69F00", "s", "--", "other frames and question"),
    "needle-other": ("#009E73", "^", ":", "needle and other frames"),
}
"""Colour (Okabe and Ito), marker, stroke and label."""


def draw(data: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write the pictures in the order of `PICTURES` and return their paths."""
    import matplotlib
    from matplotlib.figure import Figure
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with matplotlib.rc_context({"font.size": 8, "axes.titlesize": 9}):
        for name, fill in PICTURES.items():
            figure = Figure(dpi=110, layout="constrained")
            fill(figure, data["models"])
            paths.append(folder / f"{name}.png")
            whole = io.BytesIO()
            figure.savefig(whole, metadata={"Software": None})
            # A palette is enough for one colour map and text, and half the size.
            Image.open(whole).convert("RGB").quantize(256).save(paths[-1], optimize=True)
    return paths


def _types(figure: Figure, models: Mapping[str, Any]) -> None:
    kinds = types_of(models)
    figure.set_size_inches(1.2 + 2.6 * len(models), 1.2 + 0.28 * len(kinds))
    axes = figure.subplots(1, len(models), squeeze=False)[0]
    for axis, (name, found) in zip(axes, models.items(), strict=True):
        _accuracy_map(axis, found["types"], "type", kinds, name)
        axis.set_ylabel("question type")
    _bar(figure, axes, "accuracy")


def _needle(figure: Figure, models: Mapping[str, Any]) -> None:
    figure.set_size_inches(1.2 + 2.6 * len(models), 2.8)
    axes = figure.subplots(1, len(models), squeeze=False)[0]
    for axis, (name, found) in zip(axes, models.items(), strict=True):
        depths = sorted({row["depth"] for row in found["needle"]})
        _accuracy_map(axis, found["needle"], "depth", depths, name)
        axis.set_ylabel("depth of the needle\n(0 is the start, 1 the end)")
    _bar(figure, axes, "accuracy")


def _spans(figure: Figure, models: Mapping[str, Any]) -> None:
    classes = list(next(iter(models.values()))["probes"]["shares"])
    figure.set_size_inches(1 + 2.1 * len(classes), 0.6 + 2.3 * len(models))
    axes = figure.subplots(len(models), len(classes), squeeze=False)
    for row, (name, found) in zip(axes, models.items(), strict=True):
        for axis, kind in zip(row, classes, strict=True):
            if found["probes"]["tokens"][kind]:
                _heads(axis, found["probes"]["shares"][kind], f"{name}\n{kind}")
            else:
                axis.set_axis_off()
                axis.set_title(f"{name}\n{kind}: none")
    _bar(figure, axes, "share of the answer token's attention")


def _top(figure: Figure, models: Mapping[str, Any]) -> None:
    figure.set_size_inches(5.4, 0.6 + 2.3 * len(models))
    axes = figure.subplots(len(models), 2, squeeze=False)
    for row, (name, found) in zip(axes, models.items(), strict=True):
        for axis, (kind, values) in zip(row, found["probes"]["top"].items(), strict=True):
            _heads(axis, values, f"{name}\n{kind} tokens as queries")
    top = next(iter(models.values()))["probes"]["top_keys"]
    _bar(figure, axes, f"attention mass on the top {100 * top:.0f} % of keys")


def _overlap(figure: Figure, models: Mapping[str, Any]) -> None:
    figure.set_size_inches(1 + 2.8 * len(models), 2.9)
    axes = figure.subplots(1, len(models), squeeze=False, sharey=True)[0]
    for axis, (name, found) in zip(axes, models.items(), strict=True):
        layers = range(found["layers"])
        for pair, values in found["probes"]["overlap"].items():
            colour, marker, stroke, label = LINES[pair]
            axis.plot(layers, values, color=colour, marker=marker, linestyle=stroke, markersize=4, label=label)
        axis.axhline(found["probes"]["overlap_chance"], color="0.3", linewidth=1, label="chance")
        axis.set_title(name)
        axis.set_xlabel("layer")
        axis.set_xticks(list(layers))
        axis.set_ylim(0, 1)
    axes[0].set_ylabel("shared core neurons\n(intersection over union)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)


def types_of(models: Mapping[str, Any]) -> list[str]:
    """Question types in the order of the data, all of them together last."""
    found = dict.fromkeys(row["type"] for each in models.values() for row in each["types"])
    return sorted(found, key=lambda kind: kind == "all")


def _accuracy_map(axis: Axes, rows: Sequence[Mapping[str, Any]], key: str, order: Sequence[Any], title: str) -> None:
    """Lengths from left to right, `key` from top to bottom; a combination that was not asked stays empty."""
    lengths = sorted({row["length"] for row in rows})
    found = {(row[key], row["length"]): row["accuracy"] for row in rows}
    values = [[found.get((each, length), float("nan")) for length in lengths] for each in order]
    _image(axis, values, title)
    axis.set_xticks(range(len(lengths)), [str(length) for length in lengths])
    axis.set_yticks(range(len(order)), [each if isinstance(each, str) else f"{each:g}" for each in order])
    axis.set_xlabel("length of the video, frames")


def _heads(axis: Axes, values: Sequence[Sequence[float]], title: str) -> None:
    """`values`: ``[L][H]``."""
    _image(axis, values, title)
    axis.set_xticks(range(len(values[0])))
    axis.set_yticks(range(len(values)))
    axis.set_xlabel("head")
    axis.set_ylabel("layer")


def _image(axis: Axes, values: Sequence[Sequence[float]], title: str) -> None:
    """A map from 0 to 1 with its numbers written in, as long as there is room."""
    axis.imshow(values, cmap=MAP, vmin=0, vmax=1, aspect="auto")
    axis.set_title(title)
    if len(values) * len(values[0]) > 150:
        return
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            if value == value:  # not NaN
                colour = "black" if value > 0.55 else "white"
                axis.text(x, y, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=6.5)


def _bar(figure: Figure, axes: Any, label: str) -> None:
    images = [image for axis in figure.axes for image in axis.images]
    figure.colorbar(images[0], ax=axes, label=label)


PICTURES: dict[str, Callable[[Figure, Mapping[str, Any]], None]] = {
    "types": _types,
    "needle": _needle,
    "spans": _spans,
    "top": _top,
    "overlap": _overlap,
}
"""Name of the file to what draws it, in the order of the report."""
