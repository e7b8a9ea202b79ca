"""A bench row as a line for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def to_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """A few columns of the rows for people."""
    return "\n".join(_line(row) for row in rows)


def _line(row: Mapping[str, Any]) -> str:
    where = f"{row['op']}: {row['method']} {row['tokens']} tokens"
    if row["per_layer"] and row["layers"]:
        where += f", {row['layers']} of {row['model_layers']} layers"
    says = [f"{row['dtype']} on {row['device']}"]
    if row["op"] == "attention":
        says.append(f"check: {row['check'] or 'not asked for'}")
    if row["flops_share"] is not None:
        says.append(f"{row['flops_share']:.0%} of the device's matrix rate, {row['bytes_share']:.0%} of its bandwidth")
    if row["method_kernels_s"]:
        says.append(f"each way: {', '.join(f'{name} {s:.4g} s' for name, s in row['method_kernels_s'].items())}")
    if row["method_refused"]:
        says.append(f"without a time: {', '.join(f'{name} ({why})' for name, why in row['method_refused'].items())}")
    says += [f"marks: {', '.join(row['marks'])}"] if row["marks"] else []
    says += [row["note"]] if row["note"] else []
    own, dense = (f"{row[key]:.4g} s" if row[key] is not None else "no time" for key in ("method_s", "dense_s"))
    ratio = "no ratio"
    if row["ratio"] is not None:
        ratio = f"{row['ratio']:.2f}×"
        ratio += f" [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]" if row["ratio_low"] is not None else ""
        ratio += f" of at most {row['pairs_limit']:.2f}" if row["pairs_limit"] else ""
    return f"{where}: {ratio} ({own} against {dense} with {row['dense_kernel'] or 'no kernel'}; {'; '.join(says)})"
