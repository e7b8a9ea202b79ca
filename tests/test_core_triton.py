"""Core neurons on a GPU: an FFN read by index, what its kernel refuses, and true shapes on CUDA.

The kernels themselves are run by `interpreted_core_neurons.py` under Triton's interpreter, in a process of its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.on_triton import run_interpreted, run_without_triton
from vlmbench.errors import UsageError
from vlmbench.graphs import recorder
from vlmbench.kernels.block_attention import SlowPath
from vlmbench.kernels.core_neurons import (
    GatheredFFN,
    compact,
    core_counts,
    core_set,
    count,
    fused,
    gathered,
    n_core,
    padded,
    reference,
)
from vlmbench.kernels.int8_linear import quantise
from vlmbench.method import Method
from vlmbench.methods.corematching import Corematching
from vlmbench.session import make_methods
from vlmbench.spec import params_of
from vlmbench.trace import Trace

TOKENS = (5, 9, 2)
GATHERED = Corematching(ffn="gathered")


def check_ffn(found: Tensor, x: Tensor, ffn: GatheredFFN) -> None:
    """Against float64, within what float32 can do and one rounding at the end.

    With u = 2⁻²⁴, a product of C numbers is off by at most e = (C + 1) u Σ|w||x|. SiLU is nowhere steeper than 1.1, and takes
    four roundings and an exponential of two more, the product another: an inner number i = s v is off by d = 1.1 e_g |v| +
    |s| e_v + 8 u |i|. Of K of them the output is off by Σ|w| d + (K + 1) u Σ|w||i|, and by its own rounding, a whole unit of
    the last place where it is cut off. The second order is below a tenth.
    """
    u, k = 2**-24, len(ffn.neurons)
    wide = x.double().reshape(-1, x.shape[-1])
    gate, up = (each[ffn.neurons].double() for each in (ffn.gate, ffn.up))
    down = ffn.down[:, :k].double()
    g, v = wide @ gate.T, wide @ up.T
    e_g, e_v = ((x.shape[-1] + 1) * u * wide.abs() @ each.abs().T for each in (gate, up))
    s = functional.silu(g)
    d = 1.1 * e_g * v.abs() + s.abs() * e_v + 8 * u * (s * v).abs()
    right = (s * v) @ down.T
    bound = (d + (k + 1) * u * (s * v).abs()) @ down.abs().T + torch.finfo(x.dtype).eps * right.abs()
    assert found.shape == x.shape
    difference = (found.double().reshape(wide.shape) - right).abs()
    assert (difference <= 1.1 * bound + torch.finfo(x.dtype).tiny).all()


def spliced(adapter: Any, clip: Any) -> Any:
    with torch.inference_mode():
        inputs = adapter.to_device(adapter.inputs([clip], "where is the red circle ?"))
        return adapter.splice(inputs, adapter.encode_vision(inputs))


@torch.inference_mode()
def decoded(adapter: Any, method: Method, prompt: Any) -> tuple[Tensor, Trace]:
    """Logits of prefill and of three given tokens."""
    with method.attach(adapter) as trace:
        prompt = method.prepare(prompt, trace)
        cache = adapter.new_cache(len(TOKENS))
        logits = [adapter.prefill(prompt, cache)]
        for step, token in enumerate(TOKENS):
            given = torch.tensor([[token]], device=adapter.device)
            logits.append(adapter.decode(given, prompt.next_position + step, cache))
    return torch.cat(logits), trace


def test_the_kernels_under_the_interpreter() -> None:
    run_interpreted("interpreted_core_neurons.py")


def test_importing_needs_no_triton() -> None:
    run_without_triton("from vlmbench.kernels.core_neurons import fused, gathered")


# The FFN by torch alone.


class Weights(NamedTuple):
    gate: Tensor
    up: Tensor
    down: Tensor


@pytest.fixture
def weights() -> Weights:
    generator = torch.Generator().manual_seed(0)
    sizes = ((40, 8), (40, 8), (8, 40))
    gate, up, down = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
    return Weights(gate, up, down)


@pytest.mark.parametrize("k", [1, 16, 23, 40])
def test_the_plain_gathered_ffn_is_the_masked_one_and_copies_down_alone(weights: Weights, k: int) -> None:
    chosen = torch.randperm(40, generator=torch.Generator().manual_seed(1))[:k]
    x = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    ffn = gathered(*weights, chosen)
    torch.testing.assert_close(ffn.plain(x, functional.silu), compact(*weights, chosen)(x, functional.silu))
    right = reference.sparse_ffn(x, *weights, chosen, functional.silu)
    torch.testing.assert_close(ffn.plain(x, functional.silu), right)
    assert ffn.gate.data_ptr() == weights.gate.data_ptr()
    assert ffn.up.data_ptr() == weights.up.data_ptr()
    assert ffn.down.shape == (8, padded(k))
    assert torch.equal(ffn.down[:, :k], weights.down[:, chosen])
    assert not ffn.down[:, k:].any()
    assert ffn.bytes == 8 * padded(k) * 8 + 4 * k


def test_neurons_that_are_not_there_and_int8_are_refused(weights: Weights) -> None:
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        gathered(*weights, torch.tensor([3, 40]))
    with pytest.raises(ValueError, match="these weights are int8"):
        gathered(quantise(weights.gate), quantise(weights.up), quantise(weights.down), torch.tensor([3]))


def test_what_the_kernels_cannot_take_is_a_sentence_with_the_value(weights: Weights, monkeypatch: Any) -> None:
    ffn = gathered(weights.gate.float(), weights.up.float(), weights.down.float(), torch.arange(9))
    x = torch.randn(2, 8)
    values = torch.randn(4, 40)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for call in (lambda: fused.ffn(x, *ffn, functional.silu), lambda: fused.core_counts(values, 0.2)):
        with pytest.raises(fused.Refused, match=r"cannot run: (it needs a GPU|triton is not installed)\."):
            call()
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # past the question of the device; nothing is launched here
    monkeypatch.setattr(fused, "no_kernel", lambda device: None)
    for call, says in (
        (lambda: fused.ffn(x.double(), *ffn, functional.silu), "are float64, float32, float32, float32, and it takes"),
        (lambda: fused.ffn(x, *ffn, functional.relu), "knows SiLU alone, not relu"),
        (lambda: fused.ffn(x, *ffn, torch.nn.GELU()), "knows SiLU alone, not GELU"),
        (lambda: fused.ffn(torch.randn(3, 3, 8), *ffn, functional.silu), "at most 8 rows of x, not 9"),
        (
            lambda: fused.ffn(x, ffn.gate.T.contiguous().T, *ffn[1:], functional.silu),
            "weights do not lie side by side",
        ),
        (lambda: fused.ffn(x.requires_grad_(), *ffn, functional.silu), "a gradient is asked for"),
        (lambda: fused.core_counts(values.double(), 0.2), "activations are float64"),
        (lambda: fused.core_counts(torch.zeros(1, 2**15 + 1), 0.2), "32769 neurons, and it takes at most 32768"),
        (lambda: fused.core_counts(values.T, 0.2), "activations do not lie side by side"),
    ):
        with pytest.raises(fused.Refused, match=says):
            call()


def test_a_table_says_how_many_are_wanted() -> None:
    """A float of Triton's has 24 bits: 0.2 in them, times 11 005, is above 2 201."""
    for rho in (0.07, 0.2, 0.29, 1.0):
        table = fused._wanted(12_000, rho, torch.device("cpu"))
        assert table.dtype == torch.int32
        assert torch.equal(table.long(), count.wanted(torch.arange(12_001), rho))
    assert fused._wanted(12_000, 0.2, torch.device("cpu"))[11_005] == 2201


# In the models.


def test_it_decodes_as_from_compact_weights_and_says_that_it_is_slow(adapter: Any, clip: Any) -> None:
    prompt = spliced(adapter, clip(12))
    right, trace = decoded(adapter, Corematching(), prompt)
    with pytest.warns(SlowPath, match=r"gathered reference stands in, which copies gate and up for every token"):
        ours, own = decoded(adapter, GATHERED, prompt)
    # The same sums, of padded rows: float32 rounding of a four-layer model at values of a few units.
    torch.testing.assert_close(ours, right, rtol=0, atol=1e-5)
    shapes, facts = adapter.shapes, own.facts["core_neurons"]
    assert facts["layers"] == trace.facts["core_neurons"]["layers"]
    n = n_core(0.4, shapes.intermediate)
    assert facts["copied_bytes"] == shapes.layers * (shapes.hidden * padded(n) * 4 + 4 * n)
    works = [each.decode_work(prompt, shapes, own, 0, 4) for each in (Corematching(), GATHERED)]
    assert works[1].own_bytes == facts["copied_bytes"]
    assert works[1].own_read == shapes.layers * (shapes.hidden * (padded(n) - n) * 4 + 4 * n)
    assert works[0].own_bytes == trace.facts["core_neurons"]["copied_bytes"]
    assert (works[0].pairs, works[0].neurons) == (works[1].pairs, works[1].neurons)


def test_joined_with_pevlm_it_is_what_compact_weights_are(adapter: Any, clip: Any) -> None:
    prompt = spliced(adapter, clip(6))
    ours, right = (
        decoded(adapter, make_methods([f"pevlm:sink=0,block=1+corematching{ffn}"])[0], prompt)[0]
        for ffn in (":ffn=gathered", "")
    )
    torch.testing.assert_close(ours, right, rtol=0, atol=1e-5)


def test_strict_accepts_no_plain_path(cli: Callable[..., Any], tmp_path: Path) -> None:
    asked = ("--model", "mini-llava-ov@random", "--suite", "synthvideo:length=32", "--mode", "accuracy", "--limit", 1)
    run = ("run", *asked, "--no-baseline", "--method", "corematching:ffn=gathered", "--frames", 4, "--out", tmp_path)
    assert cli(*run, "--strict").code == 1
    with pytest.warns(SlowPath):
        assert cli(*run).code == 0


def test_the_default_by_its_name_is_the_default() -> None:
    assert params_of(Corematching(ffn="compact")) == params_of(Corematching())
    assert params_of(GATHERED)["ffn"] == "gathered"


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("corematching:ffn=sparse", "corematching:ffn must be one of compact, gathered, not 'sparse'."),
        (
            "corematching:ffn=gathered,offload=on",
            "corematching:ffn=gathered reads gate and up in the model's own weights,",
        ),
        (
            "corematching:ffn=gathered,part=tokens",
            "corematching:ffn=gathered is how decoding reads core neurons, and part=",
        ),
        (
            "corematching:ffn=gathered,mode=release",
            "corematching:ffn=gathered is how decoding reads core neurons, and part=",
        ),
        (
            "corematching:ffn=gathered+int8",
            "corematching+int8: corematching as given needs the weights of the language model",
        ),
        ("offload+corematching:ffn=gathered", "offload+corematching: corematching as given needs the weights"),
    ],
)
def test_what_cannot_read_the_weights_in_place_is_refused_in_a_sentence(spec: str, says: str) -> None:
    with pytest.raises(UsageError) as refused:
        make_methods([spec])
    assert str(refused.value).startswith(says)
    assert str(refused.value).count(". ") == 0


# On a card.

SHAPES = {"llava-1.5-7b": (4096, 11_008), "qwen2.5-vl-7b": (3584, 18_944), "llava-ov-0.5b": (896, 4864)}


def on_card(*size: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(sum(size))
    return (torch.randn(*size, generator=generator, device="cuda") * scale).to(dtype)


def of_shape(name: str, batch: int, dtype: torch.dtype) -> tuple[Tensor, GatheredFFN]:
    width, neurons = SHAPES[name]
    chosen = torch.randperm(neurons, device="cuda")[: n_core(0.4, neurons)].sort().values
    gate, up = (on_card(neurons, width + i, dtype=dtype, scale=0.02)[:, :width] for i in (0, 16))
    return on_card(batch, width, dtype=dtype), gathered(gate, up, on_card(width, neurons, dtype=dtype), chosen)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("name", SHAPES)
def test_true_shapes_on_cuda(name: str, batch: int, dtype: torch.dtype) -> None:
    x, ffn = of_shape(name, batch, dtype)
    check_ffn(fused.ffn(x, *ffn, functional.silu, tile=fused.Tile(4, 512)), x, ffn)


@pytest.mark.gpu
@pytest.mark.parametrize("number", range(7))
def test_every_tiling_on_cuda_writes_every_output(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlmbench.kernels.core_neurons import fused_kernel

    assert len(fused_kernel.TILES) == 7
    config, empty = fused_kernel.TILES[number], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(float("nan")))
    tile = fused.Tile(config.kwargs["BR"], config.kwargs["BC"], config.num_warps)
    for batch in (1, 8):
        x, ffn = of_shape("llava-1.5-7b", batch, torch.bfloat16)
        check_ffn(fused.ffn(x, *ffn, functional.silu, tile=tile), x, ffn)


@pytest.mark.gpu
def test_a_recorded_step_on_cuda_is_tuned_before_and_repeats_itself() -> None:
    x, ffn = of_shape("llava-1.5-7b", 1, torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowPath)
        first = ffn(x, functional.silu)
        recorded = recorder(x.device).record(lambda: ffn(x, functional.silu))
    check_ffn(first, x, ffn)
    for given in (x.clone(), x.neg()):
        x.copy_(given)
        recorded.replay()
        assert torch.equal(recorded.result, ffn(x, functional.silu))  # no atomics: the same bits


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("rho", [0.07, 0.2, 1.0])
@pytest.mark.parametrize(("tokens", "neurons"), [(640, 11_008), (3000, 18_944), (7, 29_568), (65, 33)])
def test_votes_on_cuda_are_the_processors(tokens: int, neurons: int, rho: float, dtype: torch.dtype) -> None:
    values = on_card(tokens, neurons, dtype=dtype)
    values[0] = -values[0].abs()
    assert fused.refusal(values) is None
    found, again, right = (*(core_counts(values, rho) for _ in range(2)), core_counts(values.cpu(), rho))
    assert torch.equal(found.frequency.cpu(), right.frequency)
    assert torch.equal(found.activation, again.activation)
    exact = values.double().clamp(min=0).sum(0)
    assert ((found.activation.double() - exact).abs() <= 2 * tokens * 2**-24 * exact).all()
    most = -(-neurons * 2 // 3)
    wanted = count.wanted((values > 0).sum(1), rho).clamp(max=most)
    least = count.by_topk(values, wanted, most)
    votes = (values >= torch.where((values > 0).any(1), least, torch.inf)[:, None]).sum(0, dtype=torch.int32)
    assert torch.equal(found.frequency, votes)
    assert len(core_set(found, n_core(0.4, neurons))) == n_core(0.4, neurons)


@pytest.mark.gpu
def test_a_model_on_cuda_decodes_as_from_compact_weights(clip: Any) -> None:
    from vlmbench.models.loading import load

    adapter = load("mini-llava-1.5@random", dtype=torch.float32, device="cuda", attention="sdpa").adapter
    prompt = spliced(adapter, clip(12))
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowPath)
        ours, right = (decoded(adapter, each, prompt)[0] for each in (GATHERED, Corematching()))
    torch.testing.assert_close(ours, right, rtol=0, atol=1e-4)  # TF32 is off; sums in another order
