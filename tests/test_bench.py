"""``vlmbench bench``: rows as the contract names them, a check that can fail, and no ratio when it does."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from vlmbench import bench, bench_attention, ceiling, dense, header, plan, rounds
from vlmbench.bench_attention import _check
from vlmbench.bench_row import new_row
from vlmbench.errors import RunError
from vlmbench.kernels import block_attention
from vlmbench.kernels.block_attention import blocks, tiles
from vlmbench.methods.pevlm import Pevlm
from vlmbench.publish import bench_rows, bench_table
from vlmbench.trace import Trace

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


def test_every_column_is_explained() -> None:
    text = (ROOT / "docs" / "how-we-time.md").read_text()
    rows, planned = text[text.index("## `bench`") :].split("## `plan`")
    assert [name for name in bench.COLUMNS if f"`{name}`" not in rows] == []
    assert [name for name in plan.COLUMNS if f"`{name}`" not in planned] == []


def test_a_row_of_any_operation_and_age_becomes_a_line() -> None:
    """Decoding is held against the bytes that it reads, and a row from before a column existed leaves its cell empty."""
    shape = bench.Shape(12, 4, 4, 2, 16)
    timed = {"ratio": 1.5, "dense_s": 3.0, "method_s": 2.0, "pairs_limit": 6.0, "flops_limit": 3.0, "bytes_limit": 2.0}
    shares = {"attention": "0.25", "prefill": "0.50", "decode": "0.75", "vision": "0.50"}
    for op, share in shares.items():
        row = new_row(op, Pevlm(), shape, torch.device("cpu"), torch.float32) | timed
        line = bench_table([("a-workload", row)]).splitlines()[4]
        assert line.startswith(f"| a-workload | {op} | `pevlm:")
        assert line.split(" | ")[10] == share
    del row["flops_limit"], row["bytes_limit"], row["bytes_share"]
    assert bench_table([("old", row)]).splitlines()[4].split(" | ")[9:11] == ["—", "—"]


def test_a_list_of_lengths_gives_a_row_each(cli: Callable[..., Any]) -> None:
    called = cli("bench", "attention", "--method", "pevlm", "--tokens", "200/300", *SMALL[2:], "--format", "json")
    rows = json.loads(called.out)["rows"]
    assert [row["tokens"] for row in rows] == [198, 298]  # whole frames of four tokens


def test_several_methods_give_a_row_each(cli: Callable[..., Any]) -> None:
    """Head types of MMInference and their mix, each alone on what is planted for it, out of one command."""
    patterns = ("grid", "vs", "a_shape", "mix")
    methods = [each for name in patterns for each in ("--method", f"mminference:pattern={name}")]
    planted = ("--heads", 5, "--kv-heads", 1, "--head-dim", 32, "--frames", 6, "--frame-tokens", 16, "--rounds", 1)
    called = cli("bench", "attention", *methods, *planted, "--check", "--format", "json")
    rows = json.loads(called.out)["rows"]
    assert [row["params"]["pattern"] for row in rows] == list(patterns)
    assert all(row["check"].startswith("170 rows within") for row in rows)
    limits = {row["params"]["pattern"]: row["pairs_limit"] for row in rows}
    *alone, mixed = limits.values()
    assert min(alone) < mixed < max(alone)


def test_text_tokens_are_as_many_as_asked_for(cli: Callable[..., Any]) -> None:
    options = ("--method", "pevlm:sink=2,block=2", *SMALL, "--rounds", 1, "--format", "json", "--text-tokens")
    for text in (1, 9, 64):
        assert json.loads(cli("bench", "attention", *options, text).out)["rows"][0]["tokens"] == 12 * 4 + text
    assert "--text-tokens must be at least 1" in cli("bench", "attention", *options, 0).err


def test_kernels_are_ranked_on_a_shorter_prompt_where_each_would_take_minutes(
    cli: Callable[..., Any], monkeypatch: Any
) -> None:
    monkeypatch.setattr(dense, "RANKED", 64)
    monkeypatch.setattr(dense, "_RANKS", {})
    monkeypatch.setattr(bench_attention, "RANKED", 64)
    lengths: list[int] = []
    stock = dense.causal_sdpa

    def noted(q: Any, k: Any, v: Any) -> Any:
        lengths.append(q.shape[2])
        return stock(q, k, v)

    monkeypatch.setattr(dense, "causal_sdpa", noted)
    called = cli("bench", "attention", "--method", "pevlm:sink=2,block=2", "--format", "json", *SMALL)
    (row,) = json.loads(called.out)["rows"]
    assert row["dense_kernel"] in row["dense_kernels_s"]
    assert "ranked at 64 tokens" in row["note"]
    assert lengths.count(row["tokens"]) == 7  # one of warm-up and six rounds
    assert set(lengths) == {64, row["tokens"]}


def test_rivals_and_notes_stand_below_the_table() -> None:
    row = new_row("attention", Pevlm(), bench.Shape(12, 4, 4, 2, 16), torch.device("cpu"), torch.float32)
    row |= {"method_kernels_s": {"own": 0.25, "flex": 0.125}, "note": "something to know"}
    text = bench_table([("a-workload", row), ("plain", row | {"method_kernels_s": None, "note": None})])
    assert "- a-workload: own 0.25 s, flex 0.125 s" in text
    assert "- a-workload: something to know" in text
    assert text.count("- plain") == 0


def test_tensors_of_one_shape_are_ranked_once_and_each_row_says_what_was_found(
    cli: Callable[..., Any], monkeypatch: Any
) -> None:
    monkeypatch.setattr(dense, "_RANKS", {})
    ranked: list[int] = []
    stock = dense.fastest

    def noted(*args: Any) -> Any:
        ranked.append(1)
        return stock(*args)

    monkeypatch.setattr(dense, "fastest", noted)
    methods = ("--method", "pevlm:sink=2,block=2", "--method", "pevlm:sink=4,block=2")
    called = cli("bench", "attention", *methods, *SMALL, "--format", "json")
    first, second = json.loads(called.out)["rows"]
    assert len(ranked) == 1
    assert first["dense_kernels_s"] == second["dense_kernels_s"] != {}
    assert first["dense_rounds_s"] != second["dense_rounds_s"]
    cli("bench", "attention", *methods[:2], *SMALL, "--frames", 13)
    assert len(ranked) == 2


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_rivals_are_timed_in_turns_and_a_wrong_one_has_no_time(cli: Callable[..., Any], monkeypatch: Any) -> None:
    from vlmbench import mm_flex

    planted = ("--heads", 5, "--kv-heads", 1, "--head-dim", 32, "--frames", 6, "--frame-tokens", 16, "--rounds", 2)
    options = ("--method", "mminference:pattern=a_shape", *planted, "--check", "--rivals", "--format", "json")
    (row,) = json.loads(cli("bench", "attention", *options).out)["rows"]
    assert set(row["method_kernels_s"]) == {"own", "flex"}
    assert row["method_refused"] == {}
    right = mm_flex.attention
    monkeypatch.setattr(mm_flex, "attention", lambda *args, **more: right(*args, **more) * 1.01)
    (row,) = json.loads(cli("bench", "attention", *options).out)["rows"]
    assert set(row["method_kernels_s"]) == {"own"}
    assert "is wrong by" in row["method_refused"]["flex"]
    assert row["ratio"] > 0
    said = bench.to_text([row])
    assert f"each way: own {row['method_kernels_s']['own']:.4g} s" in said
    assert "without a time: flex (" in said


@pytest.mark.parametrize("error", [ValueError, TypeError, AttributeError])  # the last two: another torch's signature
def test_turns_give_every_side_as_many_rounds_and_name_those_that_do_not_run(error: type[Exception]) -> None:
    called: list[str] = []

    def side(name: str) -> rounds.Side:
        def call(_: Any) -> None:
            called.append(name)
            if name == "c":
                raise error("not here")

        return rounds.Side(name, call)

    seconds, refused = rounds.turns({name: side(name) for name in "abc"}, 3, rounds.Clock(torch.device("cpu")))
    assert {name: len(each) for name, each in seconds.items()} == {"a": 3, "b": 3}
    assert refused == {"c": "not here"}
    assert called == ["a", "b", "c", "b", "a", "a", "b", "b", "a"]


def test_rows_stand_behind_the_commit_and_the_machine(cli: Callable[..., Any], tmp_path: Path) -> None:
    called = cli("bench", "attention", "--method", "pevlm:sink=2,block=2", "--format", "json", *SMALL)
    data = json.loads(called.out)
    assert list(data) == ["schema", "commit", "dirty", "versions", "machine", "rows"]
    assert torch.__version__.startswith(
        data["versions"]["torch"]
    )  # what the package is called leaves the CUDA version out
    (tmp_path / "attention.json").write_text(json.dumps(data | {"commit": "1" * 40, "dirty": True}))
    (_, row), *_ = rows = bench_rows(tmp_path)
    assert row["source"].endswith(f"commit {'1' * 12}-dirty")
    assert f"cores of {header.cpu_name()}" in bench_table(rows).splitlines()[0]
    (tmp_path / "old.json").write_text(json.dumps({"schema": 1, "rows": data["rows"]}))
    said = bench_table(bench_rows(tmp_path)).splitlines()[0]
    assert "-dirty (attention); commit and versions not noted (old)." in said


def test_a_wrong_kernel_gets_no_ratio_and_exit_code_1(cli: Callable[..., Any], monkeypatch: Any) -> None:
    right = blocks.block_attention
    monkeypatch.setattr(blocks, "block_attention", lambda *args, **kwargs: right(*args, **kwargs) * 1.01)
    called = cli("bench", "attention", "--method", "pevlm:sink=2,block=2", "--check", *SMALL)
    assert called.code == 1
    assert called.out == ""
    assert "no ratio" in called.err


@pytest.mark.parametrize("op", [("attention",), ("prefill", "--shape", "mini-qwen2.5-vl")], ids=lambda op: op[0])
def test_every_round_makes_the_kernels_tables_anew_and_every_layer_shares_them(
    cli: Callable[..., Any], monkeypatch: Any, op: Any
) -> None:
    right, tables = blocks.block_attention, []

    def tiled(q: Any, k: Any, v: Any, plan: Any, **options: Any) -> Any:
        tables.append(tiles.query_tiles(plan, 64, 2, q.device))
        return right(q, k, v, plan, **options)

    monkeypatch.setattr(blocks, "block_attention", tiled)
    assert cli("bench", *op, "--method", "pevlm:sink=2,block=2", *SMALL).code == 0
    layers = 1 if op[0] == "attention" else 4
    rounds = [{id(each) for each in tables[i : i + layers]} for i in range(0, len(tables) - layers, layers)]
    assert len(rounds) >= 7  # one of warm-up and six
    assert all(len(one) == 1 for one in rounds)
    assert len(set().union(*rounds)) == len(rounds)


def test_what_is_slow_only_once_is_not_in_index_s(cli: Callable[..., Any], monkeypatch: Any) -> None:
    prepare = Pevlm.prepare
    called: list[int] = []

    def first_slow(self: Any, *args: Any) -> Any:
        if not called:
            time.sleep(1)  # as an import would take
        called.append(1)
        return prepare(self, *args)

    monkeypatch.setattr(Pevlm, "prepare", first_slow)
    done = cli("bench", "attention", "--method", "pevlm:sink=2,block=2", "--format", "json", *SMALL)
    assert json.loads(done.out)["rows"][0]["index_s"] < 1


def test_a_masked_path_that_shows_only_at_the_launch_is_marked(cli: Callable[..., Any], monkeypatch: Any) -> None:
    right = block_attention.attend
    monkeypatch.setattr(block_attention, "attend", lambda *a, **o: right(*a, **o)._replace(masked=True))
    for op in (("attention",), ("prefill", "--shape", "mini-qwen2.5-vl")):
        done = cli("bench", *op, "--method", "pevlm:sink=2,block=2", "--format", "json", *SMALL)
        assert json.loads(done.out)["rows"][0]["marks"] == ["cpu", "masked"]


def test_no_memory_for_the_devices_rates_leaves_what_was_timed(cli: Callable[..., Any], monkeypatch: Any) -> None:
    monkeypatch.setattr(ceiling, "measure", lambda *args: torch.empty(1 << 62, dtype=torch.int8))
    done = cli("bench", "attention", "--method", "pevlm:sink=2,block=2", "--format", "json", *SMALL)
    (row,) = json.loads(done.out)["rows"]
    assert row["marks"] == ["cpu"]
    assert row["ratio"] > 0
    assert row["flops_limit"] > 1
    assert row["flops_share"] is row["device_flops"] is None
    assert "no memory was left to measure the device's rates" in row["note"]
    jsonschema.validate(json.loads(done.out), json.loads((ROOT / "docs" / "schema" / "bench.schema.json").read_text()))


def test_the_check_sees_a_key_too_many(monkeypatch: Any) -> None:
    shape = bench.Shape(12, 4, 4, 2, 16)
    plan = bench.make_methods(["pevlm:sink=2,block=2"])[0].prepare(shape.prompt(), Trace()).extras["block_plan"]
    q, k, v = (torch.randn(1, h, shape.tokens, 16) for h in (4, 2, 2))
    causal = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert _check(causal, q, k, v, None, seed=0)
    with pytest.raises(RunError, match="is wrong by"):
        _check(causal, q, k, v, plan, seed=0)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--method", "uniform"), "replaces no attention"),
        (("--method", "uniform+pevlm"), "bench prefill takes them joined"),
        (("--method", "ape", "--check"), "weights of 1"),
        (("--method", "pevlm", "--frames", 0), "--frames must be at least 1"),
        (("--method", "pevlm", "--heads", 3), "multiple of --kv-heads"),
        (("--method", "pevlm", "--tokens", "10"), "--tokens must be numbers"),
        (("--method", "pevlm", "--shape", "qwen2.5-vl-8b"), "Did you mean 'qwen2.5-vl-7b'"),
        (("--method", "pevlm", "--shape", "nonesuch"), "(known: qwen2.5-vl-7b, "),
        (("--method", "pevlm", "--dtype", "float8"), "--dtype must be one of"),
        (("--method", "pevlm", "--rounds", 0), "--rounds must be at least 1"),
        (("--method", "pevlm", "--memory-gb", 12), "in bench decode"),
        (("--method", "pevlm", "--batch", 2), "one prompt at a time"),
        (("--method", "pevlm", "--device", "cuda:9"), "not here"),
    ],
)
def test_what_cannot_be_timed_is_refused(cli: Callable[..., Any], options: Any, says: str) -> None:
    called = cli("bench", "attention", *options)
    assert called.code == 2
    assert says in called.err
