"""`vlmbench plot`: the pictures of a results folder, one file for each model and suite, PNG or SVG.

Which figures there are is here; how each is drawn is in `plot_figures`. Runs stand in one picture only when nothing but the
method differs (`comparable`), except in what the picture is made of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmbench import comparable
from vlmbench.comparable import Item
from vlmbench.errors import RunError, UsageError
from vlmbench.loaded import Loaded, texts
from vlmbench.plot_figures import Point, needle, pareto, scaling, stages
from vlmbench.report import loaded_rows
from vlmbench.spec import Spec, slug

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = ("pareto", "scaling", "stages", "needle")
FORMATS = ("png", "svg")

FREE: Mapping[str, tuple[str, ...]] = {"scaling": comparable.OF_LENGTH, "needle": ("suite", "suite_hash")}
"""Kind -> fields that its axes are made of."""


def plot(folder: Path, out: Path, kinds: Sequence[str] = (), formats: Sequence[str] = FORMATS) -> list[Path]:
    """Draw what `folder` has figures for, or the named kinds, and return the files. Raises `UsageError` and `RunError`."""
    points = [Point(run, row) for run, row in loaded_rows(folder)]
    if not points:
        raise UsageError(f"{folder} holds no results of a real model; name a folder that `vlmbench run --out` wrote.")
    written: list[Path] = []
    for kind in kinds or KINDS:
        groups, needs = _GROUPS[kind](points), _NEEDS[kind]
        if kinds and not groups:
            raise UsageError(f"{folder} has nothing for a {kind} picture: it needs {needs}.")
        for name, group in groups.items():
            facts = [Item(each.name, comparable.facts(each.run), _place(kind, each.run)) for each in group]
            comparable.check(facts, FREE.get(kind, ()), split=False)
            figure = _DRAW[kind](group)
            written += _save(figure, out / f"{kind}-{slug(name)}", formats)
    if not written:
        raise UsageError(f"{folder} has nothing to draw; run it with --mode all.")
    return written


def _place(kind: str, run: Loaded) -> Any:
    return (run.suite, str(run.spec["frames"])) if kind in FREE else None


def _by(points: Sequence[Point], name: Callable[[Loaded], str]) -> dict[str, list[Point]]:
    found: dict[str, list[Point]] = {}
    for each in points:
        found.setdefault(name(each.run), []).append(each)
    return found


def _work(run: Loaded) -> str:
    frames = "" if run.spec["frames"] is None else f" {run.spec['frames']} frames"
    return f"{run.spec['model']} {run.suite}{frames}"


def _without(*params: str) -> Callable[[Loaded], str]:
    """The model and the suite's spec without these parameters: what runs along one axis share."""

    def name(run: Loaded) -> str:
        rest = {key: value for key, value in run.spec["suite_params"].items() if key not in params}
        return f"{run.spec['model']} {Spec(run.spec['suite'], texts(rest))}"

    return name


def _pareto_groups(points: Sequence[Point]) -> dict[str, list[Point]]:
    known = [each for each in points if each.row["accuracy"] is not None and each.row["e2e_s"] is not None]
    return {name: group for name, group in _by(known, _work).items() if len(group) > 1}


def _stages_groups(points: Sequence[Point]) -> dict[str, list[Point]]:
    return _by([each for each in points if each.run.latency], _work)


def _scaling_groups(points: Sequence[Point]) -> dict[str, list[Point]]:
    known = [each for each in points if each.row["ttft_s"] is not None and each.row["full_tokens"]]
    groups = _by(known, _without("length"))
    return {name: group for name, group in groups.items() if len({each.row["full_tokens"] for each in group}) > 1}


def _needle_groups(points: Sequence[Point]) -> dict[str, list[Point]]:
    known = [each for each in points if each.depth is not None and each.row["accuracy"] is not None]
    return _by(known, _without("length", "depth"))


_GROUPS: Mapping[str, Callable[[Sequence[Point]], dict[str, list[Point]]]] = {
    "pareto": _pareto_groups,
    "scaling": lambda points: _scaling_groups(_with_full(points)),
    "stages": _stages_groups,
    "needle": _needle_groups,
}
_NEEDS = {
    "pareto": "accuracy and times of two methods on one suite (run --mode all)",
    "scaling": "times with full attention at two lengths",
    "stages": "times (run --mode latency)",
    "needle": "runs on a suite with a depth, such as synthvideo:length=128,depth=0.5",
}
_DRAW: Mapping[str, Callable[[Sequence[Point]], Figure]] = {
    "pareto": pareto,
    "scaling": scaling,
    "stages": stages,
    "needle": needle,
}


def _with_full(points: Sequence[Point]) -> list[Point]:
    """Every point knows the visual tokens of full attention on the same work: what a length is counted in."""
    full = {each.run.group: each.row["n_visual_tokens"] for each in points if each.run.method == "full"}
    return [Point(each.run, {**each.row, "full_tokens": full.get(each.run.group)}) for each in points]


def _save(figure: Figure, base: Path, formats: Sequence[str]) -> list[Path]:
    import matplotlib

    paths = [base.with_name(f"{base.name}.{each}") for each in formats]
    try:
        base.parent.mkdir(parents=True, exist_ok=True)
        # The same results give the same file, bit for bit.
        with matplotlib.rc_context({"svg.hashsalt": "vlmbench"}):
            for path in paths:
                metadata = {"Date": None} if path.suffix == ".svg" else {}
                figure.savefig(path, dpi=150, bbox_inches="tight", metadata=metadata)
    except OSError as error:
        raise RunError(
            f"{base.parent} cannot be written ({error.strerror}); name another folder with --out."
        ) from error
    return paths
