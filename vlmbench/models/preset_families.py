"""What a preset is made of: each family's configuration, class and processor, from sizes alone.

A family's function returns (configuration, class, function that makes the processor). The processors are the real Hugging
Face classes with the published numbers. Their tokenizer is byte-level without merges, since the published vocabularies
cannot be made from nothing: text comes out some four times longer, vision tokens exact.
"""

from __future__ import annotations

from typing import Any

from transformers import (
    BlipConfig,
    BlipImageProcessor,
    BlipProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessor,
    LlavaNextImageProcessor,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaNextVideoProcessor,
    LlavaNextVideoVideoProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

QWEN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% for c in m['content'] %}"
    "{% if c['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAVA_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }} "
    "{% for c in m['content'] %}"
    "{% if c['type'] == 'video' %}<video>{% elif c['type'] == 'image' %}<image>{% else %}\n{{ c['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

VICUNA_TEMPLATE = (
    "{% for m in messages %}{{ m['role'].upper() }}: "
    "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }} {% else %}<{{ c['type'] }}>\n{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def byte_tokenizer(vocab_size: int, special: list[str]) -> PreTrainedTokenizerFast:
    """256 byte tokens, then the special ones; any text round-trips."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    if len(tokenizer) > vocab_size:
        raise ValueError(f"a vocabulary of {vocab_size} cannot hold {len(tokenizer)} tokens")
    return tokenizer


def qwen(two_five: bool, vocab: int, text: dict[str, Any], vision: dict[str, Any], pixels: tuple[int, int]) -> Any:
    special = ["<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = byte_tokenizer(vocab, special)
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in special}
    common = {
        "text_config": {"vocab_size": vocab, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, **text},
        "vision_config": vision,
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
    }
    size = {"shortest_edge": pixels[0], "longest_edge": pixels[1]}

    def processor() -> Any:
        return (Qwen2_5_VLProcessor if two_five else Qwen2VLProcessor)(
            image_processor=Qwen2VLImageProcessor(size=size),
            video_processor=Qwen2VLVideoProcessor(size=size, cap_pixels_per_frame=False),
            tokenizer=tokenizer,
            chat_template=QWEN_TEMPLATE,
        )

    if two_five:
        return Qwen2_5_VLConfig(**common), Qwen2_5_VLForConditionalGeneration, processor
    return Qwen2VLConfig(**common), Qwen2VLForConditionalGeneration, processor


def llava_onevision(vocab: int, text: dict[str, Any], vision: dict[str, Any], pinpoints: list[list[int]]) -> Any:
    special = ["<|im_start|>", "<image>", "<video>"]
    tokenizer = byte_tokenizer(vocab, special)
    side = vision["image_size"]
    config = LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", "vocab_size": vocab, "eos_token_id": tokenizer.eos_token_id, **text},
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **vision},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=pinpoints,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    size = {"height": side, "width": side}

    def processor() -> Any:
        return LlavaOnevisionProcessor(
            image_processor=LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=pinpoints),
            video_processor=LlavaOnevisionVideoProcessor(size=size),
            tokenizer=tokenizer,
            num_image_tokens=(side // vision["patch_size"]) ** 2,
            vision_feature_select_strategy="full",
            chat_template=LLAVA_TEMPLATE,
        )

    return config, LlavaOnevisionForConditionalGeneration, processor


def llava_15(vocab: int, text: dict[str, Any], vision: dict[str, Any]) -> Any:
    tokenizer = byte_tokenizer(vocab, ["<image>"])
    side, patch = vision["image_size"], vision["patch_size"]
    config = LlavaConfig(
        text_config={"model_type": "llama", "vocab_size": vocab, "eos_token_id": tokenizer.eos_token_id, **text},
        vision_config={"model_type": "clip_vision_model", **vision},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(side // patch) ** 2,
    )

    def processor() -> Any:
        return LlavaProcessor(
            image_processor=LlavaImageProcessor(
                size={"shortest_edge": side}, crop_size={"height": side, "width": side}
            ),
            tokenizer=tokenizer,
            patch_size=patch,
            num_additional_image_tokens=1,  # the class token, which "default" takes away again
            vision_feature_select_strategy="default",
            chat_template=VICUNA_TEMPLATE,
        )

    return config, LlavaForConditionalGeneration, processor


def llava_next_video(
    vocab: int, text: dict[str, Any], vision: dict[str, Any], pinpoints: list[list[int]] | None = None
) -> Any:
    tokenizer = byte_tokenizer(vocab, ["<image>", "<video>"])
    side, patch = vision["image_size"], vision["patch_size"]
    config = LlavaNextVideoConfig(
        text_config={"model_type": "llama", "vocab_size": vocab, "eos_token_id": tokenizer.eos_token_id, **text},
        vision_config={"model_type": "clip_vision_model", **vision},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=pinpoints,
        image_seq_length=(side // patch) ** 2,
    )
    size = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}

    def processor() -> Any:
        return LlavaNextVideoProcessor(
            image_processor=LlavaNextImageProcessor(**size, image_grid_pinpoints=config.image_grid_pinpoints),
            video_processor=LlavaNextVideoVideoProcessor(**size),
            tokenizer=tokenizer,
            patch_size=patch,
            num_additional_image_tokens=1,
            vision_feature_select_strategy="default",
            chat_template=VICUNA_TEMPLATE,
        )

    return config, LlavaNextVideoForConditionalGeneration, processor


def blip(cls: Any, vocab: int, text: dict[str, Any], vision: dict[str, Any]) -> Any:
    tokenizer = byte_tokenizer(vocab, ["[DEC]", "[SEP]"])
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in (("bos", "[DEC]"), ("sep", "[SEP]"))}
    ids |= {"eos": ids["sep"], "pad": tokenizer.pad_token_id}
    config = BlipConfig(
        text_config={"vocab_size": vocab, **text, **{f"{name}_token_id": each for name, each in ids.items()}},
        vision_config=vision,
        architectures=[cls.__name__],
    )
    side = vision["image_size"]

    def processor() -> Any:
        return BlipProcessor(BlipImageProcessor(size={"height": side, "width": side}), tokenizer)

    return config, cls, processor
