"""The commonest training answer of the question's template: what can be had without looking at the sample."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from vlmbench.method import Citation, Method, Traits

if TYPE_CHECKING:
    from vlmbench.suite import Sample, Suite


@dataclass(frozen=True)
class Prior(Method):
    """Never calls the model. Ties go to the answer that sorts first; an unseen template gets an empty answer."""

    name: ClassVar[str] = "prior"
    cite: ClassVar[Citation] = Citation("majority-answer control", extension="the whole method")
    traits: ClassVar[Traits] = Traits(sees_vision=False, uses_model=False)

    _answers: dict[str, str] = field(default_factory=dict, init=False, compare=False, repr=False)

    def fit(self, suite: Suite) -> None:
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for sample in suite.samples("train"):
            counts[sample.template][sample.answer] += 1
        for template, answers in counts.items():
            self._answers[template] = min(answers, key=lambda answer: (-answers[answer], answer))

    def fitted(self) -> dict[str, Any]:
        text = json.dumps(self._answers, sort_keys=True)
        return {"fitted": hashlib.sha256(text.encode()).hexdigest()[:10]}

    def answer(self, sample: Sample) -> str:
        return self._answers.get(sample.template, "")
