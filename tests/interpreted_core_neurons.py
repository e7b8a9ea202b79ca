"""The Triton kernels of core neurons under Triton's interpreter. Run by `test_core_triton.py` in its own process.

Memory is poisoned as in `interpreted_block_attention`, whose fixture this is. The interpreter cuts bfloat16 off instead of
rounding it.
"""

from __future__ import annotations

import inspect
import mmap
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from triton.runtime import interpreter

from tests.interpreted_block_attention import poison  # noqa: F401
from tests.test_core_triton import check_ffn, decoded, spliced
from vlmbench.graphs import Outside
from vlmbench.kernels.core_neurons import GatheredFFN, count, fused, gathered, reference
from vlmbench.kernels.core_neurons.fused import Tile
from vlmbench.methods.corematching import Corematching

DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=lambda d: str(d)[6:])
NO_RESERVE = 0x4000
"""Linux's MAP_NORESERVE, which the module names from Python 3.13 on."""


def random(*size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def framed(rows: int, columns: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Random ``[rows, columns]`` inside a larger buffer of NaN."""
    buffer = torch.full((rows + 2, columns + 16), float("nan"), dtype=dtype)
    buffer[1:-1, :columns] = random(rows, columns, seed=seed, dtype=dtype)
    return buffer[1:-1, :columns]


def case(width: int, neurons: int, k: int, batch: int, dtype: torch.dtype) -> tuple[Tensor, GatheredFFN]:
    """Rows of x and an FFN of k neurons, the weights of all others being NaN."""
    x, gate, up = (framed(n, width, i, dtype) for i, n in enumerate((batch, neurons, neurons)))
    down = random(width, neurons, seed=3, dtype=dtype)
    chosen = torch.randperm(neurons, generator=torch.Generator().manual_seed(k))[:k].sort().values
    others = torch.ones(neurons, dtype=torch.bool)
    others[chosen] = False
    gate[others], up[others], down[:, others] = (float("nan"),) * 3
    return x, gathered(gate, up, down, chosen)


@DTYPES
@pytest.mark.parametrize(
    ("width", "neurons", "k", "batch", "tile"),
    [
        (64, 128, 51, 1, None),
        (63, 70, 37, 1, Tile(8, 16)),
        (63, 70, 37, 3, Tile(4, 32)),
        (50, 40, 16, 8, Tile(16, 64)),
        (19, 40, 1, 2, Tile(1, 16)),
        (7, 24, 24, 1, Tile(2, 128)),
    ],
)
def test_the_gathered_ffn_is_the_masked_one(
    width: int, neurons: int, k: int, batch: int, tile: Tile | None, dtype: torch.dtype
) -> None:
    x, ffn = case(width, neurons, k, batch, dtype)
    check_ffn(fused.ffn(x, *ffn, functional.silu, tile=tile), x, ffn)


def test_any_leading_dimensions_are_rows() -> None:
    x, ffn = case(16, 24, 5, 6, torch.float32)
    flat = fused.ffn(x, *ffn, functional.silu)
    assert torch.equal(fused.ffn(x.reshape(2, 3, 16), *ffn, torch.nn.SiLU()), flat.view(2, 3, 16))


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_a_gate_of_any_size_is_no_nan(scale: float) -> None:
    x, ffn = case(16, 24, 5, 1, torch.float32)
    ffn = ffn._replace(gate=ffn.gate.abs() * scale)
    check_ffn(fused.ffn(x.abs(), *ffn, functional.silu), x.abs(), ffn)


def test_weights_are_addressed_beyond_two_to_the_31(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows 2**31 / 10 numbers apart, in memory that is promised and hardly touched: 32 bits would point outside of it."""
    # Without this the interpreter ends by copying every storage onto itself, which touches all of it.
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *args: None)
    x, near = case(16, 24, 9, 1, torch.float16)
    right = fused.ffn(x, *near, functional.silu)
    apart = 2**31 // 10
    memory = mmap.mmap(-1, 2 * 24 * apart, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
    numbers = torch.frombuffer(memory, dtype=torch.float16)
    gate, up = (numbers.as_strided((24, 16), (apart, 1), 64 * i) for i in range(2))
    gate.copy_(near.gate)
    up.copy_(near.up)
    assert torch.equal(fused.ffn(x, gate, up, near.down, near.neurons, functional.silu), right)


def test_who_records_a_step_sees_all_that_it_reads() -> None:
    """A CUDA graph knows addresses alone: what is copied for a prompt must live as long as the recording."""
    x, ffn = case(16, 24, 9, 1, torch.float32)
    with Outside() as outside:
        fused.ffn(x, *ffn, functional.silu)
    for each in ffn:
        assert each.untyped_storage()._cdata in outside.held


def test_a_model_decodes_as_from_compact_weights(clip: Any) -> None:
    from tests.conftest import load_mini

    adapter = load_mini("mini-llava-1.5@random")
    prompt = spliced(adapter, clip(12))
    compact, own = (
        decoded(adapter, each, prompt)[0]
        for each in (
            Corematching(part="neurons", neuron_layers="1/1"),
            Corematching(part="neurons", neuron_layers="1/1", ffn="gathered"),
        )
    )
    # float32 rounding of a four-layer model at values of a few units.
    torch.testing.assert_close(own, compact, rtol=0, atol=1e-5)
    assert not torch.equal(own, compact)  # by the kernels, in another order


# Votes and sums.


def check_counts(values: Tensor, rho: float) -> None:
    found, right = fused.core_counts(values, rho), count.core_counts(values, rho)
    assert found.frequency.dtype == torch.int32
    assert torch.equal(found.frequency, right.frequency)
    assert found.frequency.tolist() == reference.core_counts(values, rho)
    exact = values.double().clamp(min=0).sum(0)
    # Two roundings a token at most: parts of them are added, and then joined.
    assert ((found.activation.double() - exact).abs() <= 2 * len(values) * 2**-24 * exact).all()


@DTYPES
@pytest.mark.parametrize("rho", [0.07, 0.2, 0.5, 1.0])
def test_votes_are_those_of_a_count_by_hand(rho: float, dtype: torch.dtype) -> None:
    """Quarters, of which many are equal; a row without a positive entry; rows that lie apart in memory."""
    values = framed(9, 100, 0, dtype)
    values.copy_(torch.randint(-9, 10, (9, 100), generator=torch.Generator().manual_seed(1)) / 4)
    values[0] = -values[0].abs()
    check_counts(values, rho)


@DTYPES
@pytest.mark.parametrize(("tokens", "neurons"), [(1, 1), (3, 257), (70, 17)])
def test_tokens_and_neurons_of_any_number(tokens: int, neurons: int, dtype: torch.dtype) -> None:
    check_counts(random(tokens, neurons, dtype=dtype), 0.2)


def test_values_of_every_size_are_ordered_exactly() -> None:
    """From the least subnormal to infinity, neighbours among them: one bit more or less would be another vote."""
    ladder = torch.tensor([2.0**e for e in range(-149, 128, 6)] + [float("inf")])
    values = torch.cat([ladder, ladder[:-1].nextafter(torch.tensor(9e9)), -ladder, torch.zeros(2)])
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(0))
    rows = torch.stack([values[order], values[order].flip(0)])
    for rho in (0.01, 0.3, 0.5, 0.99):
        assert fused.core_counts(rows, rho).frequency.tolist() == reference.core_counts(rows, rho)


def test_a_nan_never_votes_and_adds_nothing() -> None:
    values = torch.tensor([[1.0, float("nan"), 3.0, -1.0], [-float("nan"), 2.0, 0.0, 1.0]])
    found = fused.core_counts(values, 0.5)
    assert found.frequency.tolist() == [0, 1, 1, 0]
    assert found.activation.tolist() == [1, 2, 3, 1]


def test_activations_are_addressed_beyond_two_to_the_31(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *args: None)
    near, apart = random(12, 20, dtype=torch.float16), 2**31 // 10
    memory = mmap.mmap(-1, 2 * 12 * apart, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
    far = torch.frombuffer(memory, dtype=torch.float16).as_strided((12, 20), (apart, 1))
    far.copy_(near)
    for ours, theirs in zip(fused.core_counts(far, 0.3), fused.core_counts(near, 0.3), strict=True):
        assert torch.equal(ours, theirs)


def test_the_tuned_kernels_name_their_arguments() -> None:
    from vlmbench.kernels.core_neurons import fused_kernel

    with open(fused_kernel.__file__, encoding="utf-8") as file:
        assert file.read().count("cache_results=True") == 2
    for tuned, kernel in (
        (fused_kernel.inner_fwd, fused_kernel.inner_fwd_kernel),
        (fused_kernel.down_fwd, fused_kernel.down_fwd_kernel),
    ):
        assert {*tuned.keys, *fused_kernel.TILES[0].kwargs} <= set(inspect.signature(kernel.fn).parameters)
