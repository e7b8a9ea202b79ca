"""``memvp.json`` as Markdown. Every number and every verdict is read from the rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from vlmbench.claims_verdict import Verdict, above, number, sentence, shown, signed
from vlmbench.reference.inside_format import percent, table

Row = Mapping[str, Any]

LEAST, ABOVE_BLIND = 0.85, 0.40
"""Asked of MemVP on `synthimage`: accuracy, and how far above the same model without a picture."""
STEP = 1.5
"""Asked of a training step at 256 visual tokens: the rival's seconds over MemVP's."""
NEAR = 0.10
"""How far the measured prefill may be from what the operations allow."""


class Part(NamedTuple):
    title: str
    said: str
    """What is measured, and what was asked."""
    tell: Callable[[Sequence[Row]], Iterable[str]]
    """Tables and sentences of one model's rows on one suite."""


def _run(rows: Sequence[Row]) -> Iterable[str]:
    head = [
        "method",
        "n",
        "visual tokens",
        "accuracy",
        "against full",
        "prefill ×",
        "end to end ×",
        "KV, KiB",
        "peak, MiB",
    ]
    lines = [
        [
            f"`{row['method']}`",
            str(row["n"]),
            number(row["n_visual_tokens"], ".0f"),
            shown(row, "accuracy"),
            signed(row, "accuracy_delta"),
            shown(row, "speedup_prefill"),
            shown(row, "speedup_e2e"),
            _sized(row["kv_bytes"], 2**10),
            _sized(row["peak_extra_bytes"], 2**20),
        ]
        for row in rows
    ]
    yield table(head, lines)
    own = next((row for row in rows if row["method"] == "memvp"), None)
    if own is None or not own["suite"].startswith("synthimage"):
        return
    least = Verdict.HELD if own["accuracy"] >= LEAST else Verdict.FAILED
    yield "\n".join(
        [
            sentence(
                least, f"trained MemVP answers at least {percent(LEAST)} of the questions: {shown(own, 'accuracy')}."
            ),
            sentence(
                above(own, "above_blind", ABOVE_BLIND),
                f"it is at least {100 * ABOVE_BLIND:.0f} points above no picture at all: {signed(own, 'above_blind')}.",
            ),
        ]
    )


def _rivals(rows: Sequence[Row]) -> Iterable[str]:
    head = ["trained", "parameters", "adapter, KiB", "steps × batch", "lr", "training, s", "n", "test accuracy"]
    lines = [
        [
            row["name"]
            + (f", rank {row['lora_rank']}" if row["lora_rank"] else "")
            + (", begun with the file of pictures" if row.get("start") else ""),
            f"{row['trained_parameters']:,}",
            f"{row['bytes'] / 2**10:.0f}",
            f"{row['steps']} × {row['batch']}",
            f"{row['lr']:g}" + ("" if row.get("lora_lr") in (None, row["lr"]) else f" and {row['lora_lr']:g}"),
            f"{row['train_s']:.0f}",
            str(row["n"]),
            shown(row, "accuracy"),
        ]
        for row in rows
    ]
    yield table(head, lines)
    steps = sorted({each["step"] for row in rows for each in row["curve"]})
    shown_steps = [step for i, step in enumerate(steps) if i % max(1, len(steps) // 5) == max(1, len(steps) // 5) - 1]
    curves = []
    for row in rows:
        at = {each["step"]: each for each in row["curve"]}
        held = [at.get(step, {}).get("held_out") for step in shown_steps]
        curves.append([row["name"], *(number(each, ".2f") for each in held)])
    yield "Held-out train questions answered, step by step:\n\n" + table(["trained", *map(str, shown_steps)], curves)


def _steps(rows: Sequence[Row]) -> Iterable[str]:
    (row,) = rows
    head = ["trained", "seconds a step", "most bytes of a step, MiB"]
    names = {"memvp": "memvp", "lora": "lora, visual tokens in the prompt"}
    lines = [[said, f"{row[f'{name}_s']:.3f}", f"{row[f'{name}_bytes'] / 2**20:.1f}"] for name, said in names.items()]
    yield f"{row['visual_tokens']} visual and {row['text_tokens']} text tokens, batch {row['batch']}:\n\n" + table(
        head, lines
    )
    verdict = Verdict.HELD if row["ratio_low"] >= STEP else Verdict.FAILED if row["ratio_high"] < STEP else Verdict.OPEN
    yield sentence(
        verdict,
        f"a step of MemVP is at least {STEP:g}× faster: {row['ratio']:.2f}× (from {row['ratio_low']:.2f} to "
        f"{row['ratio_high']:.2f} over {row['rounds']} rounds in turns, {row['threads']} threads); it holds "
        f"{row['lora_bytes'] / row['memvp_bytes']:.1f}× less beside the weights.",
    )


def _prefill(rows: Sequence[Row]) -> Iterable[str]:
    head = ["text tokens", "tokens in the prompt, s", "memory, s", "×", "operations allow ×"]
    lines = [
        [
            str(row["text_tokens"]),
            f"{row['tokens_s']:.2f}",
            f"{row['memory_s']:.2f}",
            f"{row['ratio']:.2f} ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})",
            f"{row['expected']:.2f}",
        ]
        for row in rows
    ]
    first = rows[0]
    yield (
        f"{first['layers']} layers of width {first['hidden']} and {first['intermediate']}, batch {first['batch']}, "
        f"{first['visual_tokens']} visual tokens or {first['slots']} slots, float32, {first['rounds']} rounds in turns, "
        f"{first['threads']} threads:\n\n" + table(head, lines)
    )
    for row in rows:
        share = row["ratio"] / row["expected"]
        yield sentence(
            Verdict.HELD if abs(share - 1) <= NEAR else Verdict.FAILED,
            f"with {row['text_tokens']} text tokens the gain is within {percent(NEAR)} of what operations allow: {share:.2f} "
            "of it.",
        )


def _ablations(rows: Sequence[Row]) -> Iterable[str]:
    kinds = {
        "trained": "Trained anew, each alike but for one thing",
        "changed": "The shipped file, changed without training",
    }
    for kind, title in kinds.items():
        own = [row for row in rows if row["kind"] == kind]
        if not own:
            continue
        how = f" ({own[0]['steps']} steps of {own[0]['batch']})" if kind == "trained" else ""
        lines = [[row["what"], str(row["n"]), shown(row, "accuracy"), signed(row, "delta")] for row in own]
        yield f"{title}{how}:\n\n" + table(["what", "n", "answered", "against the first"], lines)


def _slots(rows: Sequence[Row]) -> Iterable[str]:
    (row,) = rows
    seen = percent(round(row["visual_share"], 2))
    said = (
        f"Over {row['n']} questions, {seen} of what memory adds comes from the {row['visual']} slots, of {row['slots']}, that "
        "see something"
    )
    if row["place_share"] is not None:
        there, chance = (percent(round(row[f"place_{name}"], 2)) for name in ("share", "chance"))
        said += f"; of that, {there} from the quarter of the picture where the thing asked for is (by chance {chance})"
    yield f"{said}."


def _sized(value: float | None, unit: int) -> str:
    return "—" if value is None else f"{value / unit:.1f}"


PARTS: dict[str, Part] = {
    "run": Part(
        "The shipped files beside full attention and no picture",
        f"`vlmbench run --method memvp`, on *n* test questions. Asked: at least {percent(LEAST)} on `synthimage`, and "
        f"{100 * ABOVE_BLIND:.0f} points above `blind`. × is full attention's time over the method's: LoRA merged into the "
        "weights takes full attention's.",
        _run,
    ),
    "rivals": Part(
        "Beside LoRA with the visual tokens in the prompt",
        "The same train questions, steps and batch, and as many trained parameters as a whole rank allows; `memvp+lora` has "
        "both. LoRA starts from a model that reads visual tokens already; MemVP has to learn to see. A tenth of the pictures "
        "or videos is held out. Times were taken while other work ran; the next part compares them.",
        _rivals,
    ),
    "steps": Part(
        "A training step",
        f"MemVP without visual tokens in the prompt against LoRA with them, in turns in one process. Asked: {STEP:g}×.",
        _steps,
    ),
    "prefill": Part(
        "Prefill at the shape of LLaMA-7B",
        "The language model alone: visual tokens in the prompt against visual tokens in memory, in turns in one process. "
        f"Asked: within {percent(NEAR)} of the ratio of operations.",
        _prefill,
    ),
    "ablations": Part(
        "What it rests on",
        "Answers to train questions about pictures or videos that were held out, read in one pass with the answer's own "
        "tokens before them.",
        _ablations,
    ),
    "slots": Part(
        "Which slots fire for which question", "φ(u·K) times the length of V, where the answer begins.", _slots
    ),
}


def to_markdown(data: Mapping[str, Any]) -> str:
    """The whole report."""
    parts = [
        "# MemVP, trained",
        "Written from `memvp.json` by `python -m vlmbench.memvp_rival` and `python -m vlmbench.memvp_ablations`; do not edit. "
        "float32 on a CPU: read ratios, not seconds. Brackets are 95 % intervals clustered by picture or video. **Held** and "
        "**Did not hold** are of what was asked, **Open** that the interval holds both.",
    ]
    for name, part in PARTS.items():
        own = [row for row in data["rows"] if row["part"] == name]
        parts += [f"## {part.title}", part.said]
        for (model, suite), rows in groupby(own, key=lambda row: (row["model"], row["suite"])):
            parts += [f"**{model}**" + (f" on `{suite}`" if suite else ""), *part.tell(list(rows))]
        if name == "slots" and own:
            parts.append(f"![Firing by question and slot]({own[0]['picture']})")
        if not own:
            parts.append("Not measured.")
    parts += ["## Measured on", _machines(data["measured_on"])]
    return "\n\n".join(parts) + "\n"


def _machines(origins: Sequence[Mapping[str, str]]) -> str:
    found: dict[str, dict[str, None]] = {}
    for each in origins:
        found.setdefault(each["on"], {})[f"{each['part']} of {each['model']}"] = None
    return "\n".join(f"- {on} ({', '.join(where)})" for on, where in sorted(found.items())) or "Nothing."
