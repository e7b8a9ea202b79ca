"""From a results store to the rows of a table: one row a run, paired with full attention on the same samples.

Runs are compared when everything that can change an answer is equal but the method. Every figure is derived from stored
records, here and nowhere else, so that a table can always be made again. How rows are written is in `tables`.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

from vlmbench import fidelity, rivals, significance, stats
from vlmbench.budget import TRIVIAL
from vlmbench.errors import UsageError
from vlmbench.loaded import BASELINE, Loaded, median_of
from vlmbench.record import FINISHED, Timing
from vlmbench.rescore import rescore
from vlmbench.rivals import REFERENCES
from vlmbench.store import ResultStore, Run, RunView
from vlmbench.tables import COLUMNS, SPANS, Rows, notes, to_csv, to_json, to_markdown

__all__ = ["COLUMNS", "Rows", "loaded_rows", "rescore", "rows", "to_csv", "to_json", "to_markdown"]

_SPAN: dict[str, Callable[[Timing], float]] = {
    "vision": lambda timing: timing.vision_s,
    "prefill": lambda timing: timing.prefill_s,
    "ttft": lambda timing: timing.ttft_s,
    "decode": lambda timing: fmean(timing.decode_s) if timing.decode_s else 0.0,
    "e2e": lambda timing: timing.e2e_s,
}
_TOUCHED = {
    "frames": ("preprocess_s", "transfer_s", "vision_s", "prepare_s", "prefill_s", "decode_s"),
    "vision": ("vision_s",),
    "prompt": ("prefill_s", "decode_s"),
    "prefill": ("prefill_s",),
    "decode": ("decode_s",),
}
"""Stage of `Traits.stages` -> spans that a method acting there can shorten."""


def rows(source: Path | str | Sequence[RunView | Run], include_dummy: bool = False) -> Rows:
    """One row a run, sorted by model, suite and frames with full attention first; the columns are `COLUMNS`.

    Runs of the stand-in `dummy` are left out unless a test asks for them. Raises `UsageError` when no run is stored.
    """
    found = loaded_rows(source, include_dummy)
    own = [row for _, row in found]
    with _complete(source):
        return Rows(own, [*notes([run.view for run, _ in found], own), *rivals.missing([run for run, _ in found])])


def loaded_rows(
    source: Path | str | Sequence[RunView | Run], include_dummy: bool = False
) -> list[tuple[Loaded, dict[str, Any]]]:
    """Every run with its row, see `rows`. Raises `UsageError` when something that a table needs is not stored."""
    views = ResultStore(source).runs(skim=True) if isinstance(source, (str, Path)) else source
    with _complete(source), _uncollected():
        return _loaded_rows(views, include_dummy)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Records by the ten thousand hold no cycles; looking for some would take as long as reading them.

    What lives when it ends is moved to the oldest generation, since the next allocation would look through all of it.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.freeze()
            gc.unfreeze()
            gc.enable()


@contextmanager
def _complete(source: Path | str | Sequence[RunView | Run]) -> Iterator[None]:
    """What is missing in a header or a record is one sentence."""
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        name = source if isinstance(source, (str, Path)) else source[0].folder
        raise UsageError(
            f"{name} holds a run whose header or records lack something ({error}); run it again with --fresh."
        ) from error


def _loaded_rows(views: Sequence[RunView | Run], include_dummy: bool) -> list[tuple[Loaded, dict[str, Any]]]:
    runs = [Loaded(view) for view in views if include_dummy or not view.header["facts"].get("stand_in")]
    groups: dict[str, list[Loaded]] = {}
    for run in sorted(runs, key=lambda run: run.order):
        groups.setdefault(run.group, []).append(run)
    return [(run, _row(run, group)) for group in groups.values() for run in group]


def _row(run: Loaded, group: Sequence[Loaded]) -> dict[str, Any]:
    full = next((other for other in group if other.method == BASELINE and other is not run), None)
    paired = any(each.baseline_rounds for each in run.latency.values())
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    row |= {
        "model": run.spec["model"],
        "suite": run.suite,
        "method": run.method,
        "params": run.params,
        "baseline": BASELINE if full or paired else None,
        "n": len(run.samples),
        "n_failed": sum(each.status not in FINISHED for each in run.samples.values()),
        "n_inactive": run.n_inactive,
        "frames": run.frames,
        "n_visual_tokens": run.n_visual_tokens,
        "device": run.header["device"]["name"],
        "dtype": run.spec["dtype"],
        "attention_kernel": run.header["kernels"]["attention"],
        "vision_attention_kernel": run.header["kernels"]["vision"],
        "marks": _marks(run, group),
    }
    clusters = [run.accuracy[id_].cluster for id_ in run.scores]
    _put(row, "accuracy", stats.accuracy_interval(list(run.scores.values()), clusters))
    return row | _against(run, full, row) | _times(run) | _speedups(run) | _cost(run)


def _against(run: Loaded, full: Loaded | None, row: dict[str, Any]) -> dict[str, Any]:
    """Accuracy over the samples that both finished, and the bound on prefill, which takes both runs' counted work.

    ``amdahl_prefill`` = 1 / (1 − attention's share of full attention's prefill FLOPs), median over samples; None unless
    the method leaves everything but attention as it is (it drops no token and no neuron, and keeps weights as they are).
    """
    if full is None:
        return {}
    ids = sorted(run.finished & full.finished)
    pairs = [(run.accuracy[id_], full.accuracy[id_]) for id_ in ids]
    scored = [id_ for id_ in ids if id_ in run.scores]
    own_scores, full_scores = ([each.scores[id_] for id_ in scored] for each in (run, full))
    clusters = [run.accuracy[id_].cluster for id_ in scored]
    paired = (own_scores, full_scores, clusters)
    _put(row, "accuracy_delta", stats.paired_delta(*paired))
    tested = {"mcnemar_p": significance.mcnemar(*paired), "detectable_delta": significance.detectable(*paired)}
    found: dict[str, Any] = {"n_paired": len(ids), **tested, **fidelity.fidelity(pairs)}
    bounds = []
    traits = run.header["traits"] or {}
    bounded = "prefill" in traits.get("stages", ()) and "weights" not in traits.get("takes", ())
    for own, other in pairs:
        if own.work and other.work and bounded:
            rest, dense_rest = (work["flops"] - work["attention_flops"] for work in (own.work, other.work))
            if rest < 0.999 * dense_rest or dense_rest <= 0:
                return found
            bounds.append(other.work["flops"] / dense_rest)
    return {**found, "amdahl_prefill": median_of(bounds)}


def _times(run: Loaded) -> dict[str, Any]:
    """Medians over samples of what the latency pass already took the median of over rounds."""
    timings = [each.timing for each in run.latency.values() if each.timing]
    names = ("video_s", "preprocess_s", "vision_s", "prepare_s", "prefill_s", "ttft_s", "e2e_s")
    found: dict[str, Any] = {name: median_of(getattr(timing, name) for timing in timings) for name in names}
    return {**found, "decode_s_per_token": median_of(fmean(each.decode_s) for each in timings if each.decode_s)}


def _speedups(run: Loaded) -> dict[str, Any]:
    """For each span, the median over samples of the median over rounds of (baseline's seconds / own seconds).

    ``amdahl_e2e`` = median of baseline's e2e / (e2e − the spans that the method's stages can shorten), from `_TOUCHED`.
    """
    row: dict[str, Any] = {}
    records = list(run.latency.values())
    if not run.mostly_active:
        return row
    for span in SPANS:
        if span == "vision" and not (run.header["traits"] or {}).get("sees_vision", True):
            continue  # no frame is encoded: there is nothing that became faster
        ratios = [(paired_ratio(each.baseline_rounds, each.rounds, span), each.cluster) for each in records]
        known = [(ratio, cluster) for ratio, cluster in ratios if ratio is not None]
        _put(row, f"speedup_{span}", stats.ratio_interval([r for r, _ in known], [c for _, c in known]))
        same = (paired_ratio(each.same_kernel_rounds or each.baseline_rounds, each.rounds, span) for each in records)
        row[f"speedup_{span}_same_kernel"] = median_of(ratio for ratio in same if ratio is not None)
    stages = (run.header["traits"] or {}).get("stages", ())
    touched = {name for stage in stages for name in _TOUCHED[stage]}
    dense = [timing for each in records for timing in each.baseline_rounds]
    rests = [(timing.e2e_s, timing.e2e_s - math.fsum(_seconds(timing, name) for name in touched)) for timing in dense]
    row["amdahl_e2e"] = median_of(whole / rest for whole, rest in rests if rest > 0) if touched else None
    return row


def _cost(run: Loaded) -> dict[str, Any]:
    recalls = [each for record in run.samples.values() if (each := fidelity.recall(record)) is not None]
    works = [each.work for each in run.samples.values() if each.work]
    return {
        "recall": fmean(recalls) if recalls else None,
        "n_kept_tokens": run.spent.tokens if run.spent else None,
        "vision_flops": median_of(work["vision_flops"] for work in works if "vision_flops" in work),
        "vision_dense_flops": median_of(work["vision_dense_flops"] for work in works if "vision_dense_flops" in work),
        "peak_bytes": max((each.peak_bytes for each in run.memory), default=None),
        "peak_extra_bytes": max((each.peak_extra_bytes for each in run.memory), default=None),
        "kv_bytes": median_of(
            [each.kv_bytes for each in run.memory] or [w["kv_bytes"] for w in works if "kv_bytes" in w]
        ),
        "flops": median_of(work["flops"] for work in works),
    }


def _marks(run: Loaded, group: Sequence[Loaded]) -> list[str]:
    traits = run.header["traits"] or {}
    traces = [each.trace for each in run.view.records.values() if each.trace]
    marks = {
        "cpu": run.spec["device_type"] == "cpu",
        "below-trivial": any(_beaten_by(run, other) for other in group),
        "masked": traits.get("masked", False) or any(trace.get("masked") for trace in traces),
        "dequantised": any(trace.get("dequantised") for trace in traces),
        "mixed": run.mixed,
        "trained": traits.get("trained", False),
        "inactive>10%": not run.mostly_active,
    }
    return [mark for mark, holds in marks.items() if holds]


def _beaten_by(run: Loaded, other: Loaded) -> bool:
    """A trivial method within the budget (see `budget`) is more accurate, beyond the paired difference's error."""
    if other.method not in TRIVIAL or run.method in (*TRIVIAL, *REFERENCES):
        return False
    if run.spent and other.spent:
        if not other.spent.within(run.spent):
            return False
    elif run.n_visual_tokens is None or other.n_visual_tokens is None or other.n_visual_tokens > run.n_visual_tokens:
        return False  # stored before tokens were counted for each layer
    ids = sorted(run.scores.keys() & other.scores.keys())
    clusters = [run.accuracy[id_].cluster for id_ in ids]
    gap = stats.paired_delta([run.scores[id_] for id_ in ids], [other.scores[id_] for id_ in ids], clusters)
    return gap is not None and gap.high is not None and gap.high < 0


def paired_ratio(dense: Sequence[Timing], own: Sequence[Timing], span: str) -> float | None:
    """Rounds pair one to one; None when the span took no time in every round of one side."""
    seconds = ((_SPAN[span](a), _SPAN[span](b)) for a, b in zip(dense, own, strict=False))
    return median_of(a / b for a, b in seconds if a > 0 and b > 0)


def span_seconds(timing: Timing, span: str) -> float:
    """Seconds of one of `SPANS`; of decoding, a token's."""
    return _SPAN[span](timing)


def _seconds(timing: Timing, name: str) -> float:
    return sum(timing.decode_s) if name == "decode_s" else float(getattr(timing, name))


def _put(row: dict[str, Any], name: str, estimate: stats.Estimate | None) -> None:
    if estimate is not None:
        row |= {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
