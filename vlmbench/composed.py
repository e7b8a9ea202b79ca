"""Methods joined with ``+``: all of them act on one sample, in the order in which they are written.

``turbo:r=8,mode=drop+pevlm:sink=4`` shortens the prompt and then encodes what is left in blocks. Parts are joined where each
acts on another place of the model; `Traits.takes` says which place a method needs for itself, and two that need the same one
are refused before anything is loaded. Every part keeps its own file, parameters and promises.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any, ClassVar

from vlmbench.errors import UsageError
from vlmbench.method import TAKEN, Citation, Method, Traits, Work

if TYPE_CHECKING:
    from vlmbench.backend import Identity
    from vlmbench.layout import Prompt
    from vlmbench.models.base import ModelAdapter, Shapes
    from vlmbench.patch import Patcher
    from vlmbench.suite import Suite
    from vlmbench.trace import Trace
    from vlmbench.video import Clip


@dataclass(frozen=True)
class Composed(Method):
    """Two or more methods at once. `name` is theirs joined with ``+``; a sample is inactive when it is for all of them."""

    name: ClassVar[str] = "+"
    cite: ClassVar[Citation] = Citation("several methods at once", extension="the joining; see each part's own source")
    traits: ClassVar[Traits] = Traits()

    parts: tuple[Method, ...]

    def __post_init__(self) -> None:
        """Raises `UsageError` when the parts cannot act together."""
        _refuse(self.parts)
        traits = [part.traits for part in self.parts]
        union = Traits(
            trained=any(each.trained for each in traits),
            sees_vision=all(each.sees_vision for each in traits),
            masked=any(each.masked for each in traits),
            prefix_reusable=all(each.prefix_reusable for each in traits),
            stages=frozenset().union(*(each.stages for each in traits)),
            takes=frozenset().union(*(each.takes for each in traits)),
            needs=frozenset().union(*(each.needs for each in traits)),
        )
        object.__setattr__(self, "name", "+".join(part.name for part in self.parts))
        object.__setattr__(self, "traits", union)

    @classmethod
    def examples(cls) -> list[Composed]:
        return []  # there is none without parts; tests/test_methods.py joins some

    def fit(self, suite: Suite) -> None:
        for part in self.parts:
            part.fit(suite)

    def check(self, adapter: ModelAdapter) -> None:
        for part in self.parts:
            part.check(adapter)

    def check_weights(self, identity: Identity) -> None:
        for part in self.parts:
            part.check_weights(identity)

    def unlike(self, frames: int | None, sampler: str) -> str:
        return " ".join(filter(None, (part.unlike(frames, sampler) for part in self.parts)))

    def fitted(self) -> dict[str, Any]:
        return {f"{part.name}.{key}": value for part in self.parts for key, value in part.fitted().items()}

    def prepare_clip(self, clip: Clip, trace: Trace) -> Clip:
        for part, own in self._with(trace):
            clip = part.prepare_clip(clip, own)
        return clip

    def install(self, patch: Patcher, trace: Trace) -> None:
        # Weights first: the modules that hold them may be exchanged, and hooks on the old ones would never be called.
        order = sorted(self._with(trace), key=lambda pair: "weights" not in pair[0].traits.takes)
        for part, own in order:
            part.install(patch, own)

    def prepare(self, prompt: Prompt, trace: Trace) -> Prompt:
        for part, own in self._with(trace):
            before = trace.kept.pop("prompt", None)
            prompt = part.prepare(prompt, own)
            if before is not None:  # what a part keeps it counts in what the parts before it left
                now = trace.kept.get("prompt", range(len(before)))
                trace.kept["prompt"] = [before[index] for index in now]
        return prompt

    def work(self, prompt: Prompt, shapes: Shapes, trace: Trace) -> Work:
        """Tokens, neurons and vision of the part that left some out; pairs of the one that attends."""
        parts = self._with(trace)
        found = [part.work(prompt, shapes, own) for part, own in parts]
        tokens = _least(each.tokens for each in found)
        pairs = _least(each.pairs for each in found)
        for (part, own), work in zip(parts, found, strict=True):
            if "attention" in part.traits.takes:
                seen = self._seen(part, work, prompt, shapes, trace, own, tokens)
                pairs = tuple(each.pairs[layer] for layer, each in enumerate(seen))
        return Work(
            tokens,
            pairs,
            _least(each.neurons for each in found),
            next((each.vision for each in found if each.vision is not None), None),
            own_flops=sum(each.own_flops for each in found),
            own_bytes=sum(each.own_bytes for each in found),
            int8=any(each.int8 for each in found),
        )

    def decode_work(self, prompt: Prompt, shapes: Shapes, trace: Trace, step: int, size: int) -> Work | None:
        """Keys and neurons of the part that left some out; None where a part does not know."""
        found = [part.decode_work(prompt, shapes, own, step, size) for part, own in self._with(trace)]
        known = [each for each in found if each is not None]
        if len(known) < len(found):
            return None
        return Work(
            known[0].tokens,
            _least(each.pairs for each in known),
            _least(each.neurons for each in known),
            own_flops=sum(each.own_flops for each in known),
            own_bytes=sum(each.own_bytes for each in known),
            own_read=sum(each.own_read for each in known),
            int8=any(each.int8 for each in known),
        )

    def _seen(
        self, part: Method, now: Work, prompt: Prompt, shapes: Shapes, trace: Trace, own: Trace, tokens: Sequence[int]
    ) -> list[Work]:
        """For each layer the part's work on the tokens that are there: `now`, until another part takes some out."""
        import torch

        works: list[Work] = []
        for layer, count in enumerate(tokens):
            keep = trace.kept.get(f"layer {layer}")
            if keep is not None and count == len(keep) < prompt.length:
                now = part.work(prompt.select(torch.tensor(keep)), shapes, own)
            works.append(now)
        return works

    def _with(self, trace: Trace) -> list[tuple[Method, Trace]]:
        return [(part, trace.part(part.name)) for part in self.parts]


def join(methods: Sequence[Method]) -> Method:
    """One method for all of them; `full` adds nothing to another. Raises `UsageError` when they cannot act together."""
    acting = [method for method in methods if method.name != "full"] or methods[:1]
    return acting[0] if len(acting) == 1 else Composed(tuple(acting))


def parts_of(method: Method) -> tuple[Method, ...]:
    """The methods that were joined, or the only one."""
    return method.parts if isinstance(method, Composed) else (method,)


def neutral_of(method: Method) -> Method | None:
    """`Method.neutral`; of joined methods all their neutral settings together."""
    found = [type(part).neutral() for part in parts_of(method)]
    known = [each for each in found if each is not None]
    return join(known) if len(known) == len(found) else None


def _refuse(parts: Sequence[Method]) -> None:
    names = "+".join(part.name for part in parts)
    for part in parts:
        if not part.traits.uses_model:
            raise UsageError(
                f"{names}: {part.name} never calls the model, so no method can be joined with it; run it alone."
            )
    for one, other in combinations(parts, 2):
        if one.name == other.name:
            raise UsageError(f"{names}: {one.name} is there twice; give it once.")
        for taker, left in ((one, other), (other, one)):
            if "visual" in taker.traits.takes and left.traits.takes != {"weights"}:
                raise UsageError(
                    f"{names}: {taker.name} takes {TAKEN['visual']}, and {left.name} acts on nothing else; give one --method "
                    f"for each."
                )
            if needed := sorted(left.traits.needs & taker.traits.takes):
                raise UsageError(
                    f"{names}: {left.name} as given needs {TAKEN[needed[0]]} as they are, and {taker.name} takes them; give "
                    f"one --method for each."
                )
        if "tower" in other.traits.takes and "prompt" in other.traits.stages and _shortens(one):
            raise UsageError(
                f"{names}: {other.name} drops tokens by their places in whole frames, which {one.name} has cut by then; write "
                f"{other.name} before {one.name}."
            )
        if both := sorted(one.traits.takes & other.traits.takes):
            raise UsageError(
                f"{names}: {one.name} and {other.name} as given both take {TAKEN[both[0]]}, which one alone can have; give "
                f"one --method for each."
            )


def _shortens(method: Method) -> bool:
    """Whether it drops tokens of a prompt; one that drops frames does so before there is a prompt."""
    return "prompt" in method.traits.stages and "frames" not in method.traits.stages


def _least(columns: Iterable[Sequence[int]]) -> tuple[int, ...]:
    return tuple(map(min, zip(*columns, strict=True)))
