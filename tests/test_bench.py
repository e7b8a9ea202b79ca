"""``vlmbench bench``: rows as the contract names them, a check that can fail, and no ratio when it does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from vlmbench import bench
from vlmbench.errors import RunError
from vlmbench.kernels.block_attention import blocks

ROOT = Path(__file__).resolve().parents[1]
CONTRACT = [
    "op",
    "method",
    "params",
    "tokens",
    "frames",
    "frame_tokens",
    "shape",
    "heads",
    "kv_heads",
    "head_dim",
    "batch",
    "dtype",
    "device",
    "dense_s",
    "dense_kernel",
    "method_s",
    "dense_rounds_s",
    "method_rounds_s",
    "ratio",
    "ratio_low",
    "ratio_high",
    "pairs_limit",
    "index_s",
    "check",
    "peak_bytes",
    "per_layer",
]
SMALL = ("--frames", 12, "--frame-tokens", 4, "--head-dim", 16, "--rounds", 6)


@pytest.mark.parametrize(
    "method", ["pevlm:sink=2,block=2", "block:block=3", "star", "ape:block=3,temperature=1,scale=1"]
)
def test_rows_have_the_contracts_columns_and_pass_the_check(cli: Callable[..., Any], method: str) -> None:
    called = cli("bench", "attention", "--method", method, "--check", "--format", "json", *SMALL)
    assert called.code == 0, called.err
    (row,) = json.loads(called.out)["rows"]
    assert list(row) == list(bench.COLUMNS)
    assert list(row)[: len(CONTRACT)] == CONTRACT
    assert row["flops_share"] > 0
    assert row["tokens"] == 14 + 12 * 4 + 60
    assert len(row["dense_rounds_s"]) == len(row["method_rounds_s"]) == 6
    assert row["check"].startswith("122 rows within")
    assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
    assert row["pairs_limit"] > 1
    assert row["peak_bytes"] > 0


def test_rows_and_the_committed_ones_follow_the_schema(cli: Callable[..., Any]) -> None:
    schema = json.loads((ROOT / "docs" / "schema" / "bench.schema.json").read_text())
    called = cli("bench", "attention", "--method", "pevlm:sink=2,block=2", "--format", "json", *SMALL)
    jsonschema.validate(json.loads(called.out), schema)
    for path in (ROOT / "results" / "cpu").glob("attention-*.json"):
        jsonschema.validate(json.loads(path.read_text()), schema)


def test_a_list_of_lengths_gives_a_row_each(cli: Callable[..., Any]) -> None:
    called = cli("bench", "attention", "--method", "pevlm", "--tokens", "200/300", *SMALL[2:], "--format", "json")
    rows = json.loads(called.out)["rows"]
    assert [row["tokens"] for row in rows] == [198, 298]  # whole frames of four tokens


def test_a_wrong_kernel_gets_no_ratio_and_exit_code_1(cli: Callable[..., Any], monkeypatch: Any) -> None:
    right = blocks.block_attention
    monkeypatch.setattr(blocks, "block_attention", lambda *args, **kwargs: right(*args, **kwargs) * 1.01)
    called = cli("bench", "attention", "--method", "pevlm:sink=2,block=2", "--check", *SMALL)
    assert called.code == 1
    assert called.out == ""
    assert "no ratio" in called.err


def test_the_check_sees_a_key_too_many(monkeypatch: Any) -> None:
    shape = bench.Shape(12, 4, 4, 2, 16)
    plan = bench.make_methods(["pevlm:sink=2,block=2"])[0].prepare(shape.prompt(), bench.Trace()).extras["block_plan"]
    q, k, v = (torch.randn(1, h, shape.tokens, 16) for h in (4, 2, 2))
    causal = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert bench._check(causal, q, k, v, None, seed=0)
    with pytest.raises(RunError, match="is wrong by"):
        bench._check(causal, q, k, v, plan, seed=0)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--method", "uniform"), "replaces no attention"),
        (("--method", "ape", "--check"), "weights of 1"),
        (("--method", "pevlm", "--frames", 0), "--frames must be at least 1"),
        (("--method", "pevlm", "--heads", 3), "multiple of --kv-heads"),
        (("--method", "pevlm", "--tokens", "10"), "--tokens must be numbers"),
        (("--method", "pevlm", "--shape", "qwen2.5-vl-8b"), "Did you mean 'qwen2.5-vl-7b'"),
        (("--method", "pevlm", "--dtype", "float8"), "--dtype must be one of"),
        (("--method", "pevlm", "--rounds", 0), "--rounds must be at least 1"),
        (("--method", "pevlm", "--batch", 2), "one prompt at a time"),
        (("--method", "pevlm", "--device", "cuda:9"), "not here"),
    ],
)
def test_what_cannot_be_timed_is_refused(cli: Callable[..., Any], options: Any, says: str) -> None:
    called = cli("bench", "attention", *options)
    assert called.code == 2
    assert says in called.err
