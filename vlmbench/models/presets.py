"""Published shapes filled with random weights, and processors that need no download."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    PreTrainedModel,
)

from vlmbench.models.preset_families import blip, llava_15, llava_next_video, llava_onevision, qwen


def _bert(hidden: int, ffn: int, layers: int, heads: int) -> dict[str, Any]:
    text = _text(hidden, ffn, layers, heads, heads, max_position_embeddings=512)
    del text["num_key_value_heads"]
    return {**text, "encoder_hidden_size": hidden}


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


def _vit(layers: int, hidden: int, ffn: int, heads: int, side: int, patch: int) -> dict[str, Any]:
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
_SIGLIP = _vit(26, 1152, 4304, 16, 384, 14)  # the 27th layer is cut off in the published checkpoints
_CLIP = {**_vit(24, 1024, 4096, 16, 336, 14), "projection_dim": 768}
_LLAMA = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
_BERT = 30524
"""Words of BLIP's vocabulary."""
_PINPOINTS = [[384 * a, 384 * b] for a in range(1, 7) for b in range(1, 7)]

_TIED = frozenset({"qwen2.5-vl-3b", "qwen2-vl-2b", "llava-ov-0.5b"})
"""Published checkpoints whose output head is the embedding matrix."""

_BUILDERS: dict[str, Callable[[], Any]] = {
    "qwen2.5-vl-7b": lambda: qwen(
        True, 152064, _text(3584, 18944, 28, 28, 4, **_mrope(16, 24, 24)), _qwen25_vision(1280, 3584), _OFFICIAL
    ),
    "qwen2.5-vl-3b": lambda: qwen(
        True, 151936, _text(2048, 11008, 36, 16, 2, **_mrope(16, 24, 24)), _qwen25_vision(1280, 2048), _OFFICIAL
    ),
    "qwen2-vl-7b": lambda: qwen(
        False, 152064, _text(3584, 18944, 28, 28, 4, **_mrope(16, 24, 24)), _qwen2_vision(3584), _OFFICIAL
    ),
    "qwen2-vl-2b": lambda: qwen(
        False, 151936, _text(1536, 8960, 28, 12, 2, **_mrope(16, 24, 24)), _qwen2_vision(1536), _OFFICIAL
    ),
    "llava-ov-7b": lambda: llava_onevision(152064, _text(3584, 18944, 28, 28, 4), _SIGLIP, _PINPOINTS),
    "llava-ov-0.5b": lambda: llava_onevision(152000, _text(896, 4864, 24, 14, 2), _SIGLIP, _PINPOINTS),
    "longvila-7b": lambda: llava_onevision(
        152064, _text(3584, 18944, 28, 28, 4), {**_SIGLIP, "image_size": 448}, _PINPOINTS
    ),
    "llava-video-7b": lambda: llava_onevision(152064, _text(3584, 18944, 28, 28, 4), _SIGLIP, _PINPOINTS),
    "llava-1.5-7b": lambda: llava_15(32064, _text(4096, 11008, 32, 32, 32, **_LLAMA), _CLIP),
    "llava-next-video-7b": lambda: llava_next_video(32064, _text(4096, 11008, 32, 32, 32, **_LLAMA), _CLIP),
    "blip-vqa-base": lambda: blip(
        BlipForQuestionAnswering, _BERT, _bert(768, 3072, 12, 12), _vit(12, 768, 3072, 12, 480, 16)
    ),
    "blip-captioning-base": lambda: blip(
        BlipForConditionalGeneration, _BERT, _bert(768, 3072, 12, 12), _vit(12, 768, 3072, 12, 384, 16)
    ),
    "blip-itm-base": lambda: blip(
        BlipForImageTextRetrieval, _BERT, _bert(768, 3072, 12, 12), _vit(12, 768, 3072, 12, 384, 16)
    ),
    "mini-qwen2.5-vl": lambda: qwen(
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
    "mini-qwen2-vl": lambda: qwen(
        False,
        300,
        _text(64, 128, 4, 4, 2, **_mrope(2, 3, 3, theta=1e4)),
        {**_qwen2_vision(64), "depth": 2, "embed_dim": 32, "num_heads": 2},
        _SMALL,
    ),
    "mini-llava-ov": lambda: llava_onevision(
        300, _text(64, 128, 4, 4, 2), _vit(2, 32, 64, 2, 56, 14), [[56, 56], [56, 112], [112, 56]]
    ),
    "mini-llava-1.5": lambda: llava_15(300, _text(64, 128, 4, 4, 4), _vit(3, 32, 64, 2, 56, 14)),
    "mini-blip-vqa": lambda: blip(BlipForQuestionAnswering, 300, _bert(32, 64, 2, 2), _vit(3, 32, 64, 2, 64, 16)),
    "mini-blip-captioning": lambda: blip(
        BlipForConditionalGeneration, 300, _bert(32, 64, 2, 2), _vit(3, 32, 64, 2, 64, 16)
    ),
    "mini-blip-itm": lambda: blip(BlipForImageTextRetrieval, 300, _bert(32, 64, 2, 2), _vit(3, 32, 64, 2, 64, 16)),
    "mini-llava-next-video": lambda: llava_next_video(
        300, _text(64, 128, 4, 4, 4), _vit(3, 32, 64, 2, 112, 14), [[112, 224], [224, 112]]
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
    return text.num_attention_heads, getattr(text, "num_key_value_heads", text.num_attention_heads), head_dim


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
