"""Which questions are put to which scene, so that every type comes about equally often."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from vlmbench.suites._synth.questions import Question, questions
from vlmbench.suites._synth.scene import Scene


def pick(
    scenes: Sequence[Scene],
    k: int,
    types: Sequence[str],
    ask: Callable[[Scene, np.random.Generator], list[Question]] = questions,
) -> list[list[Question]]:
    """Up to `k` of the questions that `ask` finds for each scene: of the types allowed, those asked least so far.

    Deterministic.
    """
    asked: Counter[str] = Counter()
    picked = []
    for scene in scenes:
        rng = np.random.Generator(np.random.PCG64([scene.seed, scene.n_frames, 4]))
        allowed: dict[str, list[Question]] = {kind: [] for kind in types}
        for question in ask(scene, rng):
            if question.type in allowed:
                allowed[question.type].append(question)
        chosen: list[Question] = []
        while len(chosen) < k and (left := [kind for kind in types if allowed[kind]]):
            # Among the types asked least a random one, so that no type always meets the same kind of scene.
            fewest = min(asked[kind] for kind in left)
            level = [kind for kind in left if asked[kind] == fewest]
            kind = level[int(rng.integers(len(level)))]
            question = allowed[kind].pop(int(rng.integers(len(allowed[kind]))))
            # Two draws of `which_first` may name the same events in the same order.
            allowed[kind] = [left for left in allowed[kind] if left != question]
            chosen.append(question)
            asked[kind] += 1
        picked.append(chosen)
    return picked
