"""Published shapes filled with random weights, and processors that need no download.

The processors are the real Hugging Face classes with the published numbers. Their tokenizer is byte-level without merges,
since the published vocabularies cannot be made from nothing: text comes out some four times longer, vision tokens exact.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedModel,
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


def _qwen(two_five: bool, vocab: int, text: dict[str, Any], vision: dict[str, Any], pixels: tuple[int, int]) -> Any:
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


def _llava(vocab: int, text: dict[str, Any], vision: dict[str, Any], pinpoints: list[list[int]]) -> Any:
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


def _text(hidden: int, ffn: int, layers: int, heads: int, kv: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "max_position_embeddings": 131072,
        **more,
    }


def _mrope(*sections: int, theta: float = 1e6) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, "mrope_section": list(sections)}}


def _qwen25_vision(hidden: int, out: int, ffn: int = 3420) -> dict[str, Any]:
    return {
        "depth": 32,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_heads": 16,
        "out_hidden_size": out,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "window_size": 112,
        "tokens_per_second": 2,
    }


def _qwen2_vision(out: int) -> dict[str, Any]:
    return {"depth": 32, "embed_dim": 1280, "hidden_size": out, "num_heads": 16, "mlp_ratio": 4}


def _siglip(layers: int, hidden: int, ffn: int, heads: int, side: int, patch: int) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "image_size": side,
        "patch_size": patch,
    }


_OFFICIAL = (128 * 28 * 28, 768 * 28 * 28)
_SMALL = (56 * 56, 56 * 56)
_SIGLIP = _siglip(26, 1152, 4304, 16, 384, 14)  # the 27th layer is cut off in the published checkpoints
_PINPOINTS = [[384 * a, 384 * b] for a in range(1, 7) for b in range(1, 7)]

_TIED = frozenset({"qwen2.5-vl-3b", "qwen2-vl-2b", "llava-ov-0.5b"})
"""Published checkpoints whose output head is the embedding matrix."""

_BUILDERS: dict[str, Callable[[], Any]] = {
    "qwen2.5-vl-7b": lambda: _qwen(
        True, 152064, _text(3584, 18944, 28, 28, 4, **_mrope(16, 24, 24)), _qwen25_vision(1280, 3584), _OFFICIAL
    ),
    "qwen2.5-vl-3b": lambda: _qwen(
        True, 151936, _text(2048, 11008, 36, 16, 2, **_mrope(16, 24, 24)), _qwen25_vision(1280, 2048), _OFFICIAL
    ),
    "qwen2-vl-7b": lambda: _qwen(
        False, 152064, _text(3584, 18944, 28, 28, 4, **_mrope(16, 24, 24)), _qwen2_vision(3584), _OFFICIAL
    ),
    "qwen2-vl-2b": lambda: _qwen(
        False, 151936, _text(1536, 8960, 28, 12, 2, **_mrope(16, 24, 24)), _qwen2_vision(1536), _OFFICIAL
    ),
    "llava-ov-7b": lambda: _llava(152064, _text(3584, 18944, 28, 28, 4), _SIGLIP, _PINPOINTS),
    "llava-ov-0.5b": lambda: _llava(152000, _text(896, 4864, 24, 14, 2), _SIGLIP, _PINPOINTS),
    "mini-qwen2.5-vl": lambda: _qwen(
        True,
        300,
        _text(64, 128, 4, 4, 2, **_mrope(2, 3, 3, theta=1e4)),
        {
            **_qwen25_vision(32, 64, 64),
            "depth": 2,
            "num_heads": 2,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
        _SMALL,
    ),
    "mini-qwen2-vl": lambda: _qwen(
        False,
        300,
        _text(64, 128, 4, 4, 2, **_mrope(2, 3, 3, theta=1e4)),
        {**_qwen2_vision(64), "depth": 2, "embed_dim": 32, "num_heads": 2},
        _SMALL,
    ),
    "mini-llava-ov": lambda: _llava(
        300, _text(64, 128, 4, 4, 2), _siglip(2, 32, 64, 2, 56, 14), [[56, 56], [56, 112], [112, 56]]
    ),
}


def config_of(preset: str) -> Any:
    """The configuration of a preset, whole."""
    config = _BUILDERS[preset]()[0]
    config.tie_word_embeddings = preset in _TIED
    return config


def cut(config: Any, layers: int) -> None:
    """Leave `layers` layers of the language model."""
    config.text_config.num_hidden_layers = layers
    if getattr(config.text_config, "layer_types", None):
        config.text_config.layer_types = config.text_config.layer_types[:layers]


def head_shape(preset: str) -> tuple[int, int, int]:
    """(query heads, key and value heads, head size) of a preset's language model."""
    text = config_of(preset).text_config
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return text.num_attention_heads, text.num_key_value_heads, head_dim


def build(
    preset: str, *, layers: int | None, seed: int, dtype: torch.dtype, device: str
) -> tuple[PreTrainedModel, Any]:
    """(model, processor) of a preset with seeded random weights; `layers` cuts the language model."""
    config, cls, make_processor = _BUILDERS[preset]()
    config.tie_word_embeddings = preset in _TIED
    if layers is not None:
        cut(config, layers)
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = cls(config)
    finally:
        torch.set_default_dtype(before)
    return model, make_processor()
