"""Weight-only int8: its error bound, its bytes, and the model as it was when the method leaves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from vlmbench.engine import generate
from vlmbench.errors import UsageError
from vlmbench.kernels.int8_linear import FEW, Int8Linear, has_kernel, quantise
from vlmbench.methods.full import Full
from vlmbench.methods.int8 import Int8
from vlmbench.patch import fingerprint


def weights(outputs: int, inputs: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_entry_moves_by_more_than_half_its_rows_scale_and_the_largest_not_at_all(dtype: torch.dtype) -> None:
    """In every dtype: steps taken in bfloat16 would have no halves, and be rounded twice."""
    w = weights(7, 333).to(dtype)
    found = quantise(w)
    assert (found.values.dtype, found.scale.dtype) == (torch.int8, dtype)
    scale = found.scale.double()[:, None]
    moved = (found.values * scale - w.double()).abs()
    rounding = 127 * torch.finfo(torch.float32).eps  # of w / scale, in steps
    assert (moved <= (0.5 + rounding) * scale).all()
    assert torch.equal(found.values.abs().amax(1), torch.full((7,), 127, dtype=torch.int8))


@pytest.mark.parametrize("shape", [(3,), (1, 3), (1, FEW + 1)], ids=str)
def test_an_output_moves_by_no_more_than_the_scale_allows(shape: tuple[int, ...]) -> None:
    w, x = weights(9, 40), torch.randn(*shape, 40, generator=torch.Generator().manual_seed(1))
    found = quantise(w)
    bound = x.abs().sum(-1, keepdim=True) * found.scale / 2
    rounding = 40 * torch.finfo(torch.float32).eps * (x.abs() @ w.abs().T)
    assert ((found(x) - x @ w.T).abs() <= bound + 2 * rounding).all()


@pytest.mark.parametrize(("outputs", "inputs"), [(64, 32), (9, 96), (1, 32), (8, 40), (9, 33), (1, 1)])
@pytest.mark.parametrize("rows", [1, FEW, FEW + 1])
def test_torchs_kernel_gives_the_product_of_what_is_kept(rows: int, outputs: int, inputs: int) -> None:
    """In bfloat16, with few rows through the kernel, with more or odd sizes (which it gets wrong) without it."""
    found = quantise(weights(outputs, inputs).bfloat16())
    x = weights(inputs, rows, seed=1).bfloat16().T
    want = x.double() @ (found.values.double() * found.scale.double()[:, None]).T
    size = x.double().abs() @ (found.values.double().abs() * found.scale.double()[:, None]).T
    assert has_kernel(x.device, x.dtype, inputs) == (inputs % 32 == 0)
    # Two roundings to bfloat16 (the sum, its product with the scale) and their product; float32 sums within.
    assert ((found(x).double() - want).abs() <= 2.01 * 2**-8 * want.abs() + 32 * 2**-23 * size).all()
    assert not has_kernel(x.device, torch.float32, inputs)


def test_a_row_of_zeros_stays_one() -> None:
    w = weights(3, 5)
    w[1] = 0
    found = quantise(w)(torch.ones(2, 5))
    assert torch.isfinite(found).all()
    assert not found[:, 1].any()


def test_rows_and_columns_are_those_of_the_whole() -> None:
    found = quantise(weights(6, 8))
    which = torch.tensor([1, 4])
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(2))
    assert torch.equal(found.rows(which).values, found.values[which])
    torch.testing.assert_close(found.rows(which)(x), found(x)[:, which])
    masked = torch.zeros_like(x)
    masked[:, which] = x[:, which]
    torch.testing.assert_close(found.columns(which)(x[:, which]), found(masked))
    assert found.nbytes == 6 * 8 + 6 * 4


def test_the_bias_stays_as_it_is() -> None:
    linear = nn.Linear(4, 3)
    small = Int8Linear(linear)
    assert small.bias is linear.bias
    assert torch.equal(small(torch.zeros(2, 4)), linear.bias.detach().expand(2, 3))


@torch.inference_mode()
def test_the_model_answers_with_int8_and_is_what_it_was_afterwards(adapter: Any, clip: Any) -> None:
    """The layers of the language model and nothing else, at a quarter of float32's bytes."""
    ask = ([clip(6)], "where ?")
    with Full().attach(adapter) as trace:
        full = generate(adapter, Full(), trace, *ask, max_new_tokens=3, stop_at_eos=False)
    before = fingerprint(adapter.model)
    dense = {name: module.weight.nbytes for name, module in adapter.text.named_modules() if type(module) is nn.Linear}
    with Int8().attach(adapter) as trace:
        done = generate(adapter, Int8(), trace, *ask, max_new_tokens=3, stop_at_eos=False)
        small = {name: module for name, module in adapter.text.named_modules() if isinstance(module, Int8Linear)}
        assert small.keys() == dense.keys()
        for name, module in small.items():
            assert module.matrix.nbytes == dense[name] // 4 + 4 * module.values.shape[0]
        assert not any(isinstance(module, Int8Linear) for block in adapter.vision_blocks for module in block.modules())
        assert not any(type(module) is nn.Linear for layer in adapter.layers for module in layer.modules())
        # What the memory pass counts as weights is the small form alone.
        held = {id(each) for each in (*adapter.model.parameters(), *adapter.model.buffers())}
        assert {id(module.values) for module in small.values()} < held
        assert trace.facts["dequantised"]  # float32: no kernel
    assert fingerprint(adapter.model) == before
    assert not torch.equal(done.first_logits, full.first_logits)
    # Per output the bound is half a scale times Σ|x|; through four layers and a head it is loose, but no other answer.
    assert torch.nn.functional.cosine_similarity(done.first_logits, full.first_logits, dim=0) > 0.99


@torch.inference_mode()
def test_one_width_without_a_kernel_is_enough_to_say_so(adapter: Any, clip: Any, monkeypatch: Any) -> None:
    """The mark is of every matrix, and of the core neurons' copies, whose widths are odd; prefill alone, which needs none."""
    from vlmbench import core_run
    from vlmbench.composed import Composed
    from vlmbench.kernels import int8_linear
    from vlmbench.methods.corematching import Corematching

    def marked(method: Any, has_kernel: Any) -> bool:
        for module in (int8_linear, core_run):
            monkeypatch.setattr(module, "has_kernel", has_kernel)
        with method.attach(adapter) as trace:
            generate(adapter, method, trace, [clip(6)], "where ?", max_new_tokens=1, stop_at_eos=False)
        return bool(trace.facts["dequantised"])

    shapes = adapter.shapes
    joined = Composed((Int8(), Corematching(beta=51.5 / shapes.intermediate)))
    assert marked(Int8(), lambda device, dtype, inputs: inputs == shapes.hidden)
    assert not marked(Int8(), lambda device, dtype, inputs: inputs % 32 == 0)
    assert marked(joined, lambda device, dtype, inputs: inputs % 32 == 0)


@torch.inference_mode()
def test_the_bytes_that_are_counted_are_those_that_are_held(adapter: Any, clip: Any) -> None:
    """Of int8 alone and beside others, in prefill and in decoding; they were float32's, or none."""
    from vlmbench import cost
    from vlmbench.session import make_methods

    shapes, steps = adapter.shapes, 2
    head = shapes.hidden * shapes.vocab * 4
    for spec in ("int8", "int8+corematching:beta=0.5", "pevlm:sink=0,block=1+int8"):
        (method,) = make_methods([spec])
        with method.attach(adapter) as trace:
            done = generate(adapter, method, trace, [clip(6)], "where ?", max_new_tokens=steps, stop_at_eos=False)
            names = {
                name: module.matrix.nbytes
                for name, module in adapter.text.named_modules()
                if isinstance(module, Int8Linear)
            }
            held = sum(names.values())
            copied = trace.facts.get("core_neurons", {}).get("copied_bytes")
            work = method.work(done.prompt, shapes, trace)
            step = method.decode_work(done.prompt, shapes, trace, steps - 2, 4)
        assert cost.weight_bytes(shapes, 4, work.neurons, int8=work.int8) == held + head
        assert step is not None
        if copied is not None:  # decoding reads the copies in the place of the FFNs
            held += copied - sum(nbytes for name, nbytes in names.items() if ".mlp." in name)
        assert cost.weight_bytes(shapes, 4, step.neurons, int8=step.int8) == held + head
        keys = sum(layer.used_bytes for layer in done.cache.layers)
        assert cost.decode(step, shapes, 4).bytes == held + head + keys


def test_bench_says_that_weights_were_written_out_and_counts_int8s_bytes(cli: Any) -> None:
    import json

    rows = {}
    for method in ("int8", "pevlm:sink=0,block=1"):
        args = ("--method", method, "--shape", "mini-llava-ov", "--frames", 6, "--rounds", 2, "--format", "json")
        done = cli("bench", "prefill", *args)
        assert done.code == 0, done.err
        (rows[method],) = json.loads(done.out)["rows"]
    assert "dequantised" in rows["int8"]["marks"]
    assert "written out as floats" in rows["int8"]["note"]
    assert "dequantised" not in rows["pevlm:sink=0,block=1"]["marks"]
    assert rows["int8"]["method_bytes"] < rows["int8"]["dense_bytes"] == rows["pevlm:sink=0,block=1"]["dense_bytes"]


def test_a_model_without_plain_matrices_is_refused(adapter: Any) -> None:
    with Int8().attach(adapter), pytest.raises(UsageError, match="int8 needs plain matrices in the decoder layers"):
        Int8().check(adapter)
    Int8().check(adapter)
