"""Every method on the tiny models, each beside random, uniform and downsample at its own budget.

    python -m vlmbench.methods_study --runs runs/methods --out results/cpu            (make methods)
    python -m vlmbench.methods_study --model tiny-llava-ov --suite synthimage --limit 132

Every answer is an ordinary accuracy run below `--runs`, so a second call goes on where the first one stopped, and a larger
`--limit` adds to what is there. ``methods.json`` holds the rows and is written after every model and suite; those that this
call was not asked for keep the rows they had. ``methods.md`` is made from it alone (`vlmbench.methods_text`), as `make tables`
checks. Times are not taken here: nothing in it depends on how busy the machine is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer

from vlmbench import budget
from vlmbench.claims_study import LIMITS, Answers, Scale, Study, accuracies, difference, suite_of
from vlmbench.errors import RunError, UsageError
from vlmbench.fidelity import fidelity
from vlmbench.files import read_json, write_json
from vlmbench.machine import load_backend
from vlmbench.methods_plots import draw
from vlmbench.methods_text import to_markdown
from vlmbench.progress import Progress
from vlmbench.record import FINISHED
from vlmbench.reference import NAMES, SHIPPED
from vlmbench.request import RunRequest

Row = dict[str, Any]

SHORTEST = 32
SUITES = ("synthimage", suite_of(SHORTEST), suite_of(128), suite_of(384))
QUESTIONS = dict.fromkeys(SUITES[:3], 66) | {SUITES[3]: 22}
"""Of every suite, the quickest first; multiples of the eleven types of question. Equal answers to 54 would do to be *held*."""

_DROP = "turbo:mode=drop"
CURVES: dict[str, tuple[str, ...]] = {
    "references": ("blind", "prior"),
    "pevlm": ("pevlm", "pevlm:sink=4,block=4", "pevlm:sink=8,block=16"),
    "mminference": (
        "mminference:artefact=auto",
        "mminference",
        "mminference:budget=0.5",
        "mminference:budget=2",
        "mminference:dense_layers=2,budget=2",
    ),
    "turbo": (
        "turbo",
        f"{_DROP},r=4",
        f"{_DROP},r=8",
        _DROP,
        f"{_DROP},r=24",
        f"{_DROP},r=16,min_tokens=0",
        f"{_DROP},r=32,min_tokens=0",
        f"{_DROP},video=temporal",
    ),
    "corematching": (
        "corematching",
        "corematching:part=tokens",
        "corematching:part=neurons",
        "corematching:rho=0.05",
        "corematching:rho=0.5",
        "corematching:beta=0.8",
        "corematching:select_layer=1",
        "corematching:select_layer=1,rho=0.05",
    ),
    "together": (f"{_DROP}+pevlm", f"{_DROP}+corematching", "corematching+pevlm"),
    "memvp": ("memvp",),
    "trivial": tuple(f"{name}:ratio={ratio}" for ratio in (0.5, 0.25, 0.1) for name in budget.TRIVIAL),
}
"""Band of the table -> settings: the defaults first, then its budget from more to less."""
LONG: dict[str, tuple[str, ...]] = {
    "references": CURVES["references"],
    "pevlm": ("pevlm",),
    "mminference": ("mminference:artefact=auto",),
    "turbo": (f"{_DROP},r=8", _DROP, f"{_DROP},r=16,min_tokens=0"),
    "corematching": ("corematching", "corematching:rho=0.05"),
    "together": (f"{_DROP}+pevlm",),
}
"""The same on longer videos, whose answers take longer."""
TRAINED_ON = ("synthimage",)
"""Suites that ``memvp`` is trained for."""


def curves(suite: str) -> dict[str, tuple[str, ...]]:
    """What is asked of a suite. Long videos get the short list; a picture cannot be `downsample`d by frames."""
    picture = suite.startswith("synthimage")
    found = dict(CURVES if picture or f"length={SHORTEST}" in suite else LONG)
    if suite.partition(":")[0] not in TRAINED_ON:
        found.pop("memvp", None)
    if picture:
        found["pevlm"] = ()
        found["turbo"] = tuple(each for each in found["turbo"] if "video" not in each)
        found["trivial"] = tuple(each for each in found["trivial"] if "downsample" not in each)
        found["together"] = tuple(each for each in found["together"] if "pevlm" not in each)
    return found


def measure(study: Study, suite: str, limit: int) -> list[Row]:
    """The rows of one model and suite. A setting that this model or checkout refuses is a row with the sentence."""
    asked = study.answers(suite, ["full"], limit)
    full = budget.spent(asked.of["full"].values())
    rows = [_row(asked, asked, "full", "references", full)]
    for band, settings in curves(suite).items():
        for method in settings:
            try:
                own = study.answers(suite, [method], limit)
            except UsageError as error:
                rows.append({"band": band, "method": method, "refused": str(error)})
                continue
            row = _row(own, asked, method, band, full)
            if band not in ("references", "trivial"):
                row |= _against_trivial(study, suite, limit, own, asked, method, full)
            rows.append(row)
    return rows


def _row(own: Answers, asked: Answers, method: str, band: str, full: budget.Spent | None) -> Row:
    """Accuracy, nearness to full attention, and cost: every equivalent of the budget, of full attention's."""
    mine, dense = own.of[method], asked.of["full"]
    ids = asked.ids()
    spent = budget.spent(mine.values())
    pairs = [(mine[id_], dense[id_]) for id_ in ids if {mine[id_].status, dense[id_].status} <= {*FINISHED}]
    row: Row = {"band": band, "method": method, "params": own.runs[method].params, **accuracies(mine, ids)}
    row |= difference("delta", mine, dense, ids) if method != "full" else {}
    row["agreement"] = fidelity(pairs).get("agreement") if method != "full" else None
    row["visual_tokens"] = own.runs[method].n_visual_tokens
    row["kept"] = spent.tokens if spent else None
    row["kept_share"] = spent.tokens / full.tokens if spent and full else None
    for name, key in (("flops_share", "flops"), ("kv_share", "kv_bytes")):
        row[name] = _share(own, asked, method, key)
    works = [each.work for each in mine.values() if each.work and each.work.get("vision_dense_flops")]
    row["vision_share"] = fmean(each["vision_flops"] / each["vision_dense_flops"] for each in works) if works else None
    row["marks"] = [mark for mark in ("trained", "masked") if own.runs[method].header["traits"].get(mark)]
    return row


def _share(own: Answers, asked: Answers, method: str, key: str) -> float | None:
    """Of full attention's on the same sample, mean over samples."""
    works = [(each.work, asked.of["full"][id_].work) for id_, each in own.of[method].items()]
    known = [mine[key] / full[key] for mine, full in works if mine and full]
    return fmean(known) if known else None


def _against_trivial(
    study: Study, suite: str, limit: int, own: Answers, asked: Answers, method: str, full: budget.Spent | None
) -> Row:
    """The trivial methods at this one's budget: the best of them, and the difference to it on the same questions."""
    spent, ids = budget.spent(own.of[method].values()), asked.ids()
    if spent is None or full is None:
        return {}
    tokens = budget.matched(spent, full)
    frames = round(fmean(len(each.frames) for each in asked.of["full"].values()))
    picture = suite.startswith("synthimage")
    found = {}
    # One that saves neither tokens nor FLOPs has none at its own budget: it must still be as good as those that spend less.
    at_budget = budget.rivals(tokens, full, None if picture else frames)
    for rival in at_budget or curves(suite).get("trivial", ()):
        answers = study.answers(suite, [rival], limit).of[rival]
        theirs = budget.spent(answers.values())
        if theirs is None or not theirs.within(spent):
            continue  # rounding of whole frames made it cost more
        found[rival] = answers
    if not found:
        return {"budget": tokens, "rivals": []}
    rows = [
        {"method": rival, **accuracies(answers, ids), **difference("gap", own.of[method], answers, ids)}
        for rival, answers in found.items()
    ]
    best = max(rows, key=lambda row: row["accuracy"])
    below = any(row["gap_high"] is not None and row["gap_high"] < 0 for row in rows)
    return {"budget": tokens, "rivals": rows, "best": best["method"], "below_trivial": below}


def stored(out: Path) -> dict[str, Any]:
    """What earlier calls measured. Raises `UsageError` when it cannot be read."""
    return read_json(out / "methods.json", {"schema": 1, "models": [], "measured_on": [], "rows": []})


def enter(
    data: dict[str, Any], model: str, weights_hash: str, suite: str, rows: Sequence[Row], on: Sequence[str]
) -> None:
    """Put what was measured in the place of what was there; rows of other weights of that name go."""
    if any(each["weights_hash"] != weights_hash for each in data["models"] if each["model"] == model):
        for key in ("models", "rows", "measured_on"):
            data[key] = [each for each in data[key] if each["model"] != model]
    if model not in (each["model"] for each in data["models"]):
        data["models"].append({"model": model, "weights_hash": weights_hash})
    at = {"model": model, "suite": suite}
    for key, new in (("rows", rows), ("measured_on", [{"on": each} for each in on])):
        others = [each for each in data[key] if (each["model"], each["suite"]) != (model, suite)]
        data[key] = [*others, *({**at, **each} for each in new)]


def write(data: dict[str, Any], out: Path) -> None:
    """``methods.json``, ``methods.md`` and its pictures. Raises `RunError` when the folder cannot be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "methods.json", data)
        draw(data, out / "methods")
        (out / "methods.md").write_text(to_markdown(data), "utf-8")
    except OSError as error:
        raise RunError(f"{out} cannot be written ({error.strerror}); choose another --out.") from error


def study_all(models: Sequence[str], suites: Sequence[str], limit: int | None, runs: Path, out: Path) -> dict[str, Any]:
    """Measure what is missing, write after every model and suite, and return what ``methods.json`` holds."""
    data = stored(out)
    with Progress() as progress:
        loaded = {}
        for model in models:
            if model in NAMES and model not in SHIPPED:
                progress.note(f"{model} is not shipped in this checkout; it is left out")
                continue
            request = RunRequest(model=model, device="cpu", offline=True)
            loaded[model] = load_backend(request, model)
        for suite in suites:
            for model, backend in loaded.items():
                study = Study(model, backend, runs, Scale(), progress)
                rows = measure(study, suite, limit or QUESTIONS.get(suite, LIMITS[-1][1]))
                enter(data, model, backend.identity.weights_hash, suite, rows, list(study.measured_on))
                write(data, out)
    return data


def main(
    model: Annotated[
        list[str] | None, typer.Option(metavar="SPEC", help="Repeatable. Default: the tiny models.")
    ] = None,
    suite: Annotated[
        list[str] | None,
        typer.Option(metavar="SPEC", help="Repeatable. Default: videos of 32, 128 and 384 frames, and pictures."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Questions of every suite. Default: 66, and 22 at 384 frames.")
    ] = None,
    runs: Annotated[Path, typer.Option(help="Store of the runs; what is there is not run again.")] = Path(
        "runs/methods"
    ),
    out: Annotated[Path, typer.Option(help="Folder for methods.json and methods.md.")] = Path("results/cpu"),
    redraw: Annotated[bool, typer.Option("--redraw", help="Only text and pictures again, from what is there.")] = False,
) -> None:
    """Measure every method's accuracy and budget on the tiny models."""
    if redraw:
        write(stored(out), out)
        return
    if limit is not None and limit < 1:
        raise UsageError(f"--limit must be at least 1, not {limit}.")
    study_all(model or NAMES, suite or SUITES, limit, runs, out)
    print(out / "methods.md")


if __name__ == "__main__":
    try:
        typer.run(main)
    except (UsageError, RunError) as error:
        raise SystemExit(str(error)) from None
