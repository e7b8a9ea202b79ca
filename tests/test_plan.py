"""``vlmbench plan``: what it says without running is what a run counts and measures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vlmbench import chunked, cost, counted
from vlmbench.backend import Identity
from vlmbench.bench import bench
from vlmbench.bench_gpu_workloads import WORKLOADS
from vlmbench.cards import CARDS
from vlmbench.engine import TorchBackend
from vlmbench.madeup import Shape, bare
from vlmbench.method import one_token
from vlmbench.methods.full import Full
from vlmbench.methods.pevlm import Pevlm
from vlmbench.methods.uniform import Uniform
from vlmbench.plan import COLUMNS, _empty, bytes_of, config_of, made_up_inputs, plan, stages
from vlmbench.session import make_methods
from vlmbench.suite import Sample
from vlmbench.trace import Trace

SCHEMA = Path(__file__).resolve().parents[1] / "docs" / "schema" / "plan.schema.json"
QUESTION = "where is the red circle ?"
SAMPLE = Sample("s", "c", (), QUESTION, "topleft", "where ?")
NEW_TOKENS = 5
SMALL = ("--model", "mini-qwen2.5-vl", "--frames", 12, "--frame-tokens", 4, "--device", "h200")


@pytest.mark.parametrize("method", [Full(), Uniform(ratio=0.5), Pevlm(sink=1, block=1)], ids=lambda m: m.name)
def test_a_plan_is_what_a_run_counts_and_measures(adapter: Any, clip: Callable[..., Any], method: Any) -> None:
    backend = TorchBackend(adapter, Identity("mini", None, "", "float32", "cpu", "cpu", "sdpa", "sdpa", "sdpa"))
    frames = clip(6, side=112)
    with backend.attach(method):
        ask = (method, SAMPLE, QUESTION, [frames])
        work = backend.answer(*ask, pass_="accuracy", max_new_tokens=NEW_TOKENS).work
        memory = backend.answer(*ask, pass_="memory", max_new_tokens=NEW_TOKENS).memory
    assert work is not None
    assert memory is not None
    with torch.inference_mode():
        inputs = adapter.inputs([frames], QUESTION)
        layout = adapter.splice(inputs, adapter.encode_vision(inputs)).layout
    without = counted.model_without_storage(adapter.config, adapter.dtype)
    planned = {row["stage"]: row for row in stages(without, method, layout, inputs, CARDS["h200"], NEW_TOKENS)}
    assert planned["prefill"]["flops"] == work["flops"]
    assert planned["prefill"]["kv_bytes"] == memory.kv_bytes
    # A tenth: the method's own temporaries and the rounding of allocators are not in a plan, nor is
    # preprocessing, which on a GPU machine is on the host.
    for stage in ("vision", "prefill", "decode"):
        assert planned[stage]["peak_bytes"] == pytest.approx(memory.stages[stage], rel=0.1), stage


def test_the_towers_flops_are_what_torch_counts_on_real_tensors(adapter: Any, clip: Callable[..., Any]) -> None:
    with torch.inference_mode(), adapter.attention("eager"), FlopCounterMode(display=False) as counter:
        inputs = adapter.inputs([clip(6, side=84)], QUESTION)
        adapter.encode_vision(inputs)
    assert counted.vision_cost(adapter, inputs).flops == counter.get_total_flops()


def test_rows_follow_the_schema_and_drops_show(cli: Callable[..., Any]) -> None:
    rows = {}
    for method in ("full", "uniform:ratio=0.25", "blind", "downsample:ratio=0.5", "pevlm:sink=2,block=2"):
        called = cli("plan", *SMALL, "--method", method, "--format", "json")
        assert called.code == 0, called.err
        data = json.loads(called.out)
        jsonschema.validate(data, json.loads(SCHEMA.read_text()))
        assert [list(row) for row in data["rows"]] == [list(COLUMNS)] * 3
        rows[method.partition(":")[0]] = {row["stage"]: row for row in data["rows"]}
    full = rows.pop("full")
    assert all(each["prefill"]["flops"] < full["prefill"]["flops"] for each in rows.values())
    assert rows["uniform"]["prefill"]["tokens"] == 14 + 12 + 60
    assert rows["uniform"]["vision"]["flops"] == full["vision"]["flops"]
    assert rows["downsample"]["vision"]["flops"] * 2 == full["vision"]["flops"]
    assert rows["blind"]["vision"]["flops"] == 0
    assert rows["pevlm"]["prefill"]["kv_bytes"] == full["prefill"]["kv_bytes"]


@pytest.mark.parametrize(
    ("op", "method", "frames", "frame_tokens"),
    [
        ("prefill", "full", 64, 16),
        ("prefill", "uniform:ratio=0.25", 64, 16),
        ("prefill", "pevlm:sink=2,block=2", 64, 16),
        ("vision", "downsample:ratio=0.5", 16, 16),
        ("decode", "full", 64, 16),
        # The copied weights of core neurons are in both: a fifth of it all.
        ("decode", "corematching:beta=0.9", 12, 4),
    ],
)
def test_the_peak_of_a_bench_row_is_the_planned_one(op: str, method: str, frames: int, frame_tokens: int) -> None:
    shape = Shape(frames, frame_tokens, 4, 2, 16, name="mini-qwen2.5-vl")
    row = bench(op, method, shape, device="cpu", dtype=None, rounds=1, check=False, steps=NEW_TOKENS)
    (one,) = make_methods([method])
    rows = plan("mini-qwen2.5-vl@random", one, shape, "h200", torch.float32, NEW_TOKENS)
    assert row["peak_bytes"] == pytest.approx({each["stage"]: each for each in rows}[op]["peak_bytes"], rel=0.1)


def test_a_decoding_step_reads_core_neurons_alone(cli: Callable[..., Any]) -> None:
    rows, given = {}, "corematching:beta=0.25"
    for method in ("full", given, "corematching:mode=release", f"{given},part=tokens", f"uniform:ratio=0.25+{given}"):
        called = cli("plan", *SMALL, "--method", method, "--format", "json")
        rows[method] = {row["stage"]: row for row in json.loads(called.out)["rows"]}
    full, core, release, tokens, joined = rows.values()
    # Of 4 layers' 3 × 64 × 128 weights of the FFN in bfloat16, three quarters; which tokens stay is not known before.
    assert full["decode"]["bytes"] - core["decode"]["bytes"] == 4 * 3 * 64 * 96 * 2
    assert full["decode"]["flops"] - core["decode"]["flops"] == 4 * 3 * 64 * 96 * 2
    assert core["decode"]["peak_bytes"] - full["decode"]["peak_bytes"] == 4 * 3 * 64 * 32 * 2
    # Joined with a method that leaves 12 of 48 visual tokens: keys and values of 2 heads of 16 in 4 layers less.
    assert core["decode"]["bytes"] - joined["decode"]["bytes"] == 36 * 4 * 2 * 2 * 16 * 2
    assert release["decode"]["bytes"] == tokens["decode"]["bytes"] == full["decode"]["bytes"]


@pytest.mark.parametrize(("shape", "method"), [("llava-1.5-7b", "turbo:r=21"), ("llava-ov-7b", "turbo:r=22")])
def test_the_fixed_workloads_of_turbo_take_1_65_times_fewer_flops(shape: str, method: str) -> None:
    """The tower and its projector, of frames of any number."""
    named = [each for each in WORKLOADS if each.op == "vision" and each.method == method]
    assert [dict(each.options)["shape"] for each in named] == [shape]
    adapter = counted.model_without_storage(config_of(f"{shape}@random:layers=1"), torch.bfloat16)
    inputs = made_up_inputs(adapter, Shape(1, 1, 1, 1, 1))
    dense = counted.vision(adapter, inputs).cost.flops
    with make_methods([method])[0].attach(adapter):
        own = counted.vision(adapter, inputs).cost.flops
    assert dense / own == pytest.approx(1.65, abs=0.02)


def test_the_bounds_of_the_fixed_workloads_on_a_7b_llama() -> None:
    """gpu-core reads 1.65 times fewer bytes a step, gpu-memvp computes five times less: 64 tokens of 320, and the memory."""
    workloads = {each.name: each for each in WORKLOADS}
    shapes = counted.model_without_storage(config_of("llava-1.5-7b@random"), torch.bfloat16).shapes
    core, memory = (workloads[name].split()[0] for name in ("gpu-core", "gpu-memvp"))
    assert (core.tokens, memory.tokens, memory.batch) == (576 + 64, 256 + 64, 8)
    (method,) = make_methods([workloads["gpu-core"].method])
    read = method.decode_work(core.prompt(), shapes, Trace(), 0, 2)
    assert read is not None
    dense = cost.decode(one_token(core.tokens + 1, shapes), shapes, 2)
    assert dense.bytes / cost.decode(read, shapes, 2).bytes == pytest.approx(1.65, abs=0.03)
    (method,) = make_methods([workloads["gpu-memvp"].method])
    left = method.prepare(memory.prompt(), Trace())
    assert left.length == 64
    whole, own = (each.work(prompt, shapes, Trace()) for each, prompt in ((Full(), memory.prompt()), (method, left)))
    ratio = cost.prefill(whole, shapes, 2, 8).flops / cost.prefill(own, shapes, 2, 8).flops
    assert ratio == pytest.approx(4.96, abs=0.02)


def test_float32_is_held_against_its_own_rate(cli: Callable[..., Any]) -> None:
    seconds = {}
    for dtype in ("float32", "float16"):
        called = cli(
            "plan", "--model", "qwen2.5-vl-7b@random:layers=2", "--device", "h200", "--dtype", dtype, "--format", "json"
        )
        (row,) = (row for row in json.loads(called.out)["rows"] if row["stage"] == "prefill")
        assert row["bound"] == "matrix"
        seconds[dtype] = row["roofline_s"]
    assert seconds["float32"] / seconds["float16"] == pytest.approx(989.4 / 67)


def test_a_million_tokens_fit_one_card_and_do_not_without_pieces(monkeypatch: Any) -> None:
    """Qwen2.5-VL-7B's prefill. Every layer's temporaries are alike, so two layers and the others' keys and weights do."""
    adapter = counted.model_without_storage(config_of("qwen2.5-vl-7b@random:layers=2"), torch.bfloat16)
    whole = counted.model_without_storage(config_of("qwen2.5-vl-7b@random"), torch.bfloat16)
    shape = Shape(3890, 257, 28, 4, 128)
    layout = shape.layout()
    assert layout.length >= 999_000
    more = bytes_of(*counted.weights(whole)) - bytes_of(*counted.weights(adapter))
    more += cost.kv_bytes(layout.length, whole.shapes, 2) * 26 // 28
    prompt = _empty(adapter, bare(layout))
    assert counted.prefill_peak(adapter, prompt, 1)[0] + more < CARDS["h200"].memory_bytes
    monkeypatch.setattr(chunked, "LONG", 10**9)
    assert counted.prefill_peak(adapter, prompt, 1)[0] + more > 1.3 * CARDS["h200"].memory_bytes


def test_it_says_whether_it_fits(cli: Callable[..., Any]) -> None:
    long = ("plan", "--model", "qwen2.5-vl-7b@random", "--tokens", "100000")
    assert "It does not fit" in cli(*long, "--device", "4090").out
    assert "It fits" in cli("plan", *SMALL).out


def test_a_method_is_named_with_its_parameters_and_what_it_did_to_the_frames_is_not_forgotten(
    cli: Callable[..., Any],
) -> None:
    said = cli("plan", *SMALL, "--method", "downsample:ratio=0.5+pevlm:sink=1,block=2").out
    assert ", downsample:ratio=0.5,axis=frames+pevlm:sink=1,block=2," in said
    for method in ("downsample:ratio=0.5", "downsample:ratio=0.5+pevlm:sink=1,block=2"):
        rows = json.loads(cli("plan", *SMALL, "--method", method, "--format", "json").out)["rows"]
        assert [row["note"] for row in rows] == [None] * 3, method
    assert (
        "nothing to do here: the ratio keeps all frames" in cli("plan", *SMALL, "--method", "downsample:ratio=1.0").out
    )


def test_it_warns_of_positions_that_the_model_does_not_have(cli: Callable[..., Any]) -> None:
    """LLaVA-1.5 has 4,096: seven pictures of 576 and 64 of text. Dropping keeps places; under M-RoPE a frame is one step."""
    llava = ("plan", "--model", "llava-1.5-7b@random:layers=1", "--device", "h200", "--text-tokens", "64")
    most = ("--frames", "7", "--max-new-tokens", "1")
    assert "Too long" not in cli(*llava, *most).out  # 4,032 visual and 64 of text: all there are
    assert "needs 4,097 positions, its configuration has 4,096" in cli(*llava, *most[:-1], "2").out
    assert "needs 8,128 positions" in cli(*llava, "--frames", "14", *most[2:], "--method", "uniform:ratio=0.1").out
    (row, *_) = json.loads(cli("plan", *SMALL, "--max-new-tokens", "3", "--format", "json").out)["rows"]
    assert (row["tokens"], row["positions"]) == (14 + 12 * 4 + 60, 14 + 12 + 60 + 2)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--device", "h201"), "known are h200, h100, a100-80g, a100-40g, l40s, 4090. Did you mean 'h200'?"),
        (("--method", "prior"), "never calls the model"),
        (("--method", "downsample:axis=pixels"), "changes the size of frames"),
        (("--model", "qwen2.5-vl-8b"), "No model is called"),
        (("--model", "qwen2.5-vl-8b@random"), "Did you mean 'qwen2.5-vl-7b'"),
        (("--tokens", "12"), "--tokens must be numbers"),
        (("--max-new-tokens", 0), "--max-new-tokens must be at least 1"),
        (("--dtype", "float8"), "--dtype must be one of"),
    ],
)
def test_what_cannot_be_planned_is_refused(cli: Callable[..., Any], options: Any, says: str) -> None:
    called = cli("plan", *SMALL, *options)
    assert called.code == 2
    assert says in called.err
    assert called.err.count("\n") == 1
