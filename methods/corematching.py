"""CoreMatching: core tokens stay after an early layer, core neurons do the FFN of decoding (arXiv 2505.19235).

A neuron is core when many tokens have it among their strongest; a visual token is core when many core neurons are positive in
it. Tokens below the knee of those scores leave after one layer, with their positions and nobody else's; prefill's FFN stays
dense; decoding uses each layer's core neurons through weights that are copied at the end of its prefill, inside the prefill's
time. Nothing is trained. ``mode=release`` is what the authors' public code does instead, which saves nothing.

All tokens vote alike, so core neurons are those of the most frequent content: where that is background, tokens of a small or
brief object have few of them positive and are the first to leave. On a video mostly empty, look at what is kept.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from vlmbench.errors import UsageError
from vlmbench.method import Citation, Method, Traits, Work, one_token
from vlmbench.spec import LATER

if TYPE_CHECKING:
    from vlmbench.core_run import CorePlan
    from vlmbench.layout import Prompt, TokenLayout
    from vlmbench.models.base import ModelAdapter, Shapes
    from vlmbench.patch import Patcher
    from vlmbench.trace import Trace


@dataclass(frozen=True)
class Corematching(Method):
    """`rho` of a token's positive neurons vote, `beta` of a layer's neurons are kept (kept, not left out).

    Tokens leave after the first `select_layer` layers, as many as the knee says but never all: `min_keep` is what remains at
    least. Decoding is sparse in `neuron_layers`: ``all``, or first/last counted from 0 (CoreInfer's own: ``6/26`` of 32).
    ``part=tokens`` and ``part=neurons`` are one half each. ``early_kv=kept`` leaves the tokens' keys in the layers before.
    ``spearman=on`` notes each layer's rank correlation of the score with α‖V‖cos, at the price of a slower prefill.

    ``offload=on`` is for weights that do not fit: FFNs that decoding leaves to core neurons stay on the host (all but those
    of the first `resident` layers), come for prefill one after the other, prefetched, and leave the device their core
    neurons alone; see the method ``offload`` for the dense model so treated.

    ``ffn=gathered`` copies the core neurons' columns of the down projection alone (a third of ``ffn=compact``, the default);
    decoding reads their rows of gate and up by index in the model's own weights, by a kernel that needs a GPU.
    """

    name: ClassVar[str] = "corematching"
    cite: ClassVar[Citation] = Citation(
        "CoreMatching: A Co-adaptive Sparse Inference Framework with Token and Neuron Pruning for Comprehensive "
        "Acceleration of Vision-Language Models",
        "2505.19235",
        faithful="core neurons, co-activation over all positive neurons, knee, removal after one layer with original "
        "positions, dense FFN in prefill, fixed core neurons in decode; written from descriptions of the paper, since the "
        "public code (mode=release) does none of it",
        extension="beta counts all neurons; activations tied with a token's weakest core one are core; straight curves keep "
        "all; min_keep; one knee for all media; the release's window of layers scaled to the depth; text alone stays dense; "
        "ffn=gathered",
    )
    traits: ClassVar[Traits] = Traits(stages=frozenset({"prefill", "decode"}), takes=frozenset({"ffn", "cache"}))

    rho: float = 0.2
    beta: float = 0.4
    select_layer: int = 2
    neuron_layers: str = "all"
    min_keep: int = 1
    compare: Literal["ge", "gt"] | None = None
    mode: Literal["paper", "release"] = "paper"
    part: Literal["both", "tokens", "neurons"] = "both"
    early_kv: Literal["pruned", "kept"] = "pruned"
    spearman: bool = False
    offload: bool = False
    resident: int | None = field(default=None, metadata=LATER)
    ffn: Literal["compact", "gathered"] | None = field(default=None, metadata=LATER)

    def __post_init__(self) -> None:
        for key in ("rho", "beta"):
            if not 0 < (value := getattr(self, key)) <= 1:
                raise UsageError(f"corematching:{key} must be above 0 and at most 1, not {value}.")
        for key in ("select_layer", "min_keep"):
            if (value := getattr(self, key)) < 1:
                raise UsageError(f"corematching:{key} must be at least 1, not {value}.")
        if self.neuron_layers != "all" and not self._first_last:
            raise UsageError(
                f"corematching:neuron_layers must be all, or first/last such as 6/26, not {self.neuron_layers!r}."
            )
        if self.resident is not None and (self.resident < 0 or not self.offload):
            raise UsageError(
                f"corematching:resident={self.resident} must be at least 0 and needs offload=on; give both, or leave it out."
            )
        if self.offload and (self.part == "tokens" or self.mode == "release"):
            raise UsageError(
                f"corematching:offload=on leaves core neurons on the device, and part={self.part},mode={self.mode} decodes "
                f"with all; leave offload out, or see the method offload."
            )
        if self.ffn == "compact":  # the default, by which stored runs are known
            object.__setattr__(self, "ffn", None)
        if self.ffn and (self.part == "tokens" or self.mode == "release"):
            raise UsageError(
                f"corematching:ffn=gathered is how decoding reads core neurons, and part={self.part},mode={self.mode} decodes "
                f"with all; leave ffn out."
            )
        if self.ffn and self.offload:
            raise UsageError(
                "corematching:ffn=gathered reads gate and up in the model's own weights, which offload=on keeps on the host; "
                "give one of them."
            )
        own = "gt" if self.mode == "release" else "ge"
        if self.mode == "release" and (self.part != "both" or self.spearman or self.compare not in (None, own)):
            raise UsageError(
                f"corematching:mode=release has one form; leave part={self.part}, compare={self.compare} and "
                f"spearman={'on' if self.spearman else 'off'} out."
            )
        if self.compare is None:
            object.__setattr__(self, "compare", own)
        takes = {
            "attention": self.spearman,  # it listens there
            "ffn": self.part != "tokens" and self.mode == "paper",
            "cache": self.part != "neurons",
            "weights": self.offload,
        }
        taken = frozenset(name for name, holds in takes.items() if holds)
        needed = frozenset({"weights"} if self.ffn else ())  # where they are, and as floats
        object.__setattr__(self, "traits", replace(type(self).traits, takes=taken, needs=needed))

    @property
    def _first_last(self) -> tuple[int, int] | None:
        """Layers that `neuron_layers` names, both included."""
        found = re.fullmatch(r"(\d+)/(\d+)", self.neuron_layers)
        first, last = map(int, found.groups()) if found else (1, 0)
        return (first, last) if first <= last else None

    @classmethod
    def examples(cls) -> list[Corematching]:
        return [
            cls(),
            cls(part="tokens", early_kv="kept"),
            cls(part="neurons", neuron_layers="1/2", ffn="gathered"),
            cls(compare="gt", select_layer=1, min_keep=2, rho=0.5, beta=0.2, spearman=True),
            cls(mode="release"),
        ]

    @classmethod
    def neutral(cls) -> Corematching:
        return cls(beta=1.0, min_keep=10**9)  # chosen, gathered and copied as ever, and all of it

    def check(self, adapter: ModelAdapter) -> None:
        self.plan(adapter)

    def plan(self, adapter: ModelAdapter) -> CorePlan:
        """The method on this model. Raises `UsageError` when the model cannot take it."""
        from torch import nn

        from vlmbench.core_run import CorePlan
        from vlmbench.kernels.core_neurons import n_core
        from vlmbench.kernels.int8_linear import Int8Linear
        from vlmbench.offload import check_resident

        check_resident(self.name, self.resident, adapter)
        depth, width = adapter.shapes.layers, adapter.shapes.intermediate
        kinds = (nn.Linear,) if self.ffn else (nn.Linear, Int8Linear)
        for layer in adapter.layers:
            parts = [getattr(getattr(layer, "mlp", None), f"{name}_proj", None) for name in ("gate", "up", "down")]
            if not all(type(part) in kinds and getattr(part, "bias", None) is None for part in parts):
                raise UsageError(
                    f"corematching needs gated FFNs of plain matrices without biases, which {type(layer).__name__} does not "
                    f"have; choose a Qwen2-VL, Qwen2.5-VL or LLaVA-OneVision model that is not quantised."
                )
        if self.part != "neurons" and self.mode == "paper" and self.select_layer >= depth:
            raise UsageError(
                f"corematching:select_layer={self.select_layer} leaves no layer behind it: the model has {depth}; choose one "
                f"below {depth}, or part=neurons."
            )
        first, last = self._first_last or (0, depth - 1)
        if last >= depth:
            raise UsageError(
                f"corematching:neuron_layers={self.neuron_layers} goes beyond the model's last layer, {depth - 1} counted from "
                f"0; choose one of those, or all."
            )
        if not (n := n_core(self.beta, width)):
            raise UsageError(
                f"corematching:beta={self.beta} keeps none of {width} neurons; give at least {1 / width:.2g}."
            )
        sparse = frozenset() if self.part == "tokens" else frozenset(range(first, last + 1))
        host = [layer for layer in sorted(sparse) if layer >= (self.resident or 0)] if self.offload else []
        if self.offload and not host:
            raise UsageError(
                f"corematching:offload=on,neuron_layers={self.neuron_layers},resident={self.resident} leaves nothing on the "
                f"host: only layers that decode with core neurons go there; give resident below {last + 1}."
            )
        return CorePlan(
            rho=self.rho,
            n_neurons=n,
            width=width,
            select=None if self.part == "neurons" else self.select_layer,
            sparse=sparse,
            host=tuple(host),
            compare=self.compare or "ge",
            min_keep=self.min_keep,
            gathered=self.ffn == "gathered",
            prune_early=self.early_kv == "pruned",
            spearman=self.spearman,
        )

    def prepare(self, prompt: Prompt, trace: Trace) -> Prompt:
        if not prompt.layout.n_visual:
            trace.inactive("the prompt has no visual tokens")
        return prompt

    def install(self, patch: Patcher, trace: Trace) -> None:
        from vlmbench import core_release
        from vlmbench.core_run import CoreRun

        if self.mode == "release":
            core_release.install(patch, trace)
        else:
            CoreRun(self.plan(patch.adapter), trace).install(patch)

    def unplanned(self, layout: TokenLayout) -> str:
        if self.mode == "release" or self.part == "neurons" or not layout.n_visual:
            return ""
        return (
            f"corematching's prefill and cache count every token: how many visual ones leave after layer {self.select_layer} "
            f"is the knee's to say, once the prompt has run"
        )

    def work(self, prompt: Prompt, shapes: Shapes, trace: Trace) -> Work:
        """Prefill's FFN is dense. How many tokens stay is known once the prompt has run; before, they count as all."""
        from vlmbench.core_run import stage

        n, early = prompt.length, min(self.select_layer, shapes.layers)
        kept = trace.kept.get(stage(self.select_layer)) if self.mode == "paper" else None
        tokens = (n,) * early + (n if kept is None else len(kept),) * (shapes.layers - early)
        return Work(tokens, tuple(t * (t + 1) // 2 for t in tokens), (shapes.intermediate,) * shapes.layers)

    def decode_work(self, prompt: Prompt, shapes: Shapes, trace: Trace, step: int, size: int) -> Work:
        """Keys of the core tokens (of all, before the prompt has run), and weights of the core neurons, and what is copied."""
        from vlmbench.core_run import stage
        from vlmbench.kernels.core_neurons import n_core, padded

        one, depth = one_token(prompt.length + step + 1, shapes), shapes.layers
        if self.mode == "release" or not prompt.layout.n_visual:
            return one
        keys, neurons, copied, read = list(one.pairs), list(one.neurons), 0, 0
        if (kept := trace.kept.get(stage(self.select_layer))) is not None:
            first = 0 if self.early_kv == "pruned" else self.select_layer
            keys[first:] = [len(kept) + step + 1] * (depth - first)
        if self.part != "tokens":
            first, last = self._first_last or (0, depth - 1)
            n, layers = n_core(self.beta, shapes.intermediate), last + 1 - first
            neurons[first : last + 1] = [n] * layers
            if self.ffn == "gathered":  # down's columns with their padding, and an int32 index that is read too
                copied = layers * (shapes.hidden * size * padded(n) + 4 * n)
                read = layers * (shapes.hidden * size * (padded(n) - n) + 4 * n)
            else:
                copied = layers * 3 * shapes.hidden * size * n
        return replace(one, pairs=tuple(keys), neurons=tuple(neurons), own_bytes=copied, own_read=read)
