"""The project's own gate: what every method computes on one made-up prompt, counted exactly and held against a committed file.

``python -m vlmbench.work_gate`` compares (exit 1 on any difference), ``--update`` writes. Time is never looked at: a count
that moved is a change of the method or of its bookkeeping, on any machine, and belongs into the commit that moved it.

Some counts are decided by activations (how many tokens are above CoreMatching's knee), and a processor that rounds another way
may move those. ``--update`` therefore counts with several sets of random weights, and a figure that is not the same with all
of them is written as null and never compared.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlmbench.files import write_json
from vlmbench.record import SCHEMA

if TYPE_CHECKING:
    from vlmbench.method import Method
    from vlmbench.models.base import ModelAdapter

FILE = Path("results/work.json")
MODELS = ("mini-llava-ov@random", "mini-qwen2-vl@random", "mini-qwen2.5-vl@random")
"""Small random models of every family: counts depend on shapes, and on weights only where a method chooses by them."""
SEEDS = tuple(range(8))
"""Random weights that a figure must be the same with to be compared; the first are those that are compared with."""
FRAMES = 6
KEY = ("model", "method")

Row = dict[str, Any]


def counted(adapter: ModelAdapter, model: str, methods: Sequence[Method]) -> Iterator[Row]:
    """A row a method: tokens, pairs and neurons summed over layers, FLOPs, and bytes of the cache after the answer."""
    from vlmbench import work as works
    from vlmbench.cache import cache_bytes
    from vlmbench.check_promises import Subject
    from vlmbench.loaded import typed
    from vlmbench.session import make_methods
    from vlmbench.spec import joined, params_of

    (full,) = make_methods(("full",))
    for method in methods:
        subject = Subject(adapter, method, full, FRAMES)
        done, trace = subject.answer(method, [subject.clip()])
        work = method.work(done.prompt, adapter.shapes, trace)
        used, reserved = cache_bytes(done.cache)
        yield {
            "model": model,
            "method": joined(method.name, typed(params_of(method))),
            "visual_tokens": done.prompt.layout.n_visual,
            "tokens": sum(work.tokens),
            "pairs": sum(work.pairs),
            "neurons": sum(work.neurons),
            "flops": works.flops(work, adapter.shapes),
            "attention_flops": works.attention_flops(work, adapter.shapes),
            "kv_bytes": used,
            "kv_reserved_bytes": reserved,
        }


def rows(
    models: Sequence[str] = MODELS, names: Sequence[str] | None = None, seeds: Sequence[int] = SEEDS[:1]
) -> list[Row]:
    """Every method's examples on every model; `names` leaves out the other methods. See `settled` for several `seeds`."""
    import torch

    from vlmbench import registry
    from vlmbench.models.loading import load

    classes = [registry.methods.load(name) for name in names or registry.methods.names()]
    methods = [example for cls in classes if cls.traits.uses_model for example in cls.examples()]
    found = []
    for model in models:
        runs = []
        for seed in seeds:
            adapter = load(model, dtype=torch.float32, device="cpu", attention="sdpa", seed=seed).adapter
            runs.append(list(counted(adapter, model, methods)))
        found += settled(runs)
    return found


def settled(runs: Sequence[Sequence[Row]]) -> list[Row]:
    """The rows of runs with different weights, with None for each figure that is not the same in all of them."""
    return [
        {name: value if all(other[name] == value for other in others) else None for name, value in row.items()}
        for row, *others in zip(*runs, strict=True)
    ]


def differences(committed: Sequence[Mapping[str, Any]], fresh: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each figure that moved, and for each row that came or went; what is committed as None may be anything."""
    old, new = ({tuple(row[name] for name in KEY): row for row in side} for side in (committed, fresh))
    said = [f"{' '.join(key)}: not in the committed file" for key in new if key not in old]
    said += [f"{' '.join(key)}: no longer there" for key in old if key not in new]
    for key in old:
        for name in [*old[key], *(new[key].keys() - old[key].keys())] if key in new else []:
            was, now = old[key].get(name), new[key].get(name)
            free = name in old[key] and name in new[key] and was is None
            if was != now and not free:
                said.append(f"{' '.join(key)}: {name} {was} → {now}")
    return said


def main(
    file: Annotated[Path, typer.Option(help="The committed counts.")] = FILE,
    update: Annotated[bool, typer.Option("--update", help="Write what is counted now.")] = False,
) -> None:
    """Count every method's work and compare it with the committed file."""
    if update:
        write_json(file, {"schema": SCHEMA, "rows": rows(seeds=SEEDS)})
        return
    fresh = rows()
    try:
        committed = json.loads(file.read_text(encoding="utf-8"))["rows"]
    except (OSError, ValueError, KeyError) as error:
        typer.echo(f"{file} cannot be read ({error}); write it with --update.", err=True)
        raise typer.Exit(2) from error
    said = differences(committed, fresh)
    for line in said:
        typer.echo(line, err=True)
    if said:
        typer.echo(
            f"{len(said)} counts moved; if they were meant to, run it with --update and commit {file}.", err=True
        )
        raise typer.Exit(1)
    free = sum(value is None for row in committed for value in row.values())
    typer.echo(
        f"{len(fresh)} rows of exact counts are as committed; {free} figures that activations decide were not compared"
    )


if __name__ == "__main__":
    typer.run(main)
