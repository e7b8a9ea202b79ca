"""What a large table costs: ``python -m vlmbench.table_cost`` makes up a results folder and reads it as `vlmbench table` does.

2700 questions × 6 methods × 3 suites is Video-MME's size three times over. Seconds are of the processor, so that a busy machine
says the same; memory is the high-water mark of a process that does nothing else.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from vlmbench.record import Frame, Memory, Pass, SampleRecord, Timing

SAMPLES, METHODS, SUITES = 2700, ("full", "a", "b", "c", "d", "e"), ("one", "two", "three")
LAYERS, FRAMES, TIMED = 28, 32, 8
BOUND_S, BOUND_BYTES = 3.0, 2**30

READ = """
import json, resource, sys, time
begin = time.process_time()
from vlmbench import report
rows = report.rows(sys.argv[1])
text = report.to_markdown(rows)
used = time.process_time() - begin
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"rows": len(rows), "cpu_s": used, "peak_bytes": peak}))
"""


def record(number: int, pass_: Pass, rng: random.Random) -> SampleRecord:
    """As a 7B model leaves it: 64 log-probabilities, 28 layers of work, 32 frames."""
    ids = rng.sample(range(150_000), 64)
    found = SampleRecord(
        id=f"{number // 3:03d}-{number % 3}",
        pass_=pass_,
        cluster=f"{number // 3:03d}",
        status="ok",
        template="task",
        strata={"duration": "long", "type": "Counting Problem"},
        prediction="ABCD"[rng.randrange(4)],
        answer="A",
        raw_text="A.",
        output_ids=[32, 13],
        score=float(rng.random() < 0.6),
        frames=[Frame(index * 30, float(index)) for index in range(FRAMES)],
        size=(360, 640),
        tokens={"prompt": 6400, "visual": 6272},
    )
    if pass_ == "accuracy":
        found.first_token = {"ids": ids, "logprobs": [round(-0.1 - i / 9, 5) for i in range(64)], "tail": -9.1}
        work = {name: [6400] * LAYERS for name in ("tokens", "pairs", "neurons")}
        found.work = {**work, "flops": 10**14, "attention_flops": 10**13}
        found.trace = {"kept": {"prompt": [[0, 6400]]}}
    elif pass_ == "latency":
        timing = Timing(0.1, 0.1, 0.01, 0.5, 0.01, 1 + rng.random() / 10, (0.02,) * 15, 0.01, 1.5, 2.0)
        found.timing, found.rounds, found.baseline_rounds = timing, [timing] * 3, [timing] * 3
    else:
        found.memory = Memory(2**34, 2**30, 2**28, 2**28, 2**34)
    return found


def make(root: Path) -> None:
    """The results folder."""
    from vlmbench.backend import Identity
    from vlmbench.header import make_header
    from vlmbench.spec import AnswerSpec, MeasureSpec
    from vlmbench.store import ResultStore

    rng = random.Random(0)
    measure = MeasureSpec(mode="all", warmup=1, repeats=3, threads=2, device_name="made up")
    identity = Identity("model", None, "w", "bfloat16", "cuda", "made up", "sdpa", "flash", "flash", {})
    for suite in SUITES:
        for method in METHODS:
            answer = AnswerSpec(
                model="model", revision=None, weights_hash="w", method=method, method_params={}, suite=suite,
                suite_version="1", suite_params={}, prompt_style="suite", frames=FRAMES, sampler="endpoints", fps=None,
                max_pixels=None, min_pixels=None, decoder="decord", attention="sdpa", dtype="bfloat16",
                device_type="cuda", max_new_tokens=16, seed=0,
            )  # fmt: skip
            with ResultStore(root).open(answer, make_header(answer, measure, identity, {})) as run:
                for number in range(SAMPLES):
                    run.append(record(number, "accuracy", rng))
                for number in range(0, 3 * TIMED, 3):
                    run.append(record(number, "latency", rng))
                    run.append(record(number, "memory", rng))


def measured(root: Path) -> dict[str, Any]:
    """``{rows, cpu_s, peak_bytes}`` of reading it in a process of its own."""
    done = subprocess.run(  # noqa: S603 (our own interpreter)
        [sys.executable, "-c", READ, str(root)], capture_output=True, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main(
    out: Annotated[Path | None, typer.Option(help="Write what was measured there as JSON.")] = None,
    folder: Annotated[Path | None, typer.Option(help="Make the results there, or read those that are there.")] = None,
) -> None:
    """Make the results, read them, and fail when that took longer or more memory than it may."""
    with tempfile.TemporaryDirectory() as made:
        root = folder or Path(made)
        if not any(root.rglob("header.json")):
            make(root)
        found = measured(root)
    found |= {"samples": SAMPLES, "methods": len(METHODS), "suites": len(SUITES)}
    found |= {"bound_s": BOUND_S, "bound_bytes": BOUND_BYTES}
    text = json.dumps({"schema": 1, "rows": [found]}, indent=1) + "\n"
    if out is not None:
        out.write_text(text, encoding="utf-8")
    print(text, end="")
    raise typer.Exit(int(found["cpu_s"] > BOUND_S or found["peak_bytes"] > BOUND_BYTES))


if __name__ == "__main__":
    typer.run(main)
