"""``bench decode --memory-gb``: a card too small for the weights, dense attention that streams them, and what is counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vlmbench import bench, bench_offload, cost
from vlmbench.errors import RunError, UsageError
from vlmbench.method import Method
from vlmbench.methods.corematching import Corematching
from vlmbench.models.loading import load
from vlmbench.patch import fingerprint
from vlmbench.recorded import Filled
from vlmbench.small_card import GB, SPARE, fits
from vlmbench.trace import Trace

SCHEMA = Path(__file__).resolve().parents[1] / "docs" / "schema" / "bench.schema.json"
CORE = Corematching(offload=True)
STEPS = 3


@pytest.fixture(scope="module")
def shape() -> Any:
    (found,) = bench.shapes(tokens=None, preset="mini-llava-1.5", frames=1, frame_tokens=16, text_tokens=20)
    return found


def rows(shape: Any, method: Method = CORE, **more: Any) -> dict[str, dict[str, Any]]:
    given: dict[str, Any] = {"memory_gb": 12, "rounds": 2, "steps": STEPS, "resident": 1, "graphs": True}
    return bench_offload.rows(method, shape, torch.device("cpu"), torch.float32, **(given | more))


def adapter_of() -> Any:
    return load("mini-llava-1.5@random", dtype=torch.float32, device="cpu", attention="sdpa").adapter


def ffn_bytes(adapter: Any) -> int:
    """Of one layer."""
    return sum(each.nbytes for each in adapter.layers[0].mlp.parameters())


def test_there_is_a_row_against_each_way_to_offload_and_the_prompts_copies_count(shape: Any) -> None:
    import jsonschema  # not on every machine with a card

    found = rows(shape)
    assert list(found) == ["offload/prefetched", "offload/plain"]  # what the workload is named by comes last
    one = ffn_bytes(adapter_of()) / GB
    for name, row in found.items():
        assert list(row) == list(bench.COLUMNS)
        jsonschema.validate({"schema": 1, "rows": [row]}, json.loads(SCHEMA.read_text()))
        assert row["dense_kernel"] == f"{name}, 1 of 4 layers resident"
        assert set(row["dense_kernels_s"]) == set(found)
        assert len(row["dense_rounds_s"]) == len(row["method_rounds_s"]) == 2
        assert row["marks"] == ["cpu"]  # recorded
        # Prefill is in the seconds and not in the tokens a second.
        assert row["dense_s"] > STEPS / row["dense_tokens_per_s"]
        assert row["method_s"] > STEPS / row["method_tokens_per_s"]
        ahead = 1 if "prefetched" in name else 0
        assert f"dense copies {(3 + ahead) * one:.3g} GB a prompt and {3 * one:.3g} GB a token" in row["note"]
        assert f"corematching {4 * one:.3g} GB a prompt" in row["note"]
    assert "eager" in rows(shape, graphs=False)["offload/plain"]["marks"]


class Bench(bench_offload._Bench):
    """With the logits of its last decoding."""

    logits: list[Tensor]

    def decode(self, filled: Filled, steps: int) -> None:
        cache, token, position = filled
        self.logits = [self.adapter.decode(token, position + step, cache) for step in range(steps)]


@torch.inference_mode()
def test_both_ways_answer_as_the_model_on_the_card_does_and_leave_it_as_it_was(shape: Any) -> None:
    adapter = adapter_of()
    side = Bench(adapter, CORE, shape, 12 * GB, STEPS, 0)
    side.decode(side.fill(Trace()), STEPS)
    right, before = side.logits, fingerprint(adapter.model)
    side.keep(2)
    for prefetch in (False, True):
        with side.dense(prefetch) as trace:
            side.decode(side.fill(trace), STEPS)
        assert all(map(torch.equal, side.logits, right))
        assert trace.facts["offload"]["host_bytes"] == 2 * ffn_bytes(adapter)
    assert fingerprint(adapter.model) == before


def test_a_replay_goes_on_after_the_method_has_left(shape: Any) -> None:
    """Its rounds are taken between those of the dense sides, which the method's hooks would be in the way of."""
    with torch.inference_mode():
        side = bench_offload._Bench(adapter_of(), CORE, shape, 12 * GB, STEPS, 0)
        replays, timed = side.recorded(graphs=True)
        assert replays is not None
        assert timed.copied["decode_bytes"] == 0
        assert not side.adapter.layers[0].mlp._forward_pre_hooks
        last = []
        for _ in range(2):
            replays.restart()
            replays.run()
            last.append(replays.steps[-1].result.clone())
        assert torch.equal(*last)


def test_what_fits_is_the_rest_of_the_card_in_whole_layers() -> None:
    adapter, tokens = adapter_of(), 40
    one = ffn_bytes(adapter)
    weights = sum(each.nbytes for each in (*adapter.model.parameters(), *adapter.model.buffers()))
    rest = weights - 4 * one + 2 * one + cost.kv_bytes(tokens, adapter.shapes, 4) + SPARE
    assert [fits(adapter, rest + extra, tokens) for extra in (-1, 0, one - 1, one, 3 * one)] == [-1, 0, 0, 1, 3]


def test_a_layer_less_stays_where_the_limit_refuses(shape: Any, monkeypatch: Any) -> None:
    """On a card the allocator says so; here whoever keeps more than one layer is refused."""
    with torch.inference_mode():
        side = bench_offload._Bench(adapter_of(), CORE, shape, 12 * GB, STEPS, 0)
        stock = bench_offload.on_card

        @contextmanager
        def small(mlps: Any, device: Any) -> Any:
            if len(mlps) > 1:
                raise torch.OutOfMemoryError("no")
            with stock(mlps, device):
                yield

        monkeypatch.setattr(bench_offload, "on_card", small)
        side.keep(None)
        assert side.resident == 3  # at most all but one
        found = side.timed(1, graphs=True)
        assert side.resident == 1
        assert found["offload/plain"].copied["host_bytes"] == 3 * ffn_bytes(side.adapter)


def test_a_side_out_of_memory_ends_its_rows_and_no_other(shape: Any, monkeypatch: Any) -> None:
    def none(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(bench_offload._Bench, "recorded", none)
    for row in rows(shape).values():
        assert row["marks"] == ["cpu", "oom"]
        assert row["ratio"] is None


def test_what_cannot_be_timed_is_refused(shape: Any, cli: Callable[..., Any]) -> None:
    with pytest.raises(UsageError, match="leaves nothing on the host"):
        rows(shape, Corematching())
    with pytest.raises(RunError, match=r"0\.001 GB do not hold the dense model"):
        rows(shape, memory_gb=0.001, resident=None)
    options = ("--method", "corematching:offload=on", "--shape", "mini-llava-1.5", "--memory-gb")
    assert "--memory-gb must be above 0" in cli("bench", "decode", *options, 0).err
    assert "is for the whole model in bench decode" in cli("bench", "prefill", *options, 12).err
    assert "is for the whole model in bench decode" in cli("bench", "decode", *options, 12, "--layers", 2).err


def test_the_command_prints_both_rows(cli: Callable[..., Any]) -> None:
    import jsonschema

    options = ("--frames", 1, "--frame-tokens", 16, "--text-tokens", 20, "--steps", 2, "--rounds", 1)
    given = ("--method", "corematching:offload=on", "--shape", "mini-llava-1.5", "--memory-gb", 12)
    called = cli("bench", "decode", *given, *options, "--format", "json")
    assert called.code == 0, called.err
    data = json.loads(called.out)
    jsonschema.validate(data, json.loads(SCHEMA.read_text()))
    assert ["3 of 4 layers" in row["dense_kernel"] for row in data["rows"]] == [True, True]
    for row in data["rows"]:  # a rehearsal on a CPU says so, and that this model needs no offload
        assert "no card: nothing was limited" in row["note"]
        assert "every layer fits there" in row["note"]


@pytest.mark.gpu
def test_on_a_card_each_side_stays_within_the_limit_and_the_method_is_replayed(shape: Any) -> None:
    """Weights in pinned memory, an allocator that refuses more, graphs that go on when the method has left."""
    device, limit = torch.device("cuda"), 2 * SPARE
    given: dict[str, Any] = {"memory_gb": limit / GB, "rounds": 2, "steps": STEPS, "resident": 1}
    found = bench_offload.rows(CORE, shape, device, torch.float32, **given)
    for row in found.values():
        assert row["marks"] == [], row["note"]
        assert 0 < row["peak_bytes"] <= limit
        assert 0 < row["dense_peak_bytes"] <= limit
        assert row["ratio"] > 0
    held = torch.empty(2 * limit, dtype=torch.uint8, device=device)  # the limit is gone
    assert held.nbytes == 2 * limit
