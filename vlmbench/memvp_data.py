"""What MemVP and its rivals learn from: the train questions as tokens, each picture through the frozen tower once.

A batch is teacher-forced in one pass; the loss is on the answers, and on what ends them, alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmbench.errors import RunError
from vlmbench.layout import Prompt
from vlmbench.models.base import Features, Inputs

if TYPE_CHECKING:
    from vlmbench.fitting import Fitting
    from vlmbench.models.base import ModelAdapter

HELD_OUT = 10
"""Every tenth video or picture is held out, to see what is learned rather than remembered…"""
MOST_HELD_OUT = 200
"""… and so many of its questions are asked at most."""


class Question(NamedTuple):
    """One train question."""

    prompt: Prompt
    """As the model reads it, but without embeddings (``[1, N, 0]``)."""
    ids: Tensor
    """int64 ``[N]``, placeholders included."""
    answer: Tensor
    """int64 ``[A]``, with the token that ends it."""
    media: int
    """Row of `Material.pictures`."""
    cluster: str
    id: str = ""
    """Of the sample."""


@dataclass(frozen=True)
class Material:
    """Everything that is trained on."""

    questions: Sequence[Question]
    held_out: Sequence[Question]
    pictures: Sequence[Tensor | Inputs]
    """Of each distinct set of media what the language model reads, ``[n, C]`` (separators included), or, where the tower is
    trained too, what the processor made of it."""
    data_hash: str

    def whole(self, adapter: ModelAdapter, question: Question) -> Prompt:
        """The prompt with its embeddings."""
        picture = self.pictures[question.media]
        if not isinstance(picture, Tensor):
            return adapter.splice({**picture, "input_ids": question.ids[None]}, adapter.encode_vision(picture))
        embeds = adapter.model.get_input_embeddings()(question.ids[None])
        places = question.prompt.layout.indices("video", "image", "separator").to(embeds.device)
        return replace(question.prompt, embeds=embeds.index_copy(1, places, picture[None].to(embeds.dtype)))


def collect(fitting: Fitting, *, cached: bool) -> Material:
    """Raises `RunError` when no train question can be used. `cached`: features instead of what they are made from."""
    adapter, session = fitting.adapter, fitting.session
    progress = session.progress
    progress.start(len(fitting.samples), "features", "question")
    found: list[Question] = []
    pictures: list[Tensor | Inputs] = []
    last: tuple[str, Inputs, int] | None = None
    digest = hashlib.sha256(session.suite.data_hash.encode())
    error = ""
    for sample in fitting.samples:
        record = session.blank(sample, "accuracy")
        clips = session.clips(sample, record)
        progress.advance()
        if clips is None:
            error = record.error
            continue
        asked = session.asked(sample, clips)
        key = repr((sample.media, asked.captions))
        behind = adapter.text_ids(clips, asked.question, asked.captions)[1]
        with torch.no_grad():
            if last is not None and last[0] == key:  # the same pictures: nothing but the text behind them is another
                _, inputs, n_behind = last
                ids = inputs["input_ids"]
                text = torch.tensor([behind], device=ids.device)
                inputs = {**inputs, "input_ids": torch.cat([ids[:, : ids.shape[1] - n_behind], text], 1)}
                prompt = adapter.splice(inputs, Features())
            else:
                inputs = adapter.to_device(adapter.inputs(clips, asked.question, asked.captions))
                prompt = adapter.splice(inputs, adapter.encode_vision(inputs) if cached else Features())
                places = prompt.layout.indices("video", "image", "separator").to(prompt.embeds.device)
                pictures.append(prompt.embeds[0, places] if cached else inputs)
        last = key, inputs, len(behind)
        answer = adapter.processor.tokenizer(sample.answer, add_special_tokens=False)["input_ids"]
        ended = torch.tensor([*answer, end_of_answer(adapter)], device=adapter.device)
        bare = replace(prompt, embeds=prompt.embeds[..., :0])
        found.append(Question(bare, inputs["input_ids"][0], ended, len(pictures) - 1, sample.cluster, sample.id))
        digest.update(json.dumps([sample.id, asked.question, sample.answer]).encode())
    progress.finish()
    if not found:
        raise RunError(f"None of {len(fitting.samples)} train questions can be used; the last one: {error}")
    clusters = list(dict.fromkeys(question.cluster for question in found))
    kept_back = set(clusters[HELD_OUT - 1 :: HELD_OUT])
    return Material(
        questions=[each for each in found if each.cluster not in kept_back],
        held_out=[each for each in found if each.cluster in kept_back][:MOST_HELD_OUT],
        pictures=pictures,
        data_hash=digest.hexdigest()[:10],
    )


def end_of_answer(adapter: ModelAdapter) -> int:
    """The token that ends an answer: the tokenizer's own, if the model stops at it."""
    own = adapter.processor.tokenizer.eos_token_id
    return own if own in adapter.eos_ids else min(adapter.eos_ids)


class Taught(NamedTuple):
    """What the model says at the places of the answers' tokens."""

    logits: Tensor
    """``[A, V]`` over the whole batch."""
    wanted: Tensor
    """int64 ``[A]``."""
    row: Tensor
    """int64 ``[A]``: which question it belongs to."""

    @property
    def loss(self) -> Tensor:
        return F.cross_entropy(self.logits.float(), self.wanted)

    def answered(self, n: int) -> Tensor:
        """bool ``[n]``: every token of the answer right, given those before it."""
        wrong = self.logits.argmax(-1) != self.wanted
        return torch.zeros(n, device=wrong.device).index_add(0, self.row, wrong.float()) == 0


def teach(adapter: ModelAdapter, prompts: Sequence[Prompt], answers: Sequence[Tensor]) -> Taught:
    """One pass over prompts and answers, padded on the right, where causal attention never looks."""
    embed = adapter.model.get_input_embeddings()
    lengths = [prompt.length + len(answer) - 1 for prompt, answer in zip(prompts, answers, strict=True)]
    longest, device = max(lengths), adapter.device
    rows, places = [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        said = embed(answer[None, :-1]).to(prompt.embeds.dtype)
        after = prompt.next_position + torch.arange(len(answer) - 1, device=device)
        position = torch.cat([prompt.positions, after.expand(*prompt.positions.shape[:-1], -1)], -1)
        room = longest - position.shape[-1]
        rows.append(F.pad(torch.cat([prompt.embeds, said], 1), (0, 0, 0, room)))
        places.append(F.pad(position, (0, room)))
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long().to(device)
    hidden = adapter.text(
        inputs_embeds=torch.cat(rows),
        attention_mask=mask,
        position_ids=torch.cat(places, -2),
        use_cache=False,
    ).last_hidden_state
    row = torch.cat([torch.full((len(answer),), i) for i, answer in enumerate(answers)]).to(device)
    column = torch.cat(
        [torch.arange(len(answer)) + prompt.length - 1 for prompt, answer in zip(prompts, answers, strict=True)]
    ).to(device)
    return Taught(adapter.model.lm_head(hidden[row, column]), torch.cat(list(answers)), row)
