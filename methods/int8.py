"""Weight-only int8: the language model's matrices in one byte an entry, one scale an output; activations stay as they are.

Alone or joined with others (``pevlm+int8``). It saves memory: 4 bytes an entry become 1 (2 become 1 in bfloat16). It saves time
only where few tokens are multiplied by a kernel that reads the bytes as they are: decoding in bfloat16 on a CPU. Elsewhere
the weights are written out as floats at every call, and the row carries the mark ``dequantised``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from vlmbench.errors import UsageError
from vlmbench.method import Citation, Method, Traits, Work, one_token

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from vlmbench.layout import Prompt
    from vlmbench.models.base import ModelAdapter, Shapes
    from vlmbench.patch import Patcher
    from vlmbench.trace import Trace


@dataclass(frozen=True)
class Int8(Method):
    """Every matrix inside the decoder layers. Embeddings, head, norms, biases and the vision tower stay as they are.

    No entry moves by more than half its row's scale, a 127th of the row's largest entry; nothing is calibrated or trained.
    The weights as loaded wait on the host meanwhile: on a CPU the process holds both, and the table's memory the int8 alone.
    """

    name: ClassVar[str] = "int8"
    cite: ClassVar[Citation] = Citation(
        "Integer Quantization for Deep Learning Inference: Principles and Empirical Evaluation",
        "2004.09602",
        faithful="symmetric range from the largest absolute value, one scale an output channel (sections 3.1 and 3.2)",
        extension="weights alone, as in today's weight-only libraries; activations are not quantised",
    )
    traits: ClassVar[Traits] = Traits(
        stages=frozenset({"prefill", "decode"}), takes=frozenset({"weights"}), prefix_reusable=True
    )

    def check(self, adapter: ModelAdapter) -> None:
        if not list(_matrices(adapter)):
            raise UsageError(
                "int8 needs plain matrices in the decoder layers, and this model has none; choose one that is not quantised "
                "already."
            )

    def install(self, patch: Patcher, trace: Trace) -> None:
        from vlmbench.kernels.int8_linear import Int8Linear, has_kernel

        widths = set()
        for parent, name, linear in list(_matrices(patch.adapter)):
            small = Int8Linear(linear)  # from what is on the device
            patch.on_host(linear)  # until it is put back: the device holds one of the two
            patch.swap(parent, name, small)
            widths.add(linear.in_features)

        def begin(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            if kwargs.get("vlmbench_layout") is not None:
                x = kwargs["inputs_embeds"]
                trace.facts["dequantised"] = not all(has_kernel(x.device, x.dtype, width) for width in widths)

        patch.pre(patch.adapter.text, begin)

    def work(self, prompt: Prompt, shapes: Shapes, trace: Trace) -> Work:
        return replace(super().work(prompt, shapes, trace), int8=True)

    def decode_work(self, prompt: Prompt, shapes: Shapes, trace: Trace, step: int, size: int) -> Work:
        return replace(one_token(prompt.length + step + 1, shapes), int8=True)


def _matrices(adapter: ModelAdapter) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """(the module that holds it, its name there, the matrix) of every decoder layer."""
    from torch import nn

    for layer in adapter.layers:
        for parent in layer.modules():
            for name, child in parent.named_children():
                if type(child) is nn.Linear:
                    yield parent, name, child
