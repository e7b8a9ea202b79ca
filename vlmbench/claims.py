"""PEVLM's claims in miniature: run what is missing, then write each claim's table and whether it held.

    python -m vlmbench.claims --runs runs/claims --out results/cpu            (make claims)
    python -m vlmbench.claims --part ladder --part grid --model tiny-llava-ov --limit 66

Every answer and time is an ordinary run below `--runs`, so a second call goes on where the first one stopped, and a larger
`--limit` adds to what is there. ``pevlm.json`` holds the rows and is written after every part; parts that this call was not
asked for keep the rows they had. ``pevlm.md`` is made from it alone (`vlmbench.claims_text`), as `make tables` checks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from vlmbench import claims_accuracy, claims_time
from vlmbench.claims_study import Row, Scale, Study
from vlmbench.claims_text import PARTS, to_markdown
from vlmbench.errors import RunError, UsageError
from vlmbench.files import read_json, write_json
from vlmbench.machine import load_backend
from vlmbench.progress import Progress
from vlmbench.reference import NAMES, SHIPPED
from vlmbench.request import RunRequest
from vlmbench.spec import nearest

MEASURE: dict[str, Callable[[Study], list[Row]]] = {
    "ladder": claims_accuracy.ladder,
    "rivals": claims_accuracy.rivals,
    "grid": claims_accuracy.grid,
    "cuts": claims_accuracy.cuts,
    "better": claims_accuracy.better,
    "latency": claims_time.latency,
    "lengths": claims_time.lengths,
    "speed": claims_time.speed,
    "questions": claims_time.questions,
}


def measure(models: Sequence[str], parts: Sequence[str], runs: Path, out: Path, scale: Scale) -> dict[str, Any]:
    """The content of ``pevlm.json``, written with its text after every part. Raises `UsageError` and `RunError`."""
    data = stored(out)
    with Progress() as progress:
        for model in models:
            if model in NAMES and model not in SHIPPED:
                progress.note(f"{model} is not shipped in this checkout; it is left out")
                _know(data, model, None)
                write(data, out)
                continue
            request = RunRequest(model=model, device="cpu", offline=True, threads=scale.threads)
            backend = load_backend(request, model)
            _know(data, model, backend.identity.weights_hash)
            for part in parts:
                study = Study(model, backend, runs, scale, progress)
                rows = MEASURE[part](study)
                _replace(data, "rows", model, part, rows)
                _replace(data, "measured_on", model, part, [{"on": each} for each in study.measured_on])
                write(data, out)
    return data


def stored(out: Path) -> dict[str, Any]:
    """What earlier calls measured."""
    return read_json(out / "pevlm.json", {"schema": 1, "models": [], "measured_on": [], "rows": []})


def _know(data: dict[str, Any], model: str, weights_hash: str | None) -> None:
    """Enter the model; rows of other weights of that name go, since they are of another model."""
    known = {each["model"]: each["weights_hash"] for each in data["models"]}
    if known.get(model, weights_hash) != weights_hash:
        for key in ("rows", "measured_on"):
            data[key] = [each for each in data[key] if each["model"] != model]
    names = [*known, *([] if model in known else [model])]
    ordered = [*(name for name in NAMES if name in names), *(name for name in names if name not in NAMES)]
    data["models"] = [{"model": name, "weights_hash": {**known, model: weights_hash}[name]} for name in ordered]


def _replace(data: dict[str, Any], key: str, model: str, part: str, rows: Sequence[Row]) -> None:
    others = [each for each in data[key] if (each["model"], each["part"]) != (model, part)]
    data[key] = [*others, *({"model": model, "part": part, **row} for row in rows)]


def write(data: dict[str, Any], out: Path) -> None:
    """``pevlm.json`` and ``pevlm.md``. Raises `RunError` when the folder cannot be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "pevlm.json", data)
        (out / "pevlm.md").write_text(to_markdown(data), "utf-8")
    except OSError as error:
        raise RunError(f"{out} cannot be written ({error.strerror}); choose another --out.") from error


def main(
    model: Annotated[
        list[str] | None, typer.Option(metavar="SPEC", help="Repeatable. Default: the tiny models.")
    ] = None,
    part: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(PARTS)}. Repeatable. Default: all.")] = None,
    limit: Annotated[
        int | None,
        typer.Option(help="Questions of every comparison. Default: 132, 66 and 33 up to 32, 128 and 384 frames."),
    ] = None,
    length: Annotated[
        list[int] | None, typer.Option(help="Frames of the videos. Repeatable. Default: 32, 128 and 384.")
    ] = None,
    timed: Annotated[int, typer.Option(help="Videos of every time; below 6 there is no interval.")] = 6,
    latency_limit: Annotated[float, typer.Option(metavar="SECONDS", help="Of the part `latency`.")] = 1.0,
    longest_prefill: Annotated[
        float, typer.Option(metavar="SECONDS", help="Of full attention, in the part `lengths`.")
    ] = 10.0,
    threads: Annotated[int | None, typer.Option(help="CPU threads. Default: torch's.")] = None,
    runs: Annotated[Path, typer.Option(help="Store of the runs; what is there is not run again.")] = Path(
        "runs/claims"
    ),
    out: Annotated[Path, typer.Option(help="Folder for pevlm.json and pevlm.md.")] = Path("results/cpu"),
) -> None:
    """Measure PEVLM's claims on the tiny models and write whether they held."""
    parts = [name for text in part or PARTS for name in text.split(",")]
    for name in parts:
        if name not in PARTS:
            raise UsageError(f"--part must be of {', '.join(PARTS)}, not {name!r}.{nearest(name, PARTS)}")
    lengths = tuple(sorted(set(length or Scale.lengths)))
    if min(lengths) < 16:
        raise UsageError(f"--length must be at least 16 frames, two blocks of PEVLM, not {min(lengths)}.")
    for option, value in (("--limit", limit), ("--timed", timed), ("--latency-limit", latency_limit)):
        if value is not None and value <= 0:
            raise UsageError(f"{option} must be above 0, not {value:g}.")
    scale = Scale(
        lengths=lengths,
        limit=limit,
        timed=timed,
        latency_limit_s=latency_limit,
        longest_prefill_s=longest_prefill,
        threads=threads,
    )
    measure(model or NAMES, parts, runs, out, scale)
    print(out / "pevlm.md")


if __name__ == "__main__":
    try:
        typer.run(main)
    except (UsageError, RunError) as error:
        raise SystemExit(str(error)) from None
