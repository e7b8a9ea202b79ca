"""How well does the model answer? Quickly, on computed features; or as users run it, through the processor.

python -m vlmbench.reference.evaluate --folder DIR [--frames 32] [--limit N]
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from vlmbench.reference.data import IGNORED, Pool, make_batch
from vlmbench.reference.stages import answer_logits
from vlmbench.suite import Suite, limited
from vlmbench.suites.synthimage import SynthImage
from vlmbench.suites.synthvideo import SynthVideo
from vlmbench.video import Decoder


@torch.no_grad()
def teacher_forced(
    model: LlavaOnevisionForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    pool: Pool,
    features: torch.Tensor,
    n_clips: int = 120,
    chunk: int = 12,
) -> dict[str, float]:
    """Accuracy by question type over the first clips of the pool.

    A question counts when every token of its answer is the most likely one after the right ones before it, which is
    when greedy decoding gives the answer.
    """
    rng = np.random.default_rng(0)
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for start in range(0, n_clips, chunk):
        clips = np.arange(start, min(start + chunk, n_clips))
        batch = make_batch(pool, clips, tokenizer, rng, n_pairs=16).to(model.device)
        wanted = batch.labels[:, 1:] != IGNORED
        wrong = answer_logits(model, features, batch).argmax(-1) != batch.labels[:, 1:][wanted]
        row = torch.arange(len(clips), device=model.device)[:, None].expand_as(wanted)[wanted]
        missed = {(int(b), int(k)) for b, k in zip(row[wrong], batch.part[:, 1:][wanted][wrong], strict=True)}
        for b, types in enumerate(batch.types):
            asked.update(types)
            right.update(kind for k, kind in enumerate(types, 1) if (b, k) not in missed)
    return {kind: right[kind] / asked[kind] for kind in sorted(asked)}


def prompt_of(
    processor: Any, question: str, clip: np.ndarray | None, kind: str = "video"
) -> Mapping[str, torch.Tensor]:
    """Model inputs for one question behind one clip (uint8 [T, H, W, 3]; a picture has T = 1), as a user makes them."""
    content = [{"type": kind}] if clip is not None else []
    message = {"role": "user", "content": [*content, {"type": "text", "text": question}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True)
    if clip is None:
        return processor(text=[text], return_tensors="pt")
    if kind == "image":
        return processor(text=[text], images=[clip[0]], return_tensors="pt")
    return processor(text=[text], videos=[clip], do_sample_frames=False, return_tensors="pt")


@torch.no_grad()
def answer(model: Any, processor: Any, question: str, clip: np.ndarray | None, kind: str = "video") -> str:
    """Greedy decoding of one answer."""
    inputs = prompt_of(processor, question, clip, kind)
    tokens = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    return processor.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def through_processor(folder: Path, suite: Suite, limit: int | None = None) -> dict[str, tuple[float, int]]:
    """(right, asked) by question type, on the suite's test files, each decoded in full, by a checkpoint folder."""
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    counts: dict[str, tuple[float, int]] = {}
    with Decoder() as decoder:
        for sample in limited(suite.samples("test"), limit):
            suite.materialise(sample)
            (media,) = sample.media
            clip = decoder.read(media.path, kind=media.kind, frames=None, rule=suite.default_sampler)
            said = answer(model, processor, suite.prompt(sample), clip.frames, media.kind)
            right, asked = counts.get(sample.strata["type"], (0.0, 0))
            counts[sample.strata["type"]] = right + suite.score(sample, said).value, asked + 1
    return dict(sorted(counts.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description="Accuracy of a reference checkpoint on the test split, by type.")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--frames", type=int, default=32, help="length of the videos; 0 for pictures")
    parser.add_argument("--limit", type=int)
    args = parser.parse_args()
    suite = SynthVideo(length=args.frames) if args.frames else SynthImage()
    counts = through_processor(args.folder, suite, args.limit)
    print(json.dumps({kind: [right, asked, round(right / asked, 3)] for kind, (right, asked) in counts.items()}))


if __name__ == "__main__":
    main()
