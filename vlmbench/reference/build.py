"""What the tiny reference models are made of: word-level tokenizer, processor, chat template, configuration, first weights.

All of it is real Hugging Face classes, so the folder loads like any published checkpoint. A frame of 64×64 pixels gives
8×8 patches of 8 pixels and then 4×4 = 16 tokens: LLaVA-OneVision pools every frame and ends a video with one newline token;
Qwen2.5-VL merges 2×2 patches of two frames at a time, so its 16 tokens stand for a pair of frames.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias

import torch
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from torch import nn
from transformers import (
    GenerationConfig,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.llava_onevision.image_processing_llava_onevision import LlavaOnevisionImageProcessor
from transformers.models.llava_onevision.video_processing_llava_onevision import LlavaOnevisionVideoProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

FRAME = 64
"""Pixels on a side."""
PATCH = 8
TOKENS_PER_UNIT = (FRAME // PATCH // 2) ** 2
"""A unit is what these tokens stand for: one frame of LLaVA-OneVision, a pair of frames of Qwen2.5-VL."""
PAIR = 2
"""Frames of a unit of Qwen2.5-VL."""
TIME_STEP = 2
"""Temporal position ids from one pair of Qwen2.5-VL to the next, at two frames a second."""
HIDDEN = 192
PAD, BOS, EOS, IMAGE, VIDEO, UNK, ANSWER = "<pad>", "<bos>", "<eos>", "<image>", "<video>", "<unk>", "<answer>"
VISION_START, VISION_END = "<vision_start>", "<vision_end>"
ASKED = "?" + ANSWER
"""Every question ends with a question mark, so the mark and the place to answer are one token."""
SPECIAL = (PAD, BOS, EOS, IMAGE, VIDEO, ASKED, UNK, VISION_START, VISION_END)
MEAN_STD = ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])

Model: TypeAlias = LlavaOnevisionForConditionalGeneration | Qwen2_5_VLForConditionalGeneration
LLAVA, QWEN = "tiny-llava-ov", "tiny-qwen2.5-vl"

# Media and text in the order of the message; `<answer>` is where the model begins to speak, `<eos>` where it stops.
CHAT_TEMPLATE = (
    "<bos>{% for message in messages %}"
    "{% if message.role == 'assistant' %}<answer>{% endif %}"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}MEDIUM(<image>){% elif part.type == 'video' %}MEDIUM(<video>)"
    "{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message.role == 'assistant' %}<eos>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<answer>{% endif %}"
)


def chat_template(model: str) -> str:
    """Qwen2.5-VL puts every medium between two tokens of its own."""
    start, end = (VISION_START, VISION_END) if model == QWEN else ("", "")
    return CHAT_TEMPLATE.replace("MEDIUM(", start).replace(")", end)


def make_tokenizer(vocabulary: Iterable[str]) -> PreTrainedTokenizerFast:
    """One token a word, lower case, split at white space; special tokens first, then `vocabulary` in its order."""
    words = [*SPECIAL, *dict.fromkeys(vocabulary)]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNK))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        extra_special_tokens={
            "image_token": IMAGE,
            "video_token": VIDEO,
            "asked_token": ASKED,
            "vision_start_token": VISION_START,
            "vision_end_token": VISION_END,
        },
        padding_side="left",
        model_max_length=32768,
        clean_up_tokenization_spaces=False,
    )


def make_processor(model: str, vocabulary: Iterable[str]) -> Any:
    mean, std = MEAN_STD
    tokenizer = make_tokenizer(vocabulary)
    if model == QWEN:
        options: dict[str, Any] = {
            "patch_size": PATCH,
            "temporal_patch_size": PAIR,
            "merge_size": 2,
            "size": {"shortest_edge": FRAME * FRAME, "longest_edge": FRAME * FRAME},
            "image_mean": mean,
            "image_std": std,
        }
        return Qwen2_5_VLProcessor(
            image_processor=Qwen2VLImageProcessor(**options),
            tokenizer=tokenizer,
            video_processor=Qwen2VLVideoProcessor(**options),
            chat_template=chat_template(model),
        )
    size = {"height": FRAME, "width": FRAME}
    return LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(
            size=size, image_mean=mean, image_std=std, image_grid_pinpoints=[[FRAME, FRAME]]
        ),
        tokenizer=tokenizer,
        video_processor=LlavaOnevisionVideoProcessor(size=size, image_mean=mean, image_std=std),
        num_image_tokens=(FRAME // PATCH) ** 2,
        vision_feature_select_strategy="full",
        chat_template=chat_template(model),
    )


def make_model(model: str, tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> Model:
    """Untrained, float32, on the CPU; the seed decides its weights."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    ends = {"pad_token_id": ids[PAD], "bos_token_id": ids[BOS], "eos_token_id": ids[EOS]}
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": HIDDEN,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
        "tie_word_embeddings": True,
        **ends,
    }
    torch.manual_seed(seed)
    made = _qwen(text, ids, ends) if model == QWEN else _llava(text, ids, ends)
    _first_weights(made.model.language_model)
    made.generation_config = GenerationConfig(**ends, do_sample=False)
    return made.float().eval()


def _llava(text: dict[str, Any], ids: dict[str, int], ends: dict[str, int]) -> LlavaOnevisionForConditionalGeneration:
    vision = SiglipVisionConfig(
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=FRAME,
        patch_size=PATCH,
        vision_use_head=False,
    )
    config = LlavaOnevisionConfig(
        vision_config=vision,
        text_config=Qwen2Config(**text),
        image_token_index=ids[IMAGE],
        video_token_index=ids[VIDEO],
        image_grid_pinpoints=[[FRAME, FRAME]],
        tie_word_embeddings=True,
        **ends,
    )
    return LlavaOnevisionForConditionalGeneration(config)


def _qwen(text: dict[str, Any], ids: dict[str, int], ends: dict[str, int]) -> Qwen2_5_VLForConditionalGeneration:
    vision = {
        "depth": 4,
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_heads": 4,
        "patch_size": PATCH,
        "temporal_patch_size": PAIR,
        "spatial_merge_size": 2,
        "window_size": FRAME // 2,  # four windows a frame, one for each quadrant
        "fullatt_block_indexes": [1, 3],
        "out_hidden_size": HIDDEN,
        "tokens_per_second": TIME_STEP,
    }
    # Time takes the eight fastest of sixteen frequencies: the slowest of them turns once in about a thousand ids.
    text["rope_parameters"] = {**text["rope_parameters"], "mrope_section": [8, 4, 4]}
    config = Qwen2_5_VLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=ids[IMAGE],
        video_token_id=ids[VIDEO],
        vision_start_token_id=ids[VISION_START],
        vision_end_token_id=ids[VISION_END],
        tie_word_embeddings=True,
        **ends,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


@torch.no_grad()
def _first_weights(language: nn.Module, std: float = 0.06, damping: float = 0.15) -> None:
    """Weights chosen in trials of one seed each: from the library's 0.02, look-ups took many more steps.

    Queries start close to the keys of their group, so that a word attends to tokens that hold the same word (the vision
    stage writes words into them), after Trockman & Kolter 2023, "Mimetic Initialization of Self-Attention Layers"; and
    what a layer adds starts small beside what it reads.
    """
    for name, weight in language.named_parameters():
        if weight.dim() == 2:
            weight.normal_(0, std * (damping if name.endswith(("o_proj.weight", "down_proj.weight")) else 1))
        elif name.endswith("bias"):
            weight.zero_()
    for layer in language.layers:  # type: ignore[union-attr]
        query, key = layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight
        groups = key.view(-1, 1, layer.self_attn.head_dim, key.shape[1])
        query.view(groups.shape[0], -1, *groups.shape[2:]).mul_(0.5).add_(groups)


@torch.no_grad()
def match_words(language: nn.Module, words: torch.Tensor, seed: int, key: float = 0.18, value: float = 2.0) -> None:
    """Let one head of layers 3 and 4 attend from a word to where the same word is held, and copy such words from there.

    words: [n, C], their embeddings; n < C. What `_first_weights` does for all words wears off for those that no question
    has needed yet. Keys and queries change in the slower half of the rotary frequencies, which hold over long distances.
    In a trial of one seed look-ups in captions were learned in 300 steps with this, and in as many without it not begun.
    """
    basis = torch.linalg.qr(words.T).Q
    projection = (basis @ basis.T).cpu()
    draw = torch.Generator().manual_seed(seed)
    for layer in language.layers[2:4]:  # type: ignore[index]
        attention = layer.self_attn
        size = attention.head_dim
        groups = attention.k_proj.weight.shape[0] // size
        head = attention.q_proj.weight.shape[0] // size // groups * (groups - 1)  # the first of the last group
        slow = [*range(size // 4, size // 2), *range(3 * size // 4, size)]
        same = torch.zeros(size, words.shape[1])
        same[slow] = torch.randn(len(slow), words.shape[1], generator=draw) * key
        copied = torch.randn(size, words.shape[1], generator=draw) @ projection
        copied *= value / copied.norm()
        attention.q_proj.weight[head * size : (head + 1) * size] += (same @ projection).to(words.device)
        attention.k_proj.weight[-size:] += (same @ projection).to(words.device)
        attention.v_proj.weight[-size:] += copied.to(words.device)
        attention.o_proj.weight[:, head * size : (head + 1) * size] += copied.T.to(words.device)


def save_folder(model: Model, name: str, vocabulary: Iterable[str], folder: Path) -> None:
    """A complete checkpoint folder: what `AutoModelForImageTextToText` and `AutoProcessor` need."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    make_processor(name, vocabulary).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
