"""Turbo: vision-tower tokens that are duplicated and unimportant merge, block by block (arXiv 2407.11717).

Between attention and MLP of every block, `r` tokens of each picture or frame go into the token that they are most alike.
Which ones: those with the largest mutual redundancy (cosine of their keys) minus semantic value (`alpha` · `c` times the
attention they receive). A merged token counts as often as it has mass, in averages and in attention. Nothing is trained.

With ``mode=unmerge`` the language model reads every token, merged ones as copies; with ``mode=drop`` it reads no copy.
``where=last`` is FOLDER (arXiv 2501.02430): all of it at the last block.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from vlmbench.errors import UsageError
from vlmbench.method import Citation, Method, Traits, VisionWork, Work

if TYPE_CHECKING:
    from vlmbench.layout import Prompt
    from vlmbench.models.base import Inputs, ModelAdapter, Shapes
    from vlmbench.patch import Patcher
    from vlmbench.trace import Trace
    from vlmbench.turbo_plan import Rule
    from vlmbench.turbo_vision import Seen


class Clipped(UserWarning):
    """Blocks were asked to merge more tokens than one matching can."""


@dataclass(frozen=True)
class Turbo(Method):
    """`r` tokens of a picture (or frame) in every block, `schedule` a number for each block instead (``16/16/8``).

    `inflection` tilts a constant r. `score` is the ablation: redundancy alone is ToMe, value alone ranks by attention. `c` is
    the published constant; `beta` and `gamma` its published decay over depth, off. `normalise` counts attention in multiples
    of its mean (by default where a tower has no class token). `text_step` above 0 (published: 0.07) also drops visual tokens
    from language layer to language layer.
    """

    name: ClassVar[str] = "turbo"
    cite: ClassVar[Citation] = Citation(
        "Turbo: Informativity-Driven Acceleration Plug-In for Vision-Language Large Models",
        "2407.11717",
        faithful="informativity as a difference, matching by parity, mass and proportional attention, order of tokens, cap, "
        "class-token importance where a tower has one; FOLDER's repeated passes (2501.02430)",
        extension="column-mean importance, normalised by length, for towers without a class token; 2×2 units that merge "
        "inside their window, r spread over windows by size, with the destination's rotation; drop: the destination's "
        "placeholder stays, LLaVA's tokens merge behind the pooling by their own features; shared and temporal video; "
        "text side: the question's attention in the place of cross-attention; LLaVA as BLIP (the authors' port for it has "
        "c=100 and, as it never hands mass to attention, proportional=off)",
    )
    traits: ClassVar[Traits] = Traits(stages=frozenset({"vision"}), takes=frozenset({"tower"}), prefix_reusable=True)

    r: int = 16
    alpha: float = 5.0
    c: float = 30.0
    mode: Literal["unmerge", "drop"] = "unmerge"
    video: Literal["per_frame", "shared", "temporal"] = "per_frame"
    min_tokens: int = 40
    where: Literal["layers", "last"] = "layers"
    score: Literal["both", "redundancy", "value"] = "both"
    schedule: tuple[int, ...] = ()
    inflection: float = 0.0
    beta: float = 1.0
    gamma: float = 0.0
    proportional: bool = True
    normalise: bool | None = None
    text_step: float = 0.0

    def __post_init__(self) -> None:
        for key in ("r", "alpha", "c", "beta", "min_tokens"):
            if getattr(self, key) < 0:
                raise UsageError(f"turbo:{key} must be at least 0, not {getattr(self, key)}.")
        if any(each < 0 for each in self.schedule):
            raise UsageError(f"turbo:schedule must hold numbers of at least 0, not {_listed(self.schedule)}.")
        if not -1 <= self.inflection <= 1:
            raise UsageError(f"turbo:inflection must be from -1 to 1, not {self.inflection}.")
        if self.schedule and self.inflection:
            raise UsageError(
                f"turbo:inflection={self.inflection} tilts a constant r, and schedule={_listed(self.schedule)} gives a number "
                f"for each block; give one of the two."
            )
        if not 0 <= self.text_step < 1:
            raise UsageError(f"turbo:text_step must be at least 0 and below 1 (published: 0.07), not {self.text_step}.")
        if self.video == "temporal" and self.mode == "unmerge":
            raise UsageError(
                "turbo:video=temporal merges what the language model reads; give mode=drop too, not unmerge."
            )
        if self.score == "value" and not self.alpha * self.c:
            raise UsageError("turbo:score=value needs alpha and c above 0; give score=redundancy to leave value out.")
        # What a setting touches, and whether its keys depend on the question, is a matter of its parameters.
        stages = {"vision"} | ({"prompt"} if self.mode == "drop" else set())
        stages |= {"prefill", "decode"} if self.text_step else set()
        takes = {"tower"} | ({"attention", "cache"} if self.text_step else set())
        traits = replace(
            type(self).traits,
            stages=frozenset(stages),
            takes=frozenset(takes),
            prefix_reusable=not self.text_step,
        )
        object.__setattr__(self, "traits", traits)

    @classmethod
    def examples(cls) -> list[Turbo]:
        return [
            cls(r=4, min_tokens=0),
            cls(r=4, min_tokens=0, mode="drop"),
            cls(r=4, min_tokens=0, mode="drop", video="shared", score="redundancy"),
            cls(r=4, min_tokens=0, mode="drop", video="temporal"),
            cls(r=5, mode="drop", where="last", score="value"),
            cls(r=4, min_tokens=0, text_step=0.2),
        ]

    @classmethod
    def neutral(cls) -> Turbo:
        return cls(r=0, mode="drop")

    def check(self, adapter: ModelAdapter) -> None:
        from vlmbench.turbo_vision import tower_of

        tower = tower_of(adapter)
        if tower.reader == "cross-attention" and (self.text_step or self.video != "per_frame"):
            raise UsageError(
                f"turbo:text_step={self.text_step},video={self.video} act on visual tokens in a prompt, which "
                f"{adapter.config.model_type} has none of; leave them out."
            )
        if len(self.schedule) > len(tower.blocks):
            raise UsageError(
                f"turbo:schedule={_listed(self.schedule)} has {len(self.schedule)} numbers, and the vision tower has "
                f"{len(tower.blocks)} blocks; give one for each block at most."
            )
        rule = self._rule(len(tower.blocks), class_token=bool(tower.protected))
        if (block := rule.overflows()) is not None:
            raise UsageError(
                f"turbo:alpha={self.alpha},c={self.c},beta={self.beta},gamma={self.gamma} weigh attention by more than a score "
                f"can hold in block {block} of {len(tower.blocks)}; give smaller ones: gamma is a block, and beta at most 1."
            )
        asked = sum(rule.schedule)
        if self.where == "last" and tower.tokens is not None and asked >= tower.tokens - tower.protected:
            most = tower.tokens - tower.protected - 1
            remedy = (
                f"its sum must be at most {most}" if self.schedule else f"r must be at most {most // len(tower.blocks)}"
            )
            raise UsageError(
                f"turbo:where=last with {_asked(self)} would merge {asked} of {tower.tokens} tokens and leave none; "
                f"{remedy} on this model."
            )

    def install(self, patch: Patcher, trace: Trace) -> None:
        from vlmbench import turbo_text
        from vlmbench.turbo_vision import Plans, Seen, tower_of, watch

        adapter = patch.adapter
        tower = tower_of(adapter)
        rule = self._rule(len(tower.blocks), class_token=bool(tower.protected))
        behind = {"video"} if self.video == "temporal" else set()
        if self.mode == "drop" and self.where == "last" and tower.reader == "grid" and tower.visual is None:
            behind = {"image", "video"}  # in one place, and that is behind the pooling
        plans = Plans(tower, rule, frozenset(behind))
        widths = tower.widths()
        newline = adapter.model.model.image_newline.detach() if tower.reader == "grid" and not tower.visual else None
        stock = adapter.encode_vision
        told = False

        def encode_vision(inputs: Inputs) -> object:
            trace.scratch["turbo"] = Seen(widths, tower.units_are_tokens, rule, newline)
            return stock(inputs)

        def begin(call: object) -> None:
            nonlocal told
            if "turbo" in trace.scratch:
                trace.scratch["turbo"].calls.append(call)
            clipped = call.asked.clipped  # type: ignore[attr-defined]
            if clipped and not told:
                told = True
                warnings.warn(_clipped_text(self, clipped), Clipped, stacklevel=2)

        patch.attr(adapter, "encode_vision", encode_vision)
        drop = self.mode == "drop"
        watch(patch, tower, plans, begin, report=drop and bool(behind or not tower.units_are_tokens), drop=drop)
        if self.text_step:
            turbo_text.install(patch, self.text_step)

    def prepare(self, prompt: Prompt, trace: Trace) -> Prompt:
        from vlmbench.turbo_language import shorten

        n = prompt.layout.n_visual
        if not n:
            trace.inactive("the prompt has no visual tokens")
            return prompt
        seen: Seen | None = trace.scratch.get("turbo")
        if seen is None:
            if self.mode == "drop":
                raise UsageError(
                    "turbo:mode=drop chooses tokens in the vision tower, which has not run here; use vlmbench run."
                )
            return prompt
        seen.note(trace)
        if self.mode == "drop":
            prompt, trace.kept["prompt"] = shorten(prompt, seen, seen.rule, temporal=self.video == "temporal")
        if not (self.text_step or seen.acts or prompt.layout.n_visual < n):
            trace.inactive(self._idle(seen))
        return prompt

    def work(self, prompt: Prompt, shapes: Shapes, trace: Trace) -> Work:
        from vlmbench.turbo_text import scoring_flops, visual_left

        work = super().work(prompt, shapes, trace)
        if self.text_step and prompt.layout.n_visual:
            text = prompt.length - prompt.layout.n_visual
            tokens = [text + n for n in visual_left(prompt.layout.n_visual, shapes.layers, self.text_step)]
            work = replace(
                work,
                tokens=tuple(tokens),
                pairs=tuple(n * (n + 1) // 2 for n in tokens),
                own_flops=scoring_flops(prompt.layout, shapes, self.text_step),
            )
        vision = trace.facts.get("vision")
        return work if vision is None else replace(work, vision=VisionWork(vision["flops"], vision["dense_flops"]))

    def _numbers(self, blocks: int) -> tuple[int, ...]:
        from vlmbench.kernels.token_merge.schedule import schedule

        return schedule(self.schedule or self.r, blocks, self.inflection)

    def _rule(self, blocks: int, *, class_token: bool) -> Rule:
        from vlmbench.turbo_plan import Rule

        return Rule(
            schedule=self._numbers(blocks),
            alpha=self.alpha,
            c=self.c,
            beta=self.beta,
            gamma=self.gamma,
            min_tokens=self.min_tokens,
            score=self.score,
            proportional=self.proportional,
            normalise=not class_token if self.normalise is None else self.normalise,
            shared=self.video == "shared",
            once=self.where == "last",
        )

    def _idle(self, seen: Seen) -> str:
        if not sum(seen.rule.schedule):
            return "r is 0"
        plan = seen.calls[0].asked
        tokens = plan.media[0].units * plan.unit
        if tokens < self.min_tokens and not seen.rule.once:
            return f"pictures of {tokens} tokens are below min_tokens={self.min_tokens}"
        return f"{_asked(self)} is less than a unit of {plan.unit} tokens in every group of a picture of {tokens}"


def _listed(numbers: tuple[int, ...]) -> str:
    return "/".join(map(str, numbers))


def _asked(method: Turbo) -> str:
    return f"schedule={_listed(method.schedule)}" if method.schedule else f"r={method.r}"


def _clipped_text(method: Turbo, clipped: list[tuple[int, int, int]]) -> str:
    blocks = ", ".join(str(block) for block, _, _ in clipped)
    return (
        f"turbo:{_asked(method)} is above what one matching can merge (half of the tokens) in blocks {blocks}; it is "
        "clipped there."
    )
