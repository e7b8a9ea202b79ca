"""What CoreMatching's public code does, which is not what its paper describes: no token leaves, no neuron is left out.

In a window of layers every image token is scored by the neurons that are positive both in it and in the fifth token from the
prompt's end; keys and values of those not above the knee are overwritten with zeros, after that layer's prefill attention has
run. A zero key still takes its part of the softmax, so this is no mask either; the first generated token is full attention's.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from vlmbench.kernels.core_neurons import co_activation, knee

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers.cache_utils import Cache

    from vlmbench.patch import Patcher
    from vlmbench.trace import Trace

REFERENCE = 5
"""The token, from the end, that image tokens are compared with; the start of the assistant's turn in the code's template."""


def window(layers: int) -> range:
    """Layers 5 to 18 of 32, and as much of any other depth."""
    return range(layers * 5 // 32, layers * 19 // 32)


def install(patch: Patcher, trace: Trace) -> None:
    """Zero keys and values of rejected tokens in the prompt's cache, layer by layer."""
    prompt: list[tuple[Tensor, Cache]] = []  # the one in prefill, if any

    def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
        layout = kwargs.get("vlmbench_layout")
        prompt.clear()
        if layout is not None and layout.n_visual:
            visual = layout.indices("video", "image").to(kwargs["inputs_embeds"].device)
            prompt.append((visual, kwargs["past_key_values"]))
            trace.facts["masked"] = True

    def zero(index: int, module: nn.Module, args: Any, kwargs: Any) -> None:
        for visual, cache in prompt:
            activations = args[0][0]
            reference = activations[-REFERENCE:][0]
            scores = co_activation(activations[visual], (reference > 0).nonzero()[:, 0])
            rejected = visual[scores <= knee(scores).threshold]
            for states in (cache.layers[index].keys, cache.layers[index].values):
                states[..., rejected, :] = 0
            lost = set(rejected.tolist())
            trace.kept[f"layer {index}"] = [i for i in range(len(activations)) if i not in lost]

    def end(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        prompt.clear()

    patch.pre(patch.adapter.text, begin)
    patch.post(patch.adapter.text, end)
    layers = patch.adapter.layers
    for index in window(len(layers)):
        patch.pre(layers[index].mlp.down_proj, partial(zero, index))
