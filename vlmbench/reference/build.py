"""What the tiny reference model is made of: word-level tokenizer, processor, chat template, configuration.

All of it is real Hugging Face classes, so the folder loads like any published checkpoint. A frame of 64×64 pixels gives
8×8 patches of 8 pixels, pooled by LLaVA-OneVision to 4×4 = 16 tokens; one newline token closes a video.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    GenerationConfig,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.llava_onevision.image_processing_llava_onevision import LlavaOnevisionImageProcessor
from transformers.models.llava_onevision.video_processing_llava_onevision import LlavaOnevisionVideoProcessor

FRAME = 64
"""Pixels on a side."""
PATCH = 8
TOKENS_PER_FRAME = (FRAME // PATCH // 2) ** 2
IMAGE_TOKENS = 2 * (FRAME // PATCH) ** 2 + FRAME // PATCH
"""Of one picture, not pooled: the whole, its only tile and a newline after each row of that."""
PAD, BOS, EOS, IMAGE, VIDEO, UNK, ANSWER = "<pad>", "<bos>", "<eos>", "<image>", "<video>", "<unk>", "<answer>"
ASKED = "?" + ANSWER
"""Every question ends with a question mark, so the mark and the place to answer are one token."""
SPECIAL = (PAD, BOS, EOS, IMAGE, VIDEO, ASKED, UNK)
MEAN_STD = ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])

# Media and text in the order of the message; `<answer>` is where the model begins to speak, `<eos>` where it stops.
CHAT_TEMPLATE = (
    "<bos>{% for message in messages %}"
    "{% if message.role == 'assistant' %}<answer>{% endif %}"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% elif part.type == 'video' %}<video>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message.role == 'assistant' %}<eos>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<answer>{% endif %}"
)


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
        extra_special_tokens={"image_token": IMAGE, "video_token": VIDEO, "asked_token": ASKED},
        padding_side="left",
        model_max_length=32768,
        clean_up_tokenization_spaces=False,
    )


def make_processor(vocabulary: Iterable[str]) -> LlavaOnevisionProcessor:
    mean, std = MEAN_STD
    size = {"height": FRAME, "width": FRAME}
    return LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(
            size=size, image_mean=mean, image_std=std, image_grid_pinpoints=[[FRAME, FRAME]]
        ),
        tokenizer=make_tokenizer(vocabulary),
        video_processor=LlavaOnevisionVideoProcessor(size=size, image_mean=mean, image_std=std),
        num_image_tokens=(FRAME // PATCH) ** 2,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlavaOnevisionForConditionalGeneration:
    """Untrained, float32, on the CPU; the seed decides its weights."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    vision = SiglipVisionConfig(
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=FRAME,
        patch_size=PATCH,
        vision_use_head=False,
    )
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        tie_word_embeddings=True,
        pad_token_id=ids[PAD],
        bos_token_id=ids[BOS],
        eos_token_id=ids[EOS],
    )
    config = LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=ids[IMAGE],
        video_token_index=ids[VIDEO],
        image_grid_pinpoints=[[FRAME, FRAME]],
        tie_word_embeddings=True,
        pad_token_id=ids[PAD],
        bos_token_id=ids[BOS],
        eos_token_id=ids[EOS],
    )
    torch.manual_seed(seed)
    model = LlavaOnevisionForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        pad_token_id=ids[PAD], bos_token_id=ids[BOS], eos_token_id=ids[EOS], do_sample=False
    )
    return model.float().eval()


def save_folder(model: LlavaOnevisionForConditionalGeneration, vocabulary: Iterable[str], folder: Path) -> None:
    """A complete checkpoint folder: what `AutoModelForImageTextToText` and `AutoProcessor` need."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    make_processor(vocabulary).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
