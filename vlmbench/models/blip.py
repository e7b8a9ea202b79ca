"""BLIP: ViT-B/16 tower and a BERT that looks at it by cross-attention, with heads for answers, captions and matching.

Turbo's home. The language model's prompt holds no visual token and its cache none of their keys, so that the stages of
``vlmbench run`` do not fit it: its tower is timed by ``vlmbench bench vision``, and Turbo may be attached to the stock model.
The stock tower knows no fused attention; here it takes what its configuration names, for all methods alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from vlmbench.errors import UsageError
from vlmbench.models.base import Features, Inputs, ModelAdapter

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

    from vlmbench.layout import Prompt
    from vlmbench.suite import Caption
    from vlmbench.video import Clip

HEADS = ("BlipForQuestionAnswering", "BlipForConditionalGeneration", "BlipForImageTextRetrieval")
"""Classes that a checkpoint's ``architectures`` may name."""


class Blip(ModelAdapter):
    name: ClassVar[str] = "blip"
    model_types: ClassVar[tuple[str, ...]] = ("blip",)
    fixed_resolution: ClassVar[bool] = True

    def __init__(self, model: PreTrainedModel, processor: Any) -> None:
        super().__init__(model, processor)
        tower = self._vision_model()
        tower.set_attn_implementation = self.model.set_attn_implementation = self._use
        for block in tower.encoder.layers:
            block.self_attn.forward = _named_attention(block.self_attn)

    @classmethod
    def model_class(cls, config: Any) -> Any:
        (named,) = config.architectures or [""]
        if named not in HEADS:
            raise UsageError(
                f"BLIP with the head {named or 'of no name'} is not supported (supported: {', '.join(HEADS)})."
            )
        return getattr(transformers, named)

    def check_prompted(self) -> NoReturn:
        raise UsageError(
            "BLIP looks at a picture by cross-attention and has no visual tokens in its prompt, so there is nothing to prefill "
            "or to decode from; time its vision tower alone, as with vlmbench bench vision --shape blip-vqa-base --method "
            "turbo:r=40,mode=drop."
        )

    # -- parts of the model ---------------------------------------------------------------------------------------------

    @property
    def text(self) -> Any:
        """What reads the picture first: the encoder of questions, or the decoder of captions."""
        return self.model.text_encoder if hasattr(self.model, "text_encoder") else self.model.text_decoder.bert

    @property
    def layers(self) -> Sequence[Any]:
        return self.text.encoder.layer

    @property
    def vision_blocks(self) -> Sequence[nn.Module]:
        return self._vision_model().encoder.layers

    @property
    def vision_config(self) -> Any:
        return self._vision_model().config

    @property
    def eager_attention(self) -> Callable[..., Any]:
        self.check_prompted()

    def _vision_model(self) -> Any:
        return self.model.vision_model

    def tower_parameters(self) -> list[Tensor]:
        return list(self._vision_model().parameters())

    # -- the stages -------------------------------------------------------------------------------------------------------

    def inputs(self, clips: Sequence[Clip], question: str, captions: Sequence[Caption] = ()) -> Inputs:
        """Every picture and every frame ``[P, 3, H, W]``, each with the question of its own, if there is one."""
        frames = [torch.from_numpy(frame).permute(2, 0, 1) for clip in clips for frame in clip.frames]
        text = {"text": [question] * len(frames)} if question else {}
        return dict(self.processor(images=frames, return_tensors="pt", **text))

    def encode_vision(self, inputs: Inputs) -> Features:
        """What the text model looks at, ``[P · n, C]``: the class token and the patches of each picture."""
        return Features(image=self._vision_model()(inputs["pixel_values"]).last_hidden_state.flatten(0, 1))

    def splice(self, inputs: Inputs, features: Features) -> Prompt:
        self.check_prompted()

    def new_cache(self, headroom: int) -> Cache:
        self.check_prompted()

    @property
    def _tokens_per_frame(self) -> int:
        return int((self.vision_config.image_size // self.vision_config.patch_size) ** 2) + 1

    # -- attention ----------------------------------------------------------------------------------------------------------

    def attention_names(self) -> tuple[str, str]:
        """The stock text model has one way to attend."""
        return "eager", self.vision_config._attn_implementation

    @contextmanager
    def attention(self, name: str | None) -> Iterator[None]:
        _, before = self.attention_names()
        self._use(name or before)
        try:
            yield
        finally:
            self._use(before)

    def _use(self, name: str) -> None:
        self.vision_config._attn_implementation = name


def _named_attention(attention: Any) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The stock forward, or the same with the attention that the configuration names."""
    stock = attention.forward

    def forward(hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        name = attention.config._attn_implementation
        if name == "eager":
            return stock(hidden_states, **kwargs)
        batch, n, _ = hidden_states.shape
        mixed = attention.qkv(hidden_states).view(batch, n, 3, attention.num_heads, -1)
        q, k, v = mixed.permute(2, 0, 3, 1, 4)  # each [B, H, N, D]
        options = {"attention_mask": None, "scaling": attention.scale, "dropout": 0.0, "is_causal": False}
        out, _ = AttentionInterface()[name](attention, q, k, v, **options)
        return attention.projection(out.reshape(batch, n, -1)), None

    return forward
