"""The only door through which a method touches a model. Leaving undoes every change in reverse order.

One attention name, ``vlmbench``, is registered with transformers for the life of the process (there is no way to take a
name back); what it does in a layer is the function that `Patcher.attention` put on that layer's module.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

if TYPE_CHECKING:
    from vlmbench.models.base import ModelAdapter

ATTENTION = "vlmbench"
"""Holds no ``flash`` and no ``/``: transformers looks such names up on the hub."""

AttentionFn = Callable[..., tuple[Tensor, Tensor | None]]
"""``fn(module, q [B,H,N,D], k [B,Hkv,M,D], v, mask, *, scaling, vlmbench_layout=None, **kwargs) -> (out [B,N,H,D], None)``.

`vlmbench_layout` is the prompt's `TokenLayout` in prefill and absent in decode.
"""


def _dispatch(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
    return module.vlmbench_attention(module, query, key, value, mask, **kwargs)  # type: ignore[operator]


AttentionInterface.register(ATTENTION, _dispatch)
# Without a mask function of the same name the mask is silently None, and SDPA keeps only the first q keys
# (huggingface/transformers#46132).
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


class Patcher:
    """Records the undo of every change; a context manager."""

    def __init__(self, adapter: ModelAdapter) -> None:
        self.adapter = adapter
        self._undo = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._undo.__exit__(kind, error, tb)

    def pre(self, module: nn.Module, fn: Callable[..., Any]) -> None:
        """``fn(module, args, kwargs) -> None | (args, kwargs)`` before the module's own hooks and forward."""
        handle = module.register_forward_pre_hook(fn, with_kwargs=True, prepend=True)
        self._undo.callback(handle.remove)

    def post(self, module: nn.Module, fn: Callable[..., Any]) -> None:
        """``fn(module, args, kwargs, output) -> None | output``, before the library's own capturing hooks."""
        handle = module.register_forward_hook(fn, with_kwargs=True, prepend=True)
        self._undo.callback(handle.remove)

    def attr(self, obj: Any, name: str, value: Any) -> None:
        """Set an attribute on the instance; undone to the old instance attribute, or to none."""
        if isinstance(obj, nn.Module) and isinstance(value, (Tensor, nn.Module)):
            raise TypeError("tensors and modules belong in closures, not on the model")
        had, old = name in vars(obj), vars(obj).get(name)
        setattr(obj, name, value)
        self._undo.callback((lambda: setattr(obj, name, old)) if had else (lambda: delattr(obj, name)))

    def forward(self, module: nn.Module, fn: Callable[..., Any]) -> None:
        """Replace the forward of this one instance."""
        self.attr(module, "forward", fn)

    def swap(self, parent: nn.Module, name: str, module: nn.Module) -> None:
        """Put another module in the place of `parent`'s child `name`. Hooks on the old one are not called meanwhile."""
        old = getattr(parent, name)
        setattr(parent, name, module)
        self._undo.callback(setattr, parent, name, old)

    def on_host(self, module: nn.Module) -> None:
        """Keep a module's parameters on the host, pinned, where they are on a card; undone bit for bit.

        Parameters are exchanged and not written to: those that were loaded in inference mode cannot be.
        """
        for owner in module.modules():
            for name, parameter in owner._parameters.items():
                if parameter is not None and parameter.device.type == "cuda":
                    self._undo.callback(_exchange, owner, name, partial(_to, device=parameter.device))
                    _exchange(owner, name, _pinned)

    def attention(self, fn: AttentionFn, layers: Iterable[int] | None = None) -> None:
        """Attend through `fn` in these layers of the language model (all by default); the others keep their own way."""
        text = self.adapter.text
        before = text.config._attn_implementation
        if before == ATTENTION:
            raise RuntimeError("another method already replaced the attention of this model")
        own = AttentionInterface()[before] if before != "eager" else self.adapter.eager_attention
        chosen = set(range(len(self.adapter.layers)) if layers is None else layers)
        for index, layer in enumerate(self.adapter.layers):
            self.attr(layer.self_attn, "vlmbench_attention", fn if index in chosen else own)
        self._undo.callback(text.set_attn_implementation, before)
        text.set_attn_implementation(ATTENTION)


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device)


def _pinned(card: Tensor) -> Tensor:
    """Straight into pinned memory: a model of 14 GB has no time for a second copy on the host."""
    return torch.empty_like(card, device="cpu", pin_memory=True).copy_(card)


def _exchange(owner: nn.Module, name: str, moved: Callable[[Tensor], Tensor]) -> None:
    old = owner._parameters[name]
    assert old is not None  # noqa: S101 (only those that are there are exchanged)
    owner._parameters[name] = nn.Parameter(moved(old.detach()), requires_grad=old.requires_grad)


def fingerprint(model: nn.Module) -> str:
    """A hash of everything a method could have changed: weights, classes, instance attributes, hooks, attention names.

    Take it after a first forward pass: some families install permanent capturing hooks then.
    """
    digest = hashlib.sha256()
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        digest.update(name.encode())
        if tensor.numel():
            digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).cpu().numpy().tobytes())
    for name, module in model.named_modules():
        attributes = sorted(key for key in vars(module) if not key.startswith("_"))
        hooks = [[id(fn) for fn in getattr(module, kind).values()] for kind in ("_forward_hooks", "_forward_pre_hooks")]
        forward = id(vars(module).get("forward"))
        attention = getattr(getattr(module, "config", None), "_attn_implementation", None)
        digest.update(repr((name, type(module).__qualname__, attributes, hooks, forward, attention)).encode())
    return digest.hexdigest()
