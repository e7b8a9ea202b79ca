"""How far CoreMatching's theory holds, layer by layer, out of stored runs: ``python -m vlmbench.core_study DIR``.

The paper argues that a token's co-activation with core neurons grows with α‖V‖cos, its share of what the last token's attention
writes. Runs of ``corematching:spearman=on`` note the rank correlation of the two for every layer of every sample; here are its
median over samples and how far it spreads. 1 is the same order, 0 none.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from vlmbench.errors import UsageError
from vlmbench.loaded import Loaded
from vlmbench.plain import cell, code
from vlmbench.spec import joined
from vlmbench.store import ResultStore

SAID = (
    "rank correlation (Spearman) of a visual token's score, how many core neurons are positive in it, with α‖V‖cos, over the "
    "tokens that the layer sees; median, first and third quartile over samples; a layer whose scores are all equal has none"
)


def rows(runs: Iterable[Loaded]) -> list[dict[str, Any]]:
    """A row for each run and layer that noted it: model, suite, method, layer, n (samples), median, q1, q3, share above 0."""
    import numpy as np

    found = []
    for run in runs:
        by_layer: dict[int, list[float]] = defaultdict(list)
        for record in run.samples.values():
            for layer, value in ((record.trace or {}).get("spearman") or {}).items():
                if value is not None:
                    by_layer[int(layer)].append(value)
        for layer, values in sorted(by_layer.items()):
            low, middle, high = (float(each) for each in np.quantile(values, (0.25, 0.5, 0.75)))
            found.append(
                {
                    "model": run.spec["model"],
                    "suite": run.suite,
                    "method": joined(run.method, run.params),
                    "layer": layer,
                    "n": len(values),
                    "median": middle,
                    "q1": low,
                    "q3": high,
                    "positive": sum(value > 0 for value in values) / len(values),
                }
            )
    return found


def to_markdown(found: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| model | suite | method | layer | samples | median | quartiles | above 0 |"]
    lines.append("| --- | --- | --- |" + " ---: |" * 5)
    for row in found:
        spread = f"{row['q1']:.2f} to {row['q3']:.2f}"
        names = (cell(row["model"]), cell(row["suite"]), code(row["method"]))
        figures = (str(row["layer"]), str(row["n"]), f"{row['median']:.2f}", spread, f"{row['positive']:.0%}")
        lines.append(f"| {' | '.join((*names, *figures))} |")
    return "\n".join([*lines, "", f"- {SAID}"]) + "\n"


def study(folder: Path) -> list[dict[str, Any]]:
    """The rows of a results folder. Raises `UsageError` when no run in it noted correlations."""
    found = rows(Loaded(view) for view in ResultStore(folder).runs())
    if not found:
        raise UsageError(f"{folder} holds no run of corematching:spearman=on; make one with vlmbench run.")
    return found


def main(
    folder: Annotated[Path, typer.Argument(help="Results of `vlmbench run --method corematching:spearman=on`.")],
    as_json: Annotated[bool, typer.Option("--json", help="Rows for programs instead of a table.")] = False,
) -> None:
    """Print the rank correlations of CoreMatching's score with its own yardstick, layer by layer."""
    try:
        found = study(folder)
    except UsageError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
    typer.echo(json.dumps({"schema": 1, "rows": found}, indent=1) if as_json else to_markdown(found), nl=as_json)


if __name__ == "__main__":
    typer.run(main)
