"""What differs between vision towers, so that Turbo's rule is written once: norms, heads and projections of one block."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from vlmbench.turbo_plan import Widths

Place = tuple[Tensor, Tensor] | None
"""A row's rotation (cosines, sines), where a tower rotates."""


class Heads(NamedTuple):
    """Each ``[N, H, D]``."""

    q: Tensor
    k: Tensor
    v: Tensor
    unrotated: Tensor
    """Keys before rotation: what tokens are compared by."""


class Parts(Protocol):
    """What differs between towers."""

    @staticmethod
    def norms(block: Any) -> tuple[nn.Module, nn.Module]: ...
    @staticmethod
    def heads(block: Any, x: Tensor, place: Place) -> Heads: ...
    @staticmethod
    def attention(block: Any) -> Any: ...
    @staticmethod
    def scale(block: Any) -> float: ...
    @staticmethod
    def out(block: Any) -> nn.Linear: ...


class Vit:
    """CLIP and SigLIP encoder layers."""

    @staticmethod
    def norms(block: Any) -> tuple[nn.Module, nn.Module]:
        return block.layer_norm1, block.layer_norm2

    @staticmethod
    def heads(block: Any, x: Tensor, place: Place) -> Heads:
        own = block.self_attn
        shape = (x.shape[0], own.num_heads, own.head_dim)
        q, k, v = (linear(x).view(shape) for linear in (own.q_proj, own.k_proj, own.v_proj))
        return Heads(q, k, v, k)

    @staticmethod
    def attention(block: Any) -> Any:
        return block.self_attn

    @staticmethod
    def scale(block: Any) -> float:
        return block.self_attn.scale

    @staticmethod
    def out(block: Any) -> nn.Linear:
        return block.self_attn.out_proj


class Blip(Vit):
    """BLIP's encoder layers."""

    @staticmethod
    def heads(block: Any, x: Tensor, place: Place) -> Heads:
        own = block.self_attn
        q, k, v = own.qkv(x).view(x.shape[0], 3, own.num_heads, -1).unbind(1)
        return Heads(q, k, v, k)

    @staticmethod
    def out(block: Any) -> nn.Linear:
        return block.self_attn.projection


class Qwen:
    """Qwen2-VL's and Qwen2.5-VL's vision blocks."""

    @staticmethod
    def norms(block: Any) -> tuple[nn.Module, nn.Module]:
        return block.norm1, block.norm2

    @staticmethod
    def heads(block: Any, x: Tensor, place: Place) -> Heads:
        from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

        assert place is not None  # noqa: S101 (these towers always rotate)
        q, k, v = block.attn.qkv(x).view(x.shape[0], 3, block.attn.num_heads, -1).unbind(1)
        turned, moved = apply_rotary_pos_emb_vision(q, k, *place)
        return Heads(turned, moved, v, k)

    @staticmethod
    def attention(block: Any) -> Any:
        return block.attn

    @staticmethod
    def scale(block: Any) -> float:
        return block.attn.scaling

    @staticmethod
    def out(block: Any) -> nn.Linear:
        return block.attn.proj


def widths(parts: type[Parts], block: Any) -> Widths:
    """What FLOPs follow from, read off one block."""
    own = parts.attention(block)

    def matrices(module: nn.Module) -> int:
        return sum(each.numel() for each in module.parameters() if each.dim() == 2)

    hidden = parts.out(block).out_features
    return Widths(hidden, hidden // own.num_heads, matrices(own), matrices(block.mlp))
