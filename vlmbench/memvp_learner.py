"""What is trained beside a frozen language model, and how it reads a question: MemVP's memory, and the form of its rivals."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vlmbench.layout import Prompt
from vlmbench.memvp_data import Material, Question, Taught, teach
from vlmbench.memvp_memory import Memory, Slots, VisualMemory, lay_out
from vlmbench.memvp_prompt import add_memory, text_alone, text_tokens, units_of
from vlmbench.patch import Patcher

if TYPE_CHECKING:
    from vlmbench.models.base import ModelAdapter


class Learner(ABC):
    """What is trained beside a frozen language model, and how it reads a question."""

    def __init__(self, adapter: ModelAdapter, material: Material) -> None:
        self.adapter, self.material = adapter, material

    @property
    @abstractmethod
    def parameters(self) -> dict[str, nn.Parameter]:
        """Everything that is trained, in float32."""

    @abstractmethod
    def attached(self) -> AbstractContextManager[Any]:
        """The model with what is trained on it."""

    @abstractmethod
    def prompts(self, questions: Sequence[Question]) -> list[Prompt]:
        """What the language model reads; called before every pass."""

    @abstractmethod
    def train(self, mode: bool) -> None:
        """Dropout on or off."""

    def rate(self, name: str) -> float:
        """Learning rate of one of the parameters over the recipe's."""
        return 1.0

    def teach(self, questions: Sequence[Question]) -> Taught:
        return teach(self.adapter, self.prompts(questions), [question.answer for question in questions])

    @torch.no_grad()
    def answered(self, questions: Sequence[Question], batch: int) -> list[float]:
        """1 where every token of the answer is right, given those before it; called while attached."""
        self.train(False)
        parts = [questions[i : i + batch] for i in range(0, len(questions), batch)]
        right = [float(each) for part in parts for each in self.teach(part).answered(len(part))]
        self.train(True)
        return right


class MemoryLearner(Learner):
    """MemVP: the text alone is read, and the picture is memory."""

    def __init__(self, adapter: ModelAdapter, material: Material, memory: VisualMemory) -> None:
        super().__init__(adapter, material)
        self.memory = memory
        self.held: Memory | None = None
        """What the batch in hand reads."""
        self._slots: dict[int, Slots] = {}

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.memory.named_parameters())

    @contextmanager
    def attached(self) -> Iterator[None]:
        with Patcher(self.adapter) as patch:
            add_memory(patch, self.memory, lambda: self.held)
            yield

    def train(self, mode: bool) -> None:
        self.memory.train(mode)

    def prompts(self, questions: Sequence[Question]) -> list[Prompt]:
        self.held = None  # what was held is of another batch, and the tower must not read it
        self.held = self.memory([self.slots_of(question) for question in questions])
        embed = self.adapter.model.get_input_embeddings()
        found = []
        for question in questions:
            keep = text_tokens(question.prompt).to(question.ids.device)
            text = text_alone(question.prompt)
            found.append(dataclasses.replace(text, embeds=embed(question.ids[None, keep])))
        return found

    def slots_of(self, question: Question) -> Slots:
        """Laid out once a picture, unless the tower is trained too."""
        if question.media in self._slots:
            return self._slots[question.media]
        prompt = self.material.whole(self.adapter, question)
        shape = self.memory.shape
        slots = lay_out(units_of(prompt), shape.slots, shape.units, prompt.embeds)
        if not shape.vision_blocks:
            self._slots[question.media] = slots
        return slots
