"""How well does the model answer while it learns? Quickly, on computed features. (Whole suites: `vlmbench run`.)"""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from vlmbench.reference.build import Model
from vlmbench.reference.data import IMAGE, Pool
from vlmbench.reference.lessons import answer_logits, ask_all, hidden_states
from vlmbench.reference.prompts import IGNORED, image_prefix, make_batch, video_prefix


@torch.no_grad()
def teacher_forced(
    model: Model,
    name: str,
    tokenizer: PreTrainedTokenizerFast,
    pool: Pool,
    features: torch.Tensor,
    with_text: bool = False,
    tokens: int = 12_000,
) -> dict[str, float]:
    """Accuracy by question type over the clips of the pool; `tokens` visual tokens at a time.

    A question counts when every token of its answer is the most likely one after the right ones before it, which is
    when greedy decoding gives the answer.
    """
    rng = np.random.default_rng(0)
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    flat = features if pool.kind == IMAGE else features.flatten(1, 2)  # [N, n, C]
    prefix = image_prefix(name) if pool.kind == IMAGE else video_prefix(name, features.shape[1], with_text)
    chunk = max(1, tokens // flat.shape[1])
    for start in range(0, len(pool.scenes), chunk):
        scenes = list(pool.scenes[start : start + chunk])
        questions, texts = ask_all(scenes, with_text, 16, rng)
        batch = make_batch(prefix, questions, tokenizer, texts).to(model.device)
        wanted = batch.labels[:, 1:] != IGNORED
        hidden = hidden_states(model, flat[start : start + chunk].to(model.device), batch)[-1]
        logits = answer_logits(model, hidden, batch)
        wrong = logits.argmax(-1) != batch.labels[:, 1:][wanted]
        row = torch.arange(len(scenes), device=model.device)[:, None].expand_as(wanted)[wanted]
        missed = {(int(b), int(k)) for b, k in zip(row[wrong], batch.part[:, 1:][wanted][wrong], strict=True)}
        for b, types in enumerate(batch.types):
            asked.update(types)
            right.update(kind for k, kind in enumerate(types, 1) if (b, k) not in missed)
    return {kind: right[kind] / asked[kind] for kind in sorted(asked)}
