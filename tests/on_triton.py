"""What tests of Triton kernels share: files run under the interpreter, inputs as models give them, and a check on CUDA."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

HERE = Path(__file__).parent
CPU = torch.device("cpu")


def run_interpreted(name: str) -> None:
    """The tests of that file in a process of their own: Triton settles on the interpreter when it is first imported."""
    if find_spec("triton") is None:
        pytest.skip("no triton")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / name)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 5 and "skipped" in done.stdout:
        pytest.skip(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


def run_without_triton(program: str) -> None:
    """Fails when these lines of Python import triton."""
    lines = f"import sys; sys.modules['triton'] = None\n{program}"
    subprocess.run([sys.executable, "-c", lines], cwd=HERE.parent, check=True)


def qkv(
    n: int, heads: int = 2, kv_heads: int = 2, dim: int = 16, dtype: torch.dtype = torch.float32, device: Any = CPU
) -> tuple[Tensor, Tensor, Tensor]:
    """As a model hands them over: heads behind tokens in memory."""
    generator = torch.Generator(device).manual_seed(n + heads)
    q, k, v = (
        torch.randn(1, n, h, dim, generator=generator, device=device).to(dtype).transpose(1, 2)
        for h in (heads, kv_heads, kv_heads)
    )
    return q, k, v


def check_rows(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Callable[[Tensor], Tensor],
    *,
    edges: tuple[int, ...] = (),
    roundings: int = 2,
    launches: int = 1,
) -> None:
    """256 random rows, the first, the last and the `edges` against float64; `visible` gives ``[H, r, N]``.

    With P = Σ p |v| of a row: each rounding to the tensors' dtype moves it by at most half its eps times P, of which a
    kernel has two (weights before the second product, output). The float32 part is derived in
    `interpreted_block_attention.py`; tensor cores cut products' sums off where it rounds, which doubles it. A second launch
    goes on from the first one's output.
    """
    n, groups, dim, scale = q.shape[2], q.shape[1] // k.shape[1], q.shape[-1], q.shape[-1] ** -0.5
    some = torch.randperm(n, generator=torch.Generator().manual_seed(0))[:256]
    rows = torch.cat([some, torch.tensor([0, n - 1, *edges])]).to(q.device)
    seen = visible(rows)
    info = torch.finfo(q.dtype)
    assert out.shape == q.shape
    assert out.dtype == q.dtype
    assert out.isfinite().all()
    for head in range(q.shape[1]):
        wide, keys, values = q[0, head, rows].double(), k[0, head // groups].double(), v[0, head // groups].double()
        weights = (scale * wide @ keys.T).masked_fill(~seen[head], float("-inf")).softmax(-1)
        e = 2 * (dim + 4) * 2**-24 * scale * float(wide.norm(dim=-1).max() * keys.norm(dim=-1).max())
        relative = (roundings + launches - 1) * info.eps / 2 + 2 * e + 4 * launches * (n + 8) * 2**-24
        absolute = launches * (n + 1) * info.tiny * info.eps / 2 * float(values.abs().max())
        bound = 1.1 * (relative * (weights @ values.abs()) + absolute)
        assert ((out[0, head, rows].double() - weights @ values).abs() <= bound).all()
