"""MemVP's rival: low-rank updates (LoRA, arXiv 2106.09685) of the language model's linear layers, alone or beside memory."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vlmbench.layout import Prompt
from vlmbench.memvp_data import Material, Question
from vlmbench.memvp_learner import Learner, MemoryLearner

if TYPE_CHECKING:
    from vlmbench.models.base import ModelAdapter

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Lora:
    """Low-rank updates of every linear layer of the language model, in place until `close`."""

    def __init__(self, adapter: ModelAdapter, budget: int, seed: int) -> None:
        """The rank whose parameters come nearest to `budget`."""
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel

        linears = [m for name, m in adapter.text.named_modules() if name.rpartition(".")[2] in TARGETS]
        self.rank = max(1, round(budget / sum(each.in_features + each.out_features for each in linears)))
        config = LoraConfig(r=self.rank, lora_alpha=2 * self.rank, lora_dropout=0.0, target_modules=list(TARGETS))
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self._tuned = LoraModel(adapter.text, config, "default")
        self.parameters: dict[str, nn.Parameter] = {
            f"lora.{name}": p for name, p in adapter.text.named_parameters() if ".lora_" in name
        }

    def close(self) -> None:
        """Every linear layer as it was."""
        self._tuned.unload()


class LoraLearner(Learner):
    """The aligned model with its visual tokens in the prompt."""

    def __init__(self, adapter: ModelAdapter, material: Material, lora: Lora) -> None:
        super().__init__(adapter, material)
        self._lora = lora

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return self._lora.parameters

    def attached(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def prompts(self, questions: Sequence[Question]) -> list[Prompt]:
        return [self.material.whole(self.adapter, question) for question in questions]

    def train(self, mode: bool) -> None:
        """No dropout."""


class BothLearner(MemoryLearner):
    """MemVP, and low-rank updates of what reads it."""

    def __init__(
        self, adapter: ModelAdapter, material: Material, memory: Any, lora: Lora, lora_rate: float = 1.0
    ) -> None:
        """`lora_rate` is the learning rate of the updates over the memory's."""
        super().__init__(adapter, material, memory)
        self._lora, self._lora_rate = lora, lora_rate

    def rate(self, name: str) -> float:
        return self._lora_rate if name in self._lora.parameters else 1.0

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return {**super().parameters, **self._lora.parameters}
