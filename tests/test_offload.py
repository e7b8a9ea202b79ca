"""Weights on the host: the same answers to the last bit, the bytes that were copied, and nothing left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vlmbench.errors import UsageError
from vlmbench.methods.corematching import Corematching
from vlmbench.methods.full import Full
from vlmbench.methods.int8 import Int8
from vlmbench.methods.offload import Offload
from vlmbench.patch import fingerprint

TOKENS = (5, 6, 7)


@torch.inference_mode()
def decoded(adapter: Any, method: Any, clips: list[Any]) -> tuple[torch.Tensor, Any]:
    """Logits of prefill and of a few forced tokens, and the trace."""
    with method.attach(adapter) as trace:
        trace.reset("sample")
        inputs = adapter.to_device(adapter.inputs(clips, "where is the red circle ?"))
        prompt = method.prepare(adapter.splice(inputs, adapter.encode_vision(inputs)), trace)
        cache = adapter.new_cache(len(TOKENS))
        logits = [adapter.prefill(prompt, cache)]
        for step, token in enumerate(TOKENS):
            logits.append(
                adapter.decode(torch.tensor([[token]], device=adapter.device), prompt.next_position + step, cache)
            )
    return torch.cat(logits), trace


def ffn_bytes(adapter: Any) -> int:
    """Of one layer."""
    return sum(each.nbytes for each in adapter.layers[0].mlp.parameters())


@pytest.mark.parametrize(
    "method",
    [Offload(), Offload(prefetch=False), Offload(resident=1), Offload(resident=2), Offload(prefetch=False, resident=3)],
    ids=repr,
)
def test_the_offloaded_dense_model_is_full_attention_to_the_last_bit(adapter: Any, clip: Any, method: Offload) -> None:
    full, _ = decoded(adapter, Full(), [clip(6)])
    before = fingerprint(adapter.model)
    places = [parameter.data_ptr() for parameter in adapter.model.parameters()]
    ours, trace = decoded(adapter, method, [clip(6)])
    assert torch.equal(ours, full)
    assert fingerprint(adapter.model) == before
    assert [parameter.data_ptr() for parameter in adapter.model.parameters()] == places
    one, layers = ffn_bytes(adapter), 4 - method.resident
    facts = trace.facts["offload"]
    assert facts["host_bytes"] == layers * one
    if layers <= 1 + method.prefetch:  # they stay in the buffers
        assert (facts["prefill_bytes"], facts["decode_bytes"]) == (layers * one, 0)
    else:  # prefetching is one layer ahead, and a token's first layer comes during the one before it
        ahead = one if method.prefetch else 0
        assert facts["prefill_bytes"] == layers * one + ahead
        assert facts["decode_bytes"] == len(TOKENS) * layers * one


def test_each_sample_pays_for_its_own_copies(adapter: Any, clip: Any) -> None:
    method = Offload()
    with torch.inference_mode(), method.attach(adapter) as trace:
        found = []
        for frames in (4, 6):
            inputs = adapter.inputs([clip(frames)], "where ?")
            adapter.prefill(adapter.splice(inputs, adapter.encode_vision(inputs)), adapter.new_cache(0))
            found.append(trace.facts["offload"]["prefill_bytes"])
    assert found == [5 * ffn_bytes(adapter)] * 2


@pytest.mark.parametrize("resident", [None, 1])
@pytest.mark.parametrize("options", [{}, {"part": "neurons", "neuron_layers": "1/3"}, {"spearman": True}], ids=repr)
def test_core_neurons_of_offloaded_weights_are_those_of_resident_ones(
    adapter: Any, clip: Any, options: dict[str, Any], resident: int | None
) -> None:
    plain, before = decoded(adapter, Corematching(**options), [clip(12)])
    mark = fingerprint(adapter.model)
    ours, trace = decoded(adapter, Corematching(**options, offload=True, resident=resident), [clip(12)])
    assert torch.equal(ours, plain)
    assert fingerprint(adapter.model) == mark
    assert trace.facts["core_neurons"] == before.facts["core_neurons"]
    one = ffn_bytes(adapter)
    first = 1 if "neuron_layers" in options else 0  # layers that decode with all neurons stay
    layers = 4 - max(first, resident or 0)
    assert trace.facts["offload"] == {
        "host_bytes": layers * one,
        "prefill_bytes": layers * one,
        "decode_bytes": 0,  # core neurons alone, and they were left there
    }
    assert trace.facts["core_neurons"]["copied_bytes"] < 0.5 * 4 * one


def test_text_alone_is_the_dense_model_from_copies(adapter: Any) -> None:
    full, _ = decoded(adapter, Full(), [])
    ours, trace = decoded(adapter, Corematching(offload=True), [])
    assert torch.equal(ours, full)
    assert not trace.applied
    assert trace.facts["offload"]["decode_bytes"] >= len(TOKENS) * 3 * ffn_bytes(adapter)


def test_a_fault_in_a_layer_leaves_its_weights_where_they_were(adapter: Any, clip: Any, monkeypatch: Any) -> None:
    decoded(adapter, Full(), [clip(4)])
    before = fingerprint(adapter.model)

    def broken(*_: Any) -> Any:
        raise KeyError("act")

    with monkeypatch.context() as patched:
        patched.setattr(type(adapter.layers[2].mlp.act_fn), "forward", broken)
        with pytest.raises(KeyError, match="act"):
            decoded(adapter, Offload(), [clip(4)])
    assert fingerprint(adapter.model) == before


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("method", "like"),
    [
        (Offload(), Full()),
        (Offload(prefetch=False), Full()),
        (Offload(resident=2), Full()),
        (Corematching(offload=True), Corematching()),
        (Int8(), Int8()),
    ],
    ids=repr,
)
def test_on_a_card_weights_leave_it_and_come_back(method: Any, like: Any, clip: Any) -> None:
    """Through pinned memory and a side stream: the same answers, and afterwards the same weights on the card."""
    from vlmbench.models.loading import load

    adapter = load("mini-llava-ov@random", dtype=torch.float32, device="cuda", attention="sdpa").adapter
    want, _ = decoded(adapter, like, [clip(6)])
    before = fingerprint(adapter.model)
    for _ in range(3):
        ours, _ = decoded(adapter, method, [clip(6)])
        assert torch.equal(ours, want)
    last = adapter.layers[3].mlp.gate_proj
    with method.attach(adapter):
        assert last.weight.device.type == "cpu"
        assert last.weight.is_pinned()
    assert last.weight.device.type == "cuda"
    assert fingerprint(adapter.model) == before


def test_more_layers_than_there_are_cannot_be_resident(adapter: Any) -> None:
    for method, says in (
        (Offload(resident=4), "offload:resident=4 leaves nothing on the host: the model has 4 layers"),
        (Corematching(offload=True, resident=4), "corematching:resident=4 leaves nothing on the host"),
    ):
        with pytest.raises(UsageError, match=says):
            method.check(adapter)
    # All layers that decode with core neurons are resident: nothing would be moved, and the row would not say so.
    with pytest.raises(UsageError, match=r"offload=on,neuron_layers=0/1,resident=2 leaves nothing .* resident below 2"):
        Corematching(offload=True, neuron_layers="0/1", resident=2).check(adapter)
    Corematching(offload=True, neuron_layers="0/1", resident=1).check(adapter)
    with pytest.raises(UsageError, match="offload:resident must be at least 0, not -1"):
        Offload(resident=-1)
