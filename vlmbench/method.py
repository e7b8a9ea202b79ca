"""The one class that a method subclasses. Start here, then read ``methods/full.py`` and ``vlmbench/patch.py``.

A method is a dataclass: its fields are its hyper-parameters, checked in ``__post_init__``. A subclass overrides what it
changes and nothing else: the frames (`prepare_clip`), the prompt between vision and layer 0 (`prepare`), the model
(`install`, only through the `Patcher` it is given). State of a sample lives in closures made by `install` or in the
`Trace`; never on ``self``, never on a module. This file imports no torch: names must list fast.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self, final

if TYPE_CHECKING:
    from vlmbench.artefact import Fitted
    from vlmbench.backend import Identity
    from vlmbench.fitting import Fitting
    from vlmbench.layout import Prompt, TokenLayout
    from vlmbench.models.base import ModelAdapter, Shapes
    from vlmbench.patch import Patcher
    from vlmbench.suite import Sample, Suite
    from vlmbench.trace import Trace
    from vlmbench.video import Clip


@dataclass(frozen=True)
class Citation:
    """Where a method comes from and how far this file follows it."""

    title: str
    arxiv: str = ""
    faithful: str = ""
    """What is exactly as published."""
    extension: str = ""
    """What is ours."""


@dataclass(frozen=True)
class Traits:
    """What kind of method this is; tables mark rows by it."""

    trained: bool = False
    sees_vision: bool = True
    """False: no frame reaches the model, so none is encoded."""
    uses_model: bool = True
    """False: answers come from `Method.answer`, the model is never called."""
    masked: bool = False
    """True: computes the dense amount and masks; its time says nothing about the method. A method that does so only on
    some devices says ``trace.facts["masked"]`` instead."""
    exact: bool = False
    """True: it changes where or when something is computed and no answer; what it gives is full attention's, bit for bit."""
    prefix_reusable: bool = False
    """True: keys and values up to the last visual token do not depend on the text behind it, so the next question on the
    same media may be prefilled behind them (`engine.generate_next`). Its tokens then pass what `install` put there as
    generated tokens do, several at once and without ``vlmbench_layout``. A method that chooses by the question, or anew
    for each sample, may not."""
    stages: frozenset[str] = frozenset()
    """Of {"frames", "vision", "prompt", "prefill", "decode"}: where it acts."""
    takes: frozenset[str] = frozenset()
    """Of `TAKEN`: what of the model is this method's alone, so that no method joined with it by ``+`` may take it too."""
    needs: frozenset[str] = frozenset()
    """Of `TAKEN`: what it leaves alone, and no method joined with it may take."""


TAKEN = {
    "attention": "the attention of the language model",
    "ffn": "the FFNs of the language model",
    "tower": "the blocks of the vision tower",
    "cache": "which tokens a layer's cache holds",
    "weights": "the weights of the language model",
    "visual": "the visual tokens, of which it leaves none in the prompt",
}
"""`Traits.takes` in words."""


@dataclass(frozen=True)
class VisionWork:
    """What the vision tower did on one sample, from its first block on, counted by a method that changes it."""

    flops: int
    """Matrix products, multiply-add = 2, whatever the method itself multiplies included."""
    dense_flops: int
    """The same on every token."""


@dataclass(frozen=True)
class Work:
    """What the language model did on one sample, counted from shapes and the method's own decisions."""

    tokens: tuple[int, ...]
    """Tokens that each layer processed in prefill."""
    pairs: tuple[int, ...]
    """Query-key pairs that each layer attended in prefill (one head)."""
    neurons: tuple[int, ...]
    """FFN neurons that each layer used per token."""
    vision: VisionWork | None = None
    """None where the method leaves the tower as it is."""
    own_flops: int = 0
    """Of the language model beside its layers' own products: what the method adds."""
    own_bytes: int = 0
    """Held beside weights and cache: copies that the method makes."""
    own_read: int = 0
    """Bytes of one generated token that are read beside weights and cache."""
    int8: bool = False
    """The layers' matrices are kept in a byte an entry, with a scale an output."""


def one_token(keys: int, shapes: Shapes) -> Work:
    """A generated token that sees `keys` keys, its own included, in every layer, and uses every neuron."""
    layers = shapes.layers
    return Work((1,) * layers, (keys,) * layers, (shapes.intermediate,) * layers)


class Method(ABC):
    name: ClassVar[str]
    cite: ClassVar[Citation]
    traits: ClassVar[Traits] = Traits()

    @classmethod
    def examples(cls) -> Sequence[Self]:
        """Small configurations, one of them with an effect on a 3-frame prompt; the shared tests run them all."""
        return [cls()]

    @classmethod
    def neutral(cls) -> Self | None:
        """The setting at which the method equals full attention exactly, through its own path; None if there is none."""
        return None

    def fit(self, suite: Suite) -> None:
        """Learn what the method needs from the suite's train split. Called once, before the first sample."""

    def unlike(self, frames: int | None, sampler: str) -> str:
        """A sentence when what `fit` found saw videos in another way than this run shows them; else nothing."""
        return ""

    def search(self, fitting: Fitting) -> Fitted:
        """What ``vlmbench fit`` writes: parameters chosen for the loaded model on the suite's train split.

        A method with parameters to choose, or weights to train, overrides it. Raises `RunError` when nothing will do.
        """
        raise NotImplementedError(f"{self.name} has nothing to fit")

    def check(self, adapter: ModelAdapter) -> None:
        """Raise `UsageError` when this model cannot take the method."""

    def check_weights(self, identity: Identity) -> None:
        """Raise `UsageError` when what was fitted is of other weights than those that are loaded."""

    def prepare_clip(self, clip: Clip, trace: Trace) -> Clip:
        """Change the decoded frames before the processor sees them."""
        return clip

    def install(self, patch: Patcher, trace: Trace) -> None:
        """Register hooks and attention through `patch`. `trace` is reset by the engine before each sample."""

    def prepare(self, prompt: Prompt, trace: Trace) -> Prompt:
        """Change the prompt after vision and before layer 0. Set ``trace.inactive(reason)`` when there is nothing to do."""
        return prompt

    @property
    def on_text(self) -> bool:
        """Whether it means to act on a prompt without pictures as well, where others leave full attention alone."""
        return False

    def unplanned(self, layout: TokenLayout) -> str:
        """What `work` cannot know of such a prompt before it has run, in words that ``vlmbench plan`` prints; else nothing."""
        return ""

    def work(self, prompt: Prompt, shapes: Shapes, trace: Trace) -> Work:
        """Counted work of this sample's prefill; the default is causal attention over the prepared prompt."""
        n = prompt.length
        layers = shapes.layers
        return Work((n,) * layers, (n * (n + 1) // 2,) * layers, (shapes.intermediate,) * layers)

    def decode_work(self, prompt: Prompt, shapes: Shapes, trace: Trace, step: int, size: int) -> Work | None:
        """Counted work of the generated token `step` (0 reads the prompt and itself) behind the prepared prompt.

        `size` is the bytes of a number. None where it is not known: by default of a method that acts in decode.
        """
        if "decode" in self.traits.stages:
            return None
        return one_token(prompt.length + step + 1, shapes)

    def answer(self, sample: Sample) -> str:
        """The answer of a method that never calls the model (`Traits.uses_model` False)."""
        raise NotImplementedError(f"{type(self).__name__} answers through the model")

    def fitted(self) -> dict[str, Any]:
        """What `fit` learned or an artefact holds, as far as it can change an answer: part of the result folder's hash.

        A key that is also a parameter's takes its place there: an artefact counts by content and not by path.
        """
        return {}

    @final
    @contextmanager
    def attach(self, adapter: ModelAdapter) -> Iterator[Trace]:
        """Install on the model; leaving, also by an exception, undoes every change in reverse order."""
        from vlmbench.patch import Patcher  # torch only when a model is there
        from vlmbench.trace import Trace

        trace = Trace()
        with Patcher(adapter) as patch:
            self.install(patch, trace)
            yield trace
