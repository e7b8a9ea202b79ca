"""A long video in pieces wherever tokens do not meet, since the temporaries would not fit otherwise.

At a million tokens of a 7B model one MLP's activations take 38 GB, a norm's float32 copies 14 GB each, and a layer of the
vision tower more; in pieces they take what a short video's do. Attention of the language model sees the whole prompt as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vlmbench.patch import Patcher

if TYPE_CHECKING:
    from vlmbench.models.base import ModelAdapter

LONG = 2**16
"""Tokens from which a prompt is long."""
ROWS = 2**15
"""Tokens of a piece: enough for full speed in a matrix product."""
PATCHES = 2**18
"""Patches that a tower takes at once."""


@contextmanager
def in_pieces(adapter: ModelAdapter, tokens: int) -> Iterator[None]:
    """Norms and MLPs of the language model in pieces while this lasts, if a prompt of `tokens` tokens is long.

    A module that a method replaces or watches from inside stays whole, and so does all of training.
    """
    with ExitStack() as stack:
        if tokens >= LONG and not torch.is_grad_enabled():
            patch = stack.enter_context(Patcher(adapter))
            for layer in adapter.layers:
                for module in (layer.input_layernorm, layer.post_attention_layernorm, layer.mlp):
                    if not _watched(module):
                        patch.forward(module, _piecewise(module.forward))
            patch.forward(adapter.text.norm, _piecewise(adapter.text.norm.forward))
        yield


def pieces_of(blocks: Iterable[nn.Module], pixels: Tensor, grid: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(patches, grid) of whole videos, or, where they are long, of runs of their temporal units, in order.

    For towers in which no unit looks at another. `pixels` are ``[patches, ...]``, `grid` is ``[videos, 3]``: units, rows and
    columns of patches. Blocks that a method replaces or watches see everything at once.
    """
    if len(pixels) <= PATCHES or any("forward" in vars(block) or _hooked(block) for block in blocks):
        yield pixels, grid
        return
    start = 0
    for units, rows, columns in grid.tolist():
        most = max(1, PATCHES // (rows * columns))
        for first in range(0, units, most):
            some = min(most, units - first)
            stop = start + some * rows * columns
            yield pixels[start:stop], grid.new_tensor([[some, rows, columns]])
            start = stop


def _piecewise(whole: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def forward(hidden_states: Tensor) -> Tensor:
        out = torch.empty_like(hidden_states)  # [B, N, C], as all three kinds of module give back
        for start in range(0, hidden_states.shape[1], ROWS):
            piece = slice(start, start + ROWS)
            out[:, piece] = whole(hidden_states[:, piece])
        return out

    return forward


def _watched(module: nn.Module) -> bool:
    """Whether something stands in for the module, or looks on or stands in inside it; what looks on from outside may."""
    parts = [part for part in module.modules() if part is not module]
    return "forward" in vars(module) or any("forward" in vars(part) or _hooked(part) for part in parts)


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_pre_hooks or module._forward_hooks)
