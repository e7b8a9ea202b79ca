"""Recorded decoding and towers: a replay does what the call would do, or the row says why nothing was recorded."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vlmbench import bench, bench_model, contest, graphs, recorded, registry, rounds
from vlmbench.graphs import NotRecordedError, Outside, Tape
from vlmbench.madeup import Shape, embedded
from vlmbench.methods.full import Full
from vlmbench.methods.memvp import Memvp
from vlmbench.models.base import ModelAdapter
from vlmbench.trace import Trace

STEPS = 5


@pytest.fixture(autouse=True)
def inference() -> Any:
    with torch.inference_mode():
        yield


@cache
def mini() -> Any:
    return bench_model._load(Shape(3, 4, 4, 2, 16, name="mini-qwen2.5-vl"), None, torch.device("cpu"), torch.float32, 0)


def filled(adapter: Any, method: Any, trace: Trace, seed: int = 0) -> recorded.Filled:
    trace.reset("sample")
    prompt = method.prepare(embedded(adapter, Shape(3, 4, 4, 2, 16), seed), trace)
    cache = adapter.new_cache(STEPS)
    token = adapter.prefill(prompt, cache).argmax(-1, keepdim=True)
    return recorded.Filled(cache, token, prompt.next_position)


def eager(adapter: Any, given: recorded.Filled) -> list[int]:
    cache, token, position = given
    ids = []
    for step in range(STEPS):
        token = adapter.decode(token, position + step, cache).argmax(-1, keepdim=True)
        ids.append(int(token))
    return ids


def replayed(decoding: recorded.Decoding) -> list[int]:
    ids = []
    for step in decoding.steps:
        step.replay()
        ids.append(int(decoding.filled.token))
    return ids


METHODS = [
    cls.examples()[0] for name in registry.methods.names() if (cls := registry.methods.load(name)).traits.uses_model
]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_replayed_decoding_is_eager_decoding(method: Any) -> None:
    """Of every method there is: nothing in a step of theirs waits for the host, nor changes from step to step unseen."""
    adapter = mini()
    with method.attach(adapter) as trace:
        right = eager(adapter, filled(adapter, method, trace))
        ours = recorded.decoding(adapter, Tape(), filled(adapter, method, trace), STEPS)
    for _ in range(2):  # a round starts where the one before did, whatever that left in the cache
        ours.restart()
        assert replayed(ours) == right


def test_replayed_decoding_is_eager_decoding_in_every_family(adapter: Any) -> None:
    right = eager(adapter, filled(adapter, Full(), Trace()))
    ours = recorded.decoding(adapter, Tape(), filled(adapter, Full(), Trace()), STEPS)
    ours.restart()
    assert replayed(ours) == right


def test_replays_read_the_cache_and_the_token_of_now(adapter: Any) -> None:
    """Nothing that a recording saw is frozen into it but lengths and positions."""
    method, trace = Full(), Trace()
    ours = recorded.decoding(adapter, Tape(), filled(adapter, method, trace, seed=0), STEPS)
    other = filled(adapter, method, trace, seed=1)
    for mine, theirs in zip(ours.filled.cache.layers, other.cache.layers, strict=True):
        mine._keys.copy_(theirs._keys)
        mine._values.copy_(theirs._values)
    ours.filled.token.copy_(other.token)
    right = eager(adapter, other)
    assert replayed(ours) == right


def test_no_mask_is_made_for_one_query(adapter: Any, monkeypatch: Any) -> None:
    given = filled(adapter, Full(), Trace())

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a mask was asked for")

    monkeypatch.setattr(f"{type(adapter.text).__module__}.create_causal_mask", refuse)
    recorded.decoding(adapter, Tape(), given, STEPS)


@pytest.mark.parametrize("method", [each for each in METHODS if "vision" in each.traits.stages or each.name == "full"])
def test_a_replayed_tower_follows_its_pixels(adapter: Any, clip: Callable[..., Any], method: Any) -> None:
    with method.attach(adapter) as trace:
        trace.reset("sample")
        inputs = adapter.inputs([clip(4, side=112)], "")
        ours = recorded.tower(adapter, Tape(), recorded.on_host(inputs))
        for _ in range(2):
            ours.inputs["pixel_values_videos"].mul_(0.5)
            ours.run()
            # The same operations on the same numbers.
            assert torch.equal(ours.recorded.result.video, adapter.encode_vision(inputs).video)


@pytest.mark.parametrize("method", [Full(), Memvp(artefact="untrained")], ids=lambda m: m.name)
@pytest.mark.parametrize("preset", ["mini-qwen2.5-vl", "mini-llava-1.5"])
def test_a_replayed_prefill_follows_its_prompt(preset: str, method: Any) -> None:
    """What a method makes of another prompt reaches the recording: embeddings, and what stands among the extras."""
    shape = Shape(3, 4, 4, 2, 16, name=preset)
    adapter = bench_model._load(shape, None, torch.device("cpu"), torch.float32, 0)

    def run(prompt: Any) -> Any:
        return adapter.prefill(prompt, adapter.new_cache(1))

    with method.attach(adapter) as trace:
        asked = [embedded(adapter, shape, 0)]
        ours = recorded.prefill(adapter, Tape(), lambda: method.prepare(asked[-1], trace), run)
        for seed in (1, 0):
            asked.append(embedded(adapter, shape, seed))
            ours.run()
            assert torch.allclose(ours.recorded.result, run(method.prepare(asked[-1], trace)), atol=1e-5)


def test_what_waits_for_the_host_cannot_be_recorded() -> None:
    x = torch.ones(3)
    for call in (
        lambda: float(x.sum()),
        lambda: x.nonzero(),
        lambda: torch.tensor([1, 2]),
        lambda: x[x > 0],
        lambda: bool(x.sum()),
    ):
        with pytest.raises(NotRecordedError, match="wait for each other"):
            Tape().record(call)


def test_a_replay_that_differs_is_refused(adapter: Any) -> None:
    class Forgetful(Tape):
        def record(self, call: Callable[[], Any]) -> graphs.Recorded:
            made = super().record(call)
            return made._replace(replay=lambda: made.result.mul_(1.02))

    with pytest.raises(NotRecordedError, match=r"a replay of step \d of decoding is off by"):
        recorded.decoding(adapter, Forgetful(), filled(adapter, Full(), Trace()), STEPS)


def test_what_a_recording_reads_is_held_and_what_it_makes_is_not() -> None:
    there, into = torch.ones(4), torch.zeros(4)
    with Outside() as outside:
        into.copy_((there[1:3] * 2).sum() + torch.zeros(4))
    storages = {each.untyped_storage().data_ptr() for each in outside.held.values()}
    assert storages == {each.untyped_storage().data_ptr() for each in (there, into)}


@pytest.mark.parametrize("memory", [True, False])
def test_a_failed_capture_names_its_first_cause_and_restores_the_stream(monkeypatch: Any, memory: bool) -> None:
    """Both the captured call and the capture's end fail, as they do on a card."""
    streams: list[str] = []

    @contextmanager
    def capture(graph: Any, **options: Any) -> Any:
        try:
            yield
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    for name, value in {
        "graph": capture,
        "graph_pool_handle": lambda: 0,
        "CUDAGraph": lambda: None,
        "current_stream": lambda: "before",
        "set_stream": streams.append,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(graphs.CudaGraphs, "failed", False)

    def call() -> None:
        raise (torch.OutOfMemoryError if memory else RuntimeError)("out of memory" if memory else "not permitted")

    with pytest.raises(torch.OutOfMemoryError if memory else NotRecordedError, match=r"out of mem|not permitted"):
        graphs.CudaGraphs().record(call)
    assert streams == ["before"]
    assert graphs.CudaGraphs.failed


SIZES: dict[str, Any] = {"device": "cpu", "dtype": None, "rounds": 2, "check": False, "steps": 3}
MINI = Shape(12, 4, 4, 2, 16, name="mini-qwen2.5-vl")


@pytest.mark.parametrize("op", ["decode", "vision"])
def test_recorded_rows_are_not_eager(op: str) -> None:
    row = bench.bench(op, "downsample:ratio=0.5", MINI, graphs=True, **SIZES)
    assert row["marks"] == ["cpu"]
    assert row["ratio"] > 0
    assert row["peak_bytes"] > 0
    assert row["note"] is None


def test_recorded_layers_are_brought_up_to_the_whole() -> None:
    row = bench.bench("decode", "uniform:ratio=0.25", MINI, graphs=True, layers=2, **SIZES)
    assert row["marks"] == ["cpu"]
    assert row["whole_method_s"] > 0


@pytest.mark.parametrize("who", ["method", "dense"])
def test_a_side_that_cannot_be_recorded_runs_eagerly_and_says_why(monkeypatch: Any, who: str) -> None:
    stock = ModelAdapter.decode

    def decode(self: Any, token: Any, position: int, cache: Any) -> Any:
        whole = cache.layers[0].physical >= 14 + 48 + 60
        if whole == (who == "dense"):
            int(token)  # what a method may do in a step, and a graph may not
        return stock(self, token, position, cache)

    monkeypatch.setattr(ModelAdapter, "decode", decode)
    row = bench.bench("decode", "uniform:ratio=0.25", MINI, graphs=True, **SIZES)
    assert row["marks"] == ["cpu", "eager"]
    assert f"{'dense attention' if who == 'dense' else 'uniform'} was not recorded" in row["note"]
    assert row["ratio"] > 0


@pytest.mark.parametrize("brief", [True, False])
def test_the_method_is_away_whenever_dense_runs_and_nobody_is_recorded_alone(brief: bool) -> None:
    """A recorded method stays attached: dense attention that runs as it is, or is recorded then, would be the method."""
    attached: list[bool] = [False]
    calls: list[str] = []

    @contextmanager
    def around() -> Any:
        attached[0] = True
        yield
        attached[0] = False

    def dense(_: Any) -> None:
        assert not attached[0]
        calls.append("dense")

    def make(whole: bool) -> Any:
        def recording(given: Any) -> Any:
            if given == "dense":
                assert not attached[0]
                if whole:
                    raise NotRecordedError("it waits")
            calls.append(f"recorded {given}")
            return SimpleNamespace(restart=lambda: None, run=lambda: None)

        return recording

    row: dict[str, Any] = {"method": "m", "marks": [], "note": None}
    contest.contest(
        row,
        {"k": rounds.Side("k", dense, lambda _: "dense")},
        rounds.Side("method", lambda _: calls.append("method"), lambda _: "method", around),
        2,
        rounds.Clock(torch.device("cpu")),
        make(whole=True),
        own_kernel=True,
        brief=make(whole=False) if brief else None,
    )
    assert row["marks"] == ["eager"]
    assert row["note"] == "dense attention was not recorded: it waits"
    assert "recorded method" not in calls
    assert calls.count("method") == 3  # one of warm-up
    assert row["ratio"] > 0


def test_a_long_decoding_ranks_kernels_by_its_first_steps(monkeypatch: Any) -> None:
    monkeypatch.setattr(bench_model, "RANKED_STEPS", 2)
    asked: list[int] = []
    stock = recorded.decoding

    def decoding(adapter: Any, recorder: Any, given: Any, steps: int) -> Any:
        asked.append(steps)
        return stock(adapter, recorder, given, steps)

    monkeypatch.setattr(bench_model, "decoding", decoding)
    row = bench.bench("decode", "uniform:ratio=0.25", MINI, graphs=True, **SIZES)
    assert asked == [2] * len(row["dense_kernels_s"]) + [3, 3]  # then the fastest, and the method, whole
    assert row["marks"] == ["cpu"]


def test_out_of_memory_while_recording_ends_the_methods_side_only(monkeypatch: Any) -> None:
    stock = recorded.decoding

    def decoding(adapter: Any, recorder: Any, given: Any, steps: int) -> Any:
        if given.cache.layers[0].physical < 14 + 48 + 60:
            torch.empty(1 << 62, dtype=torch.int8)
        return stock(adapter, recorder, given, steps)

    monkeypatch.setattr(bench_model, "decoding", decoding)
    row = bench.bench("decode", "uniform:ratio=0.25", MINI, graphs=True, **SIZES)
    assert row["marks"] == ["cpu", "oom"]
    assert row["dense_s"] > 0
    assert row["method_s"] is None


def test_alone_no_dense_attention_runs() -> None:
    row = bench.bench("prefill", "pevlm:sink=2,block=2", MINI, alone=True, **SIZES)
    assert row["method_s"] > 0
    assert row["peak_bytes"] > 0
    assert row["dense_s"] is row["ratio"] is row["dense_kernel"] is None
    assert row["marks"] == ["cpu"]
    assert row["note"] == "dense attention was not timed"
    json.dumps(row)


def test_a_batch_is_timed_and_counted() -> None:
    one, two = (
        bench.bench(op, "uniform:ratio=0.25", Shape(12, 4, 4, 2, 16, batch, "mini-qwen2.5-vl"), **SIZES)
        for op, batch in (("prefill", 1), ("prefill", 2))
    )
    assert two["dense_flops"] == 2 * one["dense_flops"]
    assert one["dense_bytes"] < two["dense_bytes"] < 2 * one["dense_bytes"]  # weights are read once
    videos = bench.bench("vision", "full", Shape(4, 4, 4, 2, 16, 2, "mini-qwen2.5-vl"), **SIZES)
    alone = bench.bench("vision", "full", Shape(4, 4, 4, 2, 16, 1, "mini-qwen2.5-vl"), **SIZES)
    assert videos["dense_flops"] == 2 * alone["dense_flops"]


# On a GPU, where recordings are CUDA graphs.


@pytest.mark.gpu
@pytest.mark.parametrize("preset", ["mini-qwen2.5-vl", "mini-qwen2-vl", "mini-llava-ov"])
@pytest.mark.parametrize(
    ("op", "method"), [("decode", "uniform:ratio=0.25"), ("decode", "ape:block=3"), ("vision", "full")]
)
def test_decoding_and_towers_are_recorded_on_cuda(op: str, method: str, preset: str) -> None:
    shape = Shape(12, 4, 4, 2, 16, name=preset)
    row = bench.bench(op, method, shape, **SIZES | {"device": "cuda", "dtype": "bfloat16"})
    assert "eager" not in row["marks"], row["note"]
    assert row["ratio"] > 0


@pytest.mark.gpu
def test_graphs_on_cuda_give_eager_tokens() -> None:
    """The same kernels on the same numbers; float32, so that no two logits tie."""
    from vlmbench.models.loading import load

    adapter = load("mini-qwen2.5-vl@random", dtype=torch.float32, device="cuda", attention="sdpa").adapter
    with Full().attach(adapter) as trace:
        right = eager(adapter, filled(adapter, Full(), trace))
        recorder = graphs.recorder(torch.device("cuda"))
        ours = recorded.decoding(adapter, recorder, filled(adapter, Full(), trace), STEPS)
    ours.restart()
    assert replayed(ours) == right


@pytest.mark.gpu
def test_what_cannot_be_captured_on_cuda_is_named() -> None:
    """In a process of its own, which is no good for random numbers afterwards."""
    program = (
        "import torch\nfrom vlmbench.graphs import CudaGraphs, NotRecordedError\nx = torch.ones(3, device='cuda')\n"
        "x.sum().item()\ntry:\n    CudaGraphs().record(lambda: x.sum().item())\n"
        "except NotRecordedError as error:\n    assert CudaGraphs.failed\n    print(error)\nassert int(x.sum()) == 3\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "no CUDA graph could be made of it" in done.stdout
