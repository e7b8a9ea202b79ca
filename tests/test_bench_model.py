"""``vlmbench bench prefill|decode|vision``: whole stages through the adapter and method code of a run."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import jsonschema
import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from vlmbench import bench, bench_model, bench_row, bench_sides, madeup, rounds
from vlmbench.dense import Flex, causal_mask, causal_sdpa
from vlmbench.errors import UsageError
from vlmbench.method import Citation, Method, Traits
from vlmbench.methods.uniform import Uniform
from vlmbench.models.base import ModelAdapter
from vlmbench.patch import Patcher
from vlmbench.trace import Trace

SCHEMA = Path(__file__).resolve().parents[1] / "docs" / "schema" / "bench.schema.json"
SHAPE = madeup.Shape(3, 4, 4, 2, 16, name="mini-qwen2.5-vl")
SMALL = ("--shape", "mini-qwen2.5-vl", "--frames", 12, "--frame-tokens", 4, "--rounds", 2, "--format", "json")


def row_of(cli: Callable[..., Any], *args: Any) -> dict[str, Any]:
    called = cli("bench", *args)
    assert called.code == 0, called.err
    data = json.loads(called.out)
    jsonschema.validate(data, json.loads(SCHEMA.read_text()))
    (row,) = data["rows"]
    assert list(row) == list(bench.COLUMNS)
    return dict(row)


@pytest.mark.parametrize(
    ("op", "method"),
    [
        ("prefill", "pevlm:sink=2,block=2"),
        ("prefill", "downsample:ratio=0.5"),
        ("decode", "uniform:ratio=0.25"),
        ("decode", "ape:block=3"),
        ("decode", "corematching:beta=0.25"),
        ("vision", "downsample:ratio=0.5"),
        ("vision", "full"),
    ],
)
def test_rows_are_whole_and_name_the_best_dense_kernel(cli: Callable[..., Any], op: str, method: str) -> None:
    row = row_of(cli, op, "--method", method, *SMALL, "--steps", 3)
    assert row["dense_kernel"] == min(row["dense_kernels_s"], key=row["dense_kernels_s"].get)
    assert len(row["dense_rounds_s"]) == len(row["method_rounds_s"]) == 2
    assert (row["layers"], row["model_layers"], row["per_layer"]) == (4, 4, False)
    assert row["whole_dense_s"] is None
    assert row["marks"] == (["cpu"] if op == "prefill" else ["cpu", "eager"])
    assert row["peak_bytes"] > 0
    assert row["device_flops"] > 0
    # No share is negative, and none can pass one by more than an unsteady clock.
    assert row["dense_flops_share"] > 0
    assert row["flops_limit"] >= 1
    assert row["bytes_limit"] >= 1
    if op == "decode":
        assert row["method_tokens_per_s"] == pytest.approx(3 / row["method_s"])


def test_a_long_prefill_runs_under_the_kernel_that_attention_alone_is_fastest_with(
    cli: Callable[..., Any], monkeypatch: Any
) -> None:
    monkeypatch.setattr(bench_sides, "RANKED", 64)
    slow = rounds.Side("sdpa/math", lambda _: None)
    monkeypatch.setattr(bench_sides, "ranked", lambda q, k, v, clock: ([slow], {}, {}))
    row = row_of(cli, "prefill", "--method", "pevlm:sink=2,block=2", *SMALL)
    assert list(row["dense_kernels_s"]) == ["sdpa/math"]
    short = row_of(cli, "decode", "--method", "uniform:ratio=0.25", *SMALL, "--steps", 1)
    assert len(short["dense_kernels_s"]) == 2


def test_fewer_layers_are_marked_and_brought_up_to_the_whole(cli: Callable[..., Any]) -> None:
    row = row_of(cli, "prefill", "--method", "pevlm:sink=2,block=2", *SMALL, "--layers", 2)
    assert (row["layers"], row["model_layers"], row["per_layer"]) == (2, 4, True)
    assert row["whole_dense_s"] > 0
    assert row["whole_method_s"] > 0


def test_decoding_with_core_neurons_reads_their_weights_alone(cli: Callable[..., Any]) -> None:
    """By hand, for the miniature's 4 layers of 64 channels, 4 and 2 heads of 16, 128 neurons and 300 words in float32."""
    row = row_of(cli, "decode", "--method", "corematching:beta=0.25,part=neurons", *SMALL, "--steps", 3)
    tokens = 12 * 4 + 74

    def step(neurons: int, keys: int) -> int:
        layer = 64 * 16 * (4 + 2 + 2 + 4) + 3 * 64 * neurons + 2 * 2 * 16 * keys
        return 4 * (4 * layer + 64 * 300)

    assert row["dense_bytes"] == sum(step(128, tokens + i + 1) for i in range(3))
    assert row["method_bytes"] == sum(step(32, tokens + i + 1) for i in range(3))
    assert row["bytes_limit"] == row["dense_bytes"] / row["method_bytes"]
    fewer = row_of(cli, "decode", "--method", "corematching:beta=0.25", *SMALL, "--steps", 3)
    assert fewer["method_bytes"] < row["method_bytes"]  # keys of the tokens that left are not read


def test_decoding_with_a_memory_reads_it_once_a_token_and_no_visual_keys(cli: Callable[..., Any]) -> None:
    """320 keys and 320 values of 64 channels, shared by the layers; of 74 tokens of text two only frame the video."""
    row = row_of(cli, "decode", "--method", "memvp:artefact=untrained", *SMALL, "--steps", 2)
    layer = 64 * 16 * (4 + 2 + 2 + 4) + 3 * 64 * 128
    keys = [2 * 2 * 16 * (72 + i + 1) for i in range(2)]
    assert row["method_bytes"] == sum(4 * (4 * (layer + each) + 64 * 300) + 2 * 320 * 64 * 4 for each in keys)
    assert row["bytes_limit"] == row["dense_bytes"] / row["method_bytes"]


def test_every_prompt_of_a_batch_has_a_memory_of_its_own(cli: Callable[..., Any], monkeypatch: Any) -> None:
    from vlmbench.memvp_memory import VisualMemory

    made: list[int] = []
    stock = VisualMemory.forward

    def counted(self: Any, samples: Any) -> Any:
        made.append(len(samples))
        return stock(self, samples)

    monkeypatch.setattr(VisualMemory, "forward", counted)
    row = row_of(cli, "prefill", "--method", "memvp:artefact=untrained", *SMALL, "--batch", 3, "--text-tokens", 20)
    assert set(made) == {3}
    assert row["flops_limit"] > 1


def test_flops_are_those_of_the_layers_that_ran(cli: Callable[..., Any]) -> None:
    """What is outside the layers is timed without any, which must not pass for what the method did."""
    row = row_of(cli, "prefill", "--method", "corematching:select_layer=1", *SMALL, "--layers", 2)
    assert row["whole_method_s"] > 0
    assert row["method_flops"] < row["dense_flops"]


def test_the_rest_counts_once_and_the_layers_as_often_as_there_are() -> None:
    row = {"layers": 2, "model_layers": 28, "dense_s": 3.0, "method_s": None}
    bench_sides.Sides.add_whole(None, row, dense_rest=1.0, own_rest=1.0)  # type: ignore[arg-type]
    assert row == {"layers": 2, "model_layers": 28, "dense_s": 3.0, "method_s": None, "whole_dense_s": 1 + 2 * 14}


def test_planning_counts_once_however_many_layers_there_are(cli: Callable[..., Any], monkeypatch: Any) -> None:
    """On a clock that counts a layer as a second, and planning as ten."""
    passed, prefill, prepare = [0.0], ModelAdapter.prefill, Uniform.prepare

    class Counted:
        def __init__(self, device: Any) -> None:
            pass

        def __call__(self, call: Callable[[], Any]) -> float:
            begin = passed[0]
            call()
            return passed[0] - begin

    def count(seconds: Callable[[Any], int], stock: Any) -> Any:
        def counted(self: Any, *args: Any) -> Any:
            passed[0] += seconds(self)
            return stock(self, *args)

        return counted

    monkeypatch.setattr(bench_sides, "Clock", Counted)
    monkeypatch.setattr(ModelAdapter, "prefill", count(lambda adapter: len(adapter.text.layers), prefill))
    monkeypatch.setattr(Uniform, "prepare", count(lambda method: 10, prepare))
    row = row_of(cli, "prefill", "--method", "uniform:ratio=0.25", *SMALL, "--layers", 2)
    assert (row["dense_s"], row["method_s"], row["index_s"]) == (2, 12, 10)
    assert (row["whole_dense_s"], row["whole_method_s"]) == (4, 14)


def test_llava_has_its_own_tokens_a_frame(cli: Callable[..., Any]) -> None:
    row = row_of(cli, "vision", "--method", "full", *SMALL, "--shape", "mini-llava-ov", "--frames", 3)
    assert row["frame_tokens"] == 4
    assert row["tokens"] == 14 + 3 * 4 + 60


@dataclass(frozen=True)
class _Undeclared(Method):
    """A method that names no stages, and leaves out the tower's last MLP."""

    name: ClassVar[str] = "undeclared"
    cite: ClassVar[Citation] = Citation("a test")
    traits: ClassVar[Traits] = Traits()

    reads_data: bool = False

    def install(self, patch: Patcher, trace: Trace) -> None:
        def forward(x: torch.Tensor) -> torch.Tensor:
            return x * float(x.sum()) if self.reads_data else x

        mlp: Any = patch.adapter.vision_blocks[-1].mlp
        patch.forward(mlp, forward)


@pytest.mark.parametrize("reads_data", [False, True])
def test_vision_costs_are_those_under_the_method_whatever_stages_it_names(reads_data: bool) -> None:
    shape = madeup.Shape(2, 4, 4, 2, 16, name="mini-qwen2.5-vl")
    row = bench_model.row("vision", _Undeclared(reads_data), shape, *_cpu(), 2, None, 1, 0)
    assert row["method_s"] > 0
    if reads_data:  # its time is kept, its FLOPs are not made up
        assert row["method_flops"] is None
        assert "its FLOPs could not be counted on a tower without data" in row["note"]
    else:
        assert row["method_flops"] < row["dense_flops"]


def test_a_prompt_without_layers_comes_back_whole() -> None:
    adapter = bench_model._load(madeup.Shape(2, 4, 4, 2, 16, name="mini-llava-ov"), 2, *_cpu(), 0)
    prompt = madeup.embedded(adapter, madeup.Shape(2, 4, 4, 2, 16))
    with torch.inference_mode():
        before = adapter.prefill(prompt, adapter.new_cache(1))
        with bench_sides.without_layers(adapter):
            assert not len(adapter.layers)
        assert torch.equal(adapter.prefill(prompt, adapter.new_cache(1)), before)
    assert "new_cache" not in vars(adapter)


@pytest.mark.parametrize("who", ["dense", "method"])
def test_out_of_memory_ends_its_own_side_only(cli: Callable[..., Any], monkeypatch: Any, who: str) -> None:
    stock = ModelAdapter.prefill

    def prefill(self: Any, prompt: Any, cache: Any) -> Any:
        dropped = prompt.length < 14 + 48 + 60
        if dropped == (who == "method"):
            torch.empty(1 << 62, dtype=torch.int8)
        return stock(self, prompt, cache)

    monkeypatch.setattr(ModelAdapter, "prefill", prefill)
    row = row_of(cli, "prefill", "--method", "uniform:ratio=0.25", *SMALL)
    other = "method" if who == "dense" else "dense"
    assert row["marks"] == ["cpu", "oom"]
    assert "ran out of memory" in row["note"]
    assert row["ratio"] is None
    assert row[f"{who}_s"] is None
    assert row[f"{other}_s"] > 0


def test_a_model_too_large_is_a_row_with_a_mark(cli: Callable[..., Any], monkeypatch: Any) -> None:
    monkeypatch.setattr(bench_model, "_load", lambda *args: torch.empty(1 << 62, dtype=torch.int8))
    row = row_of(cli, "prefill", "--method", "uniform:ratio=0.25", *SMALL)
    assert row["marks"] == ["cpu", "oom"]
    assert row["dense_s"] is row["method_s"] is None


def test_rounds_turn_and_keep_their_order() -> None:
    called: list[str] = []
    dense, own = (rounds.Side(name, partial(_note, called, name)) for name in ("dense", "method"))
    found = rounds.race(dense, own, 3, rounds.Clock(torch.device("cpu")))
    assert called == ["dense", "method", "method", "dense"] * 2
    assert len(found.dense_s) == len(found.method_s) == len(found.ratios) == 3


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_kernel_that_stops_at_the_whole_length_gives_way_to_the_next() -> None:
    def too_long(_: Any) -> None:
        raise RuntimeError("no plan for so many numbers")

    clock = rounds.Clock(torch.device("cpu"))
    first, second, own = (rounds.Side(name, call) for name, call in (("a", too_long), ("b", str), ("method", str)))
    found = rounds.race(first, own, 3, clock, [second])
    assert found.dense is second
    assert found.refused == {"a": "no plan for so many numbers"}
    assert len(found.dense_s) == len(found.method_s) == len(found.ratios) == 3
    with pytest.raises(RuntimeError, match="no plan"):  # there is no other; a method has none
        rounds.race(first, own, 3, clock)
    best, seconds, refused = rounds.fastest({each.name: each for each in (first, second, own)}, clock, in_order=True)
    assert best is second
    assert (list(seconds), list(refused)) == (["b"], ["a"])


def test_every_row_starts_without_the_model_of_the_one_before(monkeypatch: Any) -> None:
    """Adapters lie in cycles of references: on a card they would count in the next row's peak until they are collected."""
    alive: list[Any] = []
    stock = bench_model._load

    def load(*args: Any) -> Any:
        assert not any(each() for each in alive)
        adapter = stock(*args)
        alive.append(weakref.ref(adapter.model))
        return adapter

    monkeypatch.setattr(bench_model, "_load", load)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    gc.disable()
    try:
        for _ in range(2):
            bench.bench("prefill", "full", SHAPE, device="cpu", dtype=None, rounds=1, check=False, alone=True)
    finally:
        gc.enable()
    assert len(alive) == 2


def test_on_a_card_every_row_compiles_anew(monkeypatch: Any) -> None:
    """Torch compiles one function for eight shapes in a process, and then runs it as written."""
    reset: list[str] = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: reset.append("reset"))
    monkeypatch.setattr(bench_model, "row", lambda *args: {})
    for name in ("cpu", "cuda"):
        monkeypatch.setattr(bench, "pick_device", lambda _, name=name: torch.device(name))
        monkeypatch.setattr(bench, "pick_dtype", lambda *_: torch.float32)
        bench.bench("prefill", "full", SHAPE, device=None, dtype=None, rounds=1, check=False)
        assert len(reset) == (name == "cuda")


def test_flex_attention_is_causal_attention() -> None:
    q, k, v = (torch.randn(1, heads, 130, 16) for heads in (4, 2, 2))
    # float32 sums in another order
    assert torch.allclose(Flex(compiled=False)(q, k, v), causal_sdpa(q, k, v), atol=1e-5)


@pytest.mark.parametrize("n", [1, 128, 130, 512, 600])
def test_the_tables_of_causal_flex_attention_are_torchs_own(n: int) -> None:
    """Whose maker is not called: compiled, as a long prompt needs it, it may take minutes."""
    ours = causal_mask(n, torch.device("cpu"))
    theirs = create_block_mask(ours.mask_mod, None, None, n, n, device="cpu")
    assert ours.seq_lengths == theirs.seq_lengths == (n, n)
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    full = n // 128  # torch asks the rule in all tiles of a last row that is cut
    for name in ("kv_num_blocks", "full_kv_num_blocks"):
        assert torch.equal(getattr(ours, name)[..., :full], getattr(theirs, name)[..., :full])


def test_frames_are_as_square_as_their_number_allows() -> None:
    shapes = [madeup.Shape(1, n, 1, 1, 1).grid for n in (256, 257, 196, 60)]
    assert shapes == [(16, 16), (1, 257), (14, 14), (6, 10)]


def test_a_mask_too_large_is_refused_in_a_sentence(monkeypatch: Any) -> None:
    shape = madeup.Shape(256, 257, 28, 4, 128)
    row = bench_row.new_row("attention", Uniform(), shape, *_cpu())
    with pytest.raises(UsageError, match="triton installed"):
        bench_row.mark_masked(row, Trace(facts={"masked": True}), torch.device("cuda"))


@pytest.mark.parametrize(
    ("op", "options", "says"),
    [
        ("prefill", ("--method", "prior"), "never calls the model"),
        ("decode", ("--method", "pevlm"), "pevlm changes nothing in decode"),
        ("vision", ("--method", "pevlm"), "it acts in: prefill"),
        ("vision", ("--method", "blind"), "encodes no frame"),
        ("vision", ("--method", "full", "--frame-tokens", 257), "1 × 257"),
        ("prefill", ("--method", "downsample:axis=pixels"), "changes the size of frames"),
        ("prefill", ("--method", "pevlm", "--layers", 5), "from 1 to mini-qwen2.5-vl's 4"),
        ("decode", ("--method", "full", "--steps", 0), "--steps must be at least 1"),
        ("decode", ("--method", "full", "--batch", 2), "one prompt at a time"),
        ("prefill", ("--method", "pevlm", "--batch", 2), "one prompt at a time"),
        ("prefill", ("--method", "full", "--check"), "use bench attention"),
        ("prefill", ("--method", "full", "--device", "cuda:9"), "not here"),
    ],
)
def test_what_cannot_be_timed_is_refused(cli: Callable[..., Any], op: str, options: Any, says: str) -> None:
    called = cli("bench", op, *SMALL, *options)
    assert called.code == 2
    assert says in called.err
    assert called.err.count("\n") == 1


def test_a_stage_needs_a_model(cli: Callable[..., Any]) -> None:
    assert "name its --shape" in cli("bench", "prefill", "--method", "full").err


def _note(into: list[str], name: str, given: Any) -> None:
    into.append(name)


def _cpu() -> tuple[torch.device, torch.dtype]:
    return torch.device("cpu"), torch.float32
