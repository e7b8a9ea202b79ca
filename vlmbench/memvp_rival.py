"""MemVP against its rivals: the same frozen language model, data, steps and number of trained parameters.

    python -m vlmbench.memvp_rival --model tiny-llava-ov --suite synthimage --steps 300 --batch 8 --lr 0.005 --slots 160

`lora` reads the visual tokens in the prompt, as the aligned model was trained to, and trains low-rank updates (peft) of all
linear layers of the language model; `memvp+lora` trains both, without visual tokens. A command measures what `--part` names
(all by default) of one model on one suite and enters it into ``memvp.json`` and ``memvp.md``. What was stopped goes on from
`--runs`; a training that is over is not trained again.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from vlmbench import memvp_times
from vlmbench.errors import RunError, UsageError
from vlmbench.memvp_contest import NAMES, Contest, Options
from vlmbench.methods.memvp import Memvp
from vlmbench.progress import Progress
from vlmbench.request import RunRequest
from vlmbench.spec import nearest

PARTS = ("run", "rivals", "steps", "prefill")


def main(
    model: Annotated[str, typer.Option(metavar="SPEC", help="Which model.")],
    suite: Annotated[str, typer.Option(metavar="SPEC", help="Which suite.")] = "synthimage",
    part: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(PARTS)}. Repeatable. Default: all.")] = None,
    name: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(NAMES)}. Repeatable. Default: all.")] = None,
    steps: Annotated[int | None, typer.Option(help="Of every training. Default: 20 epochs.")] = None,
    batch: Annotated[int | None, typer.Option(help="Questions a step. Default: 32.")] = None,
    lr: Annotated[float | None, typer.Option(help="Of MemVP alone. Default: 0.009 · batch / 256.")] = None,
    lora_lr: Annotated[float, typer.Option(help="Where LoRA is trained.")] = Options.lora_lr,
    slots: Annotated[int | None, typer.Option(help="Of MemVP's memory.")] = None,
    start: Annotated[str | None, typer.Option(metavar="FILE", help="What MemVP's training begins with.")] = None,
    limit: Annotated[int | None, typer.Option(help="Test questions. Default: all.")] = None,
    train_limit: Annotated[int | None, typer.Option(help="Train questions. Default: all.")] = None,
    timed: Annotated[int, typer.Option(help="Videos or pictures whose answer is timed.")] = 8,
    rounds: Annotated[int, typer.Option(help="Of the prefill.")] = Options.rounds,
    shape: Annotated[str, typer.Option(help="Of the prefill.")] = memvp_times.LLAMA,
    seed: Annotated[int, typer.Option(help="Of training.")] = 0,
    threads: Annotated[int | None, typer.Option(help="CPU threads. Default: torch's.")] = None,
    runs: Annotated[Path, typer.Option(help="Where runs are stored and trainings go on from.")] = Path("runs/memvp"),
    out: Annotated[Path, typer.Option(help="Folder for memvp.json and memvp.md.")] = Path("results/cpu"),
) -> None:
    """Measure MemVP beside its rivals and write what came out."""
    for option, given, known in (("--part", part or [], PARTS), ("--name", name or [], NAMES)):
        if unknown := [each for each in given if each not in known]:
            raise UsageError(f"{option} must be of {', '.join(known)}, not {unknown[0]!r}.{nearest(unknown[0], known)}")
    for option, value in (
        ("--lr", lr),
        ("--lora-lr", lora_lr),
        ("--steps", steps),
        ("--batch", batch),
        ("--rounds", rounds),
    ):
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise UsageError(f"{option} must be above 0, not {value:g}.")
    request = RunRequest(
        model=model,
        suite=suite,
        limit=limit,
        timed=timed,
        threads=threads,
        seed=seed,
        out=runs,
        device="cpu",
        offline=True,
    )
    options = Options(steps, batch, lr, lora_lr, train_limit, rounds, shape)
    with Progress() as progress:
        contest = Contest(request, Memvp(slots=slots, start=start), options, out, progress)
        for each in part or PARTS:
            if each == "rivals":
                contest.rivals(name or NAMES)
            else:
                getattr(contest, each)()
    print(out / "memvp.md")


if __name__ == "__main__":
    try:
        typer.run(main)
    except (UsageError, RunError) as error:
        raise SystemExit(str(error)) from None
