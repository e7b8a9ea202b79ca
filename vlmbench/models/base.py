"""What the engine and the methods see of a vision-language model: one adapter class per family, batch one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, PreTrainedModel
from transformers.cache_utils import Cache

from vlmbench.cache import new_cache
from vlmbench.chunked import in_pieces
from vlmbench.layout import Prompt, Span
from vlmbench.models.written import in_order, interleaved

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vlmbench.suite import Caption
    from vlmbench.video import Clip

Inputs = dict[str, Any]
"""What the family's processor returns, tensors on the host or the device."""


class Features(NamedTuple):
    """Visual features as the language model will read them, each ``[n_placeholders, C]`` in prompt order."""

    image: Tensor | None = None
    video: Tensor | None = None


@dataclass(frozen=True)
class Shapes:
    """Sizes that closed-form work and memory are computed from."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    vision_layers: int
    vision_hidden: int
    vision_intermediate: int
    vision_parameters: int


class ModelAdapter(ABC):
    """One loaded model with its processor.

    The five stages are separate calls so that each can be timed and a method can stand between any two:
    ``inputs -> encode_vision -> splice -> prefill -> decode``.
    """

    name: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]
    """Values of ``config.model_type`` that this family loads."""
    fixed_resolution: ClassVar[bool]
    """True when every frame is resized to the tower's one input size, whatever its own."""

    def __init__(self, model: PreTrainedModel, processor: Any) -> None:
        self.model = model.eval()
        self.processor = processor
        self.config = model.config

    @classmethod
    def model_class(cls, config: Any) -> Any:
        """The class with which a model of this configuration is made or loaded."""
        return MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]

    def check_prompted(self) -> None:
        """Raise `UsageError` when the family's visual tokens do not stand in a prompt."""

    # -- parts of the model that methods may patch ------------------------------------------------------------------

    @property
    def text(self) -> Any:
        """The language model without its head."""
        return self.model.model.language_model

    @property
    def layers(self) -> Sequence[Any]:
        """Decoder layers of the language model."""
        return self.text.layers

    @property
    @abstractmethod
    def vision_blocks(self) -> Sequence[nn.Module]:
        """Transformer blocks of the vision tower."""

    @property
    @abstractmethod
    def vision_config(self) -> Any: ...

    @property
    @abstractmethod
    def eager_attention(self) -> Callable[..., Any]:
        """The family's plain matmul-softmax attention (it is not in transformers' registry)."""

    def tower_parameters(self) -> list[Tensor]:
        """All but the language model's: of the tower, and of what stands between the two."""
        text = {id(each) for part in (self.text, self.model.lm_head) for each in part.parameters()}
        return [each for each in self.model.parameters() if id(each) not in text]

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def shapes(self) -> Shapes:
        text, vision = self.text.config, self.vision_config
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        tower = [p for block in self.vision_blocks for p in block.parameters()]
        return Shapes(
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            intermediate=text.intermediate_size,
            heads=text.num_attention_heads,
            kv_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
            head_dim=head_dim,
            vocab=text.vocab_size,
            vision_layers=len(self.vision_blocks),
            vision_hidden=getattr(vision, "embed_dim", None) or vision.hidden_size,
            vision_intermediate=getattr(vision, "intermediate_size", 0) or int(vision.embed_dim * vision.mlp_ratio),
            vision_parameters=sum(p.numel() for p in tower),
        )

    @property
    def eos_ids(self) -> frozenset[int]:
        """Token ids that end an answer."""
        eos = self.model.generation_config.eos_token_id
        if eos is None:
            eos = self.text.config.eos_token_id
        if eos is None:
            eos = self.processor.tokenizer.eos_token_id
        return frozenset(eos if isinstance(eos, (list, tuple)) else [eos])

    # -- the stages ---------------------------------------------------------------------------------------------------

    def inputs(self, clips: Sequence[Clip], question: str, captions: Sequence[Caption] = ()) -> Inputs:
        """Run the family's own processor on the host: media first, in order, then the question.

        With captions the only clip becomes several short ones, in the prompt as in the layout, with the text between them.
        Raises `ValueError` when captions come with anything but one video, or a clip has no frame.
        """
        text, clips = self._written(clips, question, captions)
        videos = [clip for clip in clips if clip.kind == "video"]
        pictures = [clip.frames[0] for clip in clips if clip.kind == "image"]
        options: dict[str, Any] = {}
        if videos:
            options |= self.video_options(videos)
        if pictures:
            options |= {"images": [torch.from_numpy(p).permute(2, 0, 1) for p in pictures]}
        return self.process(text, options)

    def _written(self, clips: Sequence[Clip], question: str, captions: Sequence[Caption]) -> tuple[str, Sequence[Clip]]:
        """(the prompt's text with one placeholder a medium, the media in its order)."""
        for clip in clips:
            if not len(clip.frames):
                raise ValueError(f"{clip.path.name} has no frame left after sampling; ask for more frames.")
        parts: list[Clip | str] = [*clips, question]
        if captions:
            parts = interleaved(clips, captions, question)
            clips = [part for part in parts if not isinstance(part, str)]
        content = [
            piece
            for part in parts
            for piece in ([{"type": "text", "text": part}] if isinstance(part, str) else self.content_of(part))
        ]
        text = self._rendered(content)
        if not in_order(text, [self._mark(piece) for piece in content]):
            # Templates of the published LLaVAs put all media before all text, and pictures before videos.
            text = self._rendered([{"type": "text", "text": "\n".join(map(self._mark, content))}])
        return text, clips

    def _rendered(self, content: list[dict[str, str]]) -> str:
        """A user's message through the chat template, up to where the answer begins."""
        messages = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)

    def _mark(self, piece: dict[str, str]) -> str:
        """What stands in the prompt's text for an entry of a message."""
        return piece["text"] if piece["type"] == "text" else getattr(self.processor, f"{piece['type']}_token")

    def content_of(self, clip: Clip) -> list[dict[str, str]]:
        """A medium as a chat template reads it: one entry for each of its placeholders."""
        return [{"type": clip.kind}]

    @property
    def placeholder_ids(self) -> tuple[int, ...]:
        """Token ids whose embeddings visual features replace."""
        found = (getattr(self.config, f"{kind}_token_id", None) for kind in ("image", "video"))
        return tuple(each for each in found if each is not None)

    def text_ids(
        self, clips: Sequence[Clip], question: str, captions: Sequence[Caption] = ()
    ) -> tuple[list[int], list[int]]:
        """Token ids (up to and with the last medium's one placeholder, behind it), without touching any pixel.

        Those behind it are the last ones of `inputs`: placeholders are special tokens, across which nothing is merged.
        """
        ids = self.processor.tokenizer(self._written(clips, question, captions)[0])["input_ids"]
        media = self.placeholder_ids
        behind = max((index + 1 for index, token in enumerate(ids) if token in media), default=0)
        return ids[:behind], ids[behind:]

    def process(self, text: str, options: dict[str, Any]) -> Inputs:
        """One call of the processor."""
        return dict(self.processor(text=[text], return_tensors="pt", **options))

    def video_options(self, clips: Sequence[Clip]) -> dict[str, Any]:
        """Processor keywords for clips whose frames are already sampled."""
        metadata = [
            {
                "fps": clip.fps,
                "total_num_frames": clip.indices[-1] + 1,
                "frames_indices": list(clip.indices),
                "duration": (clip.indices[-1] + 1) / clip.fps,
            }
            for clip in clips
        ]
        frames = [torch.from_numpy(clip.frames).permute(0, 3, 1, 2) for clip in clips]
        return {"videos": frames, "video_metadata": metadata, "do_sample_frames": False}

    def to_device(self, inputs: Inputs) -> Inputs:
        """Tensors to the model's device, pixels in its dtype (and nothing else: times in bfloat16 would round positions)."""

        def move(value: Any, dtype: torch.dtype | None) -> Any:
            if isinstance(value, list):
                return [move(each, dtype) for each in value]
            return value.to(self.device, dtype) if isinstance(value, Tensor) else value

        return {key: move(value, self.dtype if key.startswith("pixel") else None) for key, value in inputs.items()}

    @abstractmethod
    def encode_vision(self, inputs: Inputs) -> Features:
        """Run the vision tower on everything visual in the inputs."""

    @abstractmethod
    def splice(self, inputs: Inputs, features: Features) -> Prompt:
        """Text embeddings with the features in place. Without features the placeholders' own embeddings stay."""

    def new_cache(self, headroom: int) -> Cache:
        """An empty cache with room for the prompt and `headroom` tokens."""
        return new_cache(len(self.layers), headroom)

    def prefill(self, prompt: Prompt, cache: Cache) -> Tensor:
        """Run the whole prompt and return the last position's logits ``[1, V]``."""
        with in_pieces(self, prompt.length):
            hidden = self.text(
                inputs_embeds=prompt.embeds,
                position_ids=prompt.positions,
                past_key_values=cache,
                use_cache=True,
                vlmbench_layout=prompt.layout,
                **prompt.extras,
            ).last_hidden_state
        return self.model.lm_head(hidden[:, -1])

    def decode(self, token: Tensor, position: int, cache: Cache) -> Tensor:
        """Run one token, int64 ``[1, 1]``, at `position` on every axis; logits ``[1, V]``."""
        return self.extend(self.model.get_input_embeddings()(token), self.decode_positions(position), cache)

    def extend(self, embeds: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """Run text tokens ``[1, n, C]`` behind what the cache holds; the last one's logits ``[1, V]``.

        `positions` are ``[1, n]``, or ``[3, 1, n]`` for M-RoPE.
        """
        hidden = self.text(
            inputs_embeds=embeds,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        return self.model.lm_head(hidden[:, -1])

    def decode_positions(self, position: int) -> Tensor:
        return torch.full((1, 1), position, device=self.device)

    # -- attention ------------------------------------------------------------------------------------------------------

    def attention_names(self) -> tuple[str, str]:
        """(language model, vision tower) implementations in use."""
        return self.text.config._attn_implementation, self.vision_config._attn_implementation

    @contextmanager
    def attention(self, name: str | None) -> Iterator[None]:
        """Use another stock implementation for a while; None changes nothing."""
        before = self.attention_names()
        if name is None or before == (name, name):
            yield
            return
        self.model.set_attn_implementation(name)
        try:
            yield
        finally:
            self.text.set_attn_implementation(before[0])
            self._vision_model().set_attn_implementation(before[1])

    @abstractmethod
    def _vision_model(self) -> Any:
        """The sub-model whose attention implementation is set for the tower."""


def scatter(embeds: Tensor, placeholders: Tensor, features: Tensor | None) -> Tensor:
    """Put `features` ``[n, C]`` where `placeholders` ``[1, N]`` is true in `embeds` ``[1, N, C]``."""
    if features is None:
        return embeds
    n = int(placeholders.sum())
    if n != features.shape[0]:
        raise ValueError(f"{n} placeholders in the prompt but {features.shape[0]} visual features")
    return embeds.masked_scatter(placeholders[..., None], features.to(embeds.dtype))


def text_between(spans: list[Span], length: int) -> tuple[Span, ...]:
    """Fill the gaps between visual spans with text spans, up to `length`."""
    filled: list[Span] = []
    cursor = 0
    for span in spans:
        if span.start > cursor:
            filled.append(Span("text", cursor, span.start))
        filled.append(span)
        cursor = span.stop
    if cursor < length:
        filled.append(Span("text", cursor, length))
    return tuple(filled)


def runs_of(mask: Tensor) -> list[tuple[int, int]]:
    """``[start, stop)`` of every run of true values in ``[N]``."""
    edges = torch.diff(
        mask.int().cpu(), prepend=torch.zeros(1, dtype=torch.int), append=torch.zeros(1, dtype=torch.int)
    )
    starts, stops = (edges == 1).nonzero().flatten(), (edges == -1).nonzero().flatten()
    return list(zip(starts.tolist(), stops.tolist(), strict=True))
