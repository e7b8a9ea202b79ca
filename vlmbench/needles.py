"""MMInference's patterns and boundaries on needles, on suites and head by head: run what is missing, then write it up.

    python -m vlmbench.needles --runs runs/needles --out results/cpu            (make needles)
    python -m vlmbench.needles --part maps --model tiny-llava-ov --limit 2

Every answer is an ordinary run below `--runs`, so a second call goes on where the first one stopped, and a larger `--limit`
adds to what is there. ``mminference.json`` holds the rows and is written after every part; parts that this call was not asked
for keep the rows they had. ``mminference.md`` and the pictures beside it are made from it alone (``--from`` only redraws).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from vlmbench import needles_study as study
from vlmbench.claims_study import Row, Scale, Study
from vlmbench.errors import RunError, UsageError
from vlmbench.files import read_json, write_json
from vlmbench.machine import load_backend
from vlmbench.needles_plots import draw
from vlmbench.needles_text import to_markdown
from vlmbench.progress import Progress
from vlmbench.reference import NAMES
from vlmbench.request import RunRequest
from vlmbench.spec import nearest

NAME = "mminference"
MEASURE: dict[str, Callable[[Study], list[Row]]] = {
    "recall": study.recall,
    "curve": study.curve,
    "mixed": study.mixed,
    "maps": study.maps,
}


def measure(models: Sequence[str], parts: Sequence[str], runs: Path, out: Path, scale: Scale) -> dict[str, Any]:
    """The content of ``mminference.json``, written with its text after every part. Raises `UsageError` and `RunError`."""
    data = stored(out)
    with Progress() as progress:
        backends = {}
        for model in models:
            request = RunRequest(model=model, device="cpu", offline=True, threads=scale.threads)
            backends[model] = load_backend(request, model)
            hash_ = backends[model].identity.weights_hash
            if data["models"].get(model, hash_) != hash_:  # of other weights: rows of another model
                data["rows"] = [row for row in data["rows"] if row["model"] != model]
            data["models"][model] = hash_
        for part in parts:
            for model in models:
                one = Study(model, backends[model], runs, scale, progress)
                rows = [{"model": model, "part": part, **row} for row in MEASURE[part](one)]
                data["rows"] = [row for row in data["rows"] if (row["model"], row["part"]) != (model, part)] + rows
                data["measured_on"] = list(dict.fromkeys([*data["measured_on"], *one.measured_on]))
                write(data, out)
    return data


def stored(out: Path) -> dict[str, Any]:
    """What earlier calls measured."""
    return read_json(out / f"{NAME}.json", {"schema": 1, "models": {}, "measured_on": [], "rows": []})


def write(data: dict[str, Any], out: Path) -> None:
    """``mminference.json``, the text and the pictures. Raises `RunError` when the folder cannot be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / f"{NAME}.json", data)
        draw(data, out / NAME)
        (out / f"{NAME}.md").write_text(to_markdown(data), "utf-8")
    except OSError as error:
        raise RunError(f"{out} cannot be written ({error.strerror}); choose another --out.") from error


def main(
    model: Annotated[
        list[str] | None, typer.Option(metavar="SPEC", help="Repeatable. Default: the tiny models.")
    ] = None,
    part: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(MEASURE)}. Repeatable. Default: all.")] = None,
    limit: Annotated[
        int | None, typer.Option(help="Questions of every suite, and of every cell of a map. Default: each part's own.")
    ] = None,
    length: Annotated[
        list[int] | None, typer.Option(help="Frames of the videos. Repeatable. Default: each part's own.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads. Default: torch's.")] = None,
    runs: Annotated[Path, typer.Option(help="Store of the runs; what is there is not run again.")] = Path(
        "runs/needles"
    ),
    out: Annotated[Path, typer.Option(help="Folder for mminference.json, .md and pictures.")] = Path("results/cpu"),
    redraw: Annotated[bool, typer.Option("--redraw", help="Only text and pictures again, from what is there.")] = False,
) -> None:
    """Measure MMInference on needles and write what every pattern and boundary earns."""
    if redraw:
        write(stored(out), out)
        return
    parts = [name for text in part or MEASURE for name in text.split(",")]
    for name in parts:
        if name not in MEASURE:
            raise UsageError(f"--part must be of {', '.join(MEASURE)}, not {name!r}.{nearest(name, tuple(MEASURE))}")
    if limit is not None and limit < 1:
        raise UsageError(f"--limit must be above 0, not {limit}.")
    if min(length or (2,)) < 2:
        raise UsageError(f"--length must be at least 2 frames, not {min(length or ())}.")
    scale = Scale(lengths=tuple(sorted(set(length or ()))), limit=limit, threads=threads)
    measure(model or NAMES, parts, runs, out, scale)
    print(out / f"{NAME}.md")


if __name__ == "__main__":
    try:
        typer.run(main)
    except (UsageError, RunError) as error:
        raise SystemExit(str(error)) from None
