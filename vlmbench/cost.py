"""FLOPs and the least bytes of one stage from shapes alone, and the roofline time they leave.

The least bytes are every weight, input and key read once and every result written once: no version moves fewer, every
real one moves more (activations between operations are not in them).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from vlmbench import work as works
from vlmbench.method import Work

if TYPE_CHECKING:
    from vlmbench.models.base import Shapes


class Cost(NamedTuple):
    flops: int
    bytes: int

    def roofline_s(self, flops_per_s: float, bytes_per_s: float) -> float:
        """The larger of the two times: no version runs faster."""
        return max(self.flops / flops_per_s, self.bytes / bytes_per_s)


def attention(pairs: int, tokens: int, heads: int, kv_heads: int, head_dim: int, size: int) -> Cost:
    """One layer's attention; `size` bytes an element, q, k and v read and the output written."""
    return Cost(4 * pairs * heads * head_dim, 2 * (heads + kv_heads) * tokens * head_dim * size)


def kv_bytes(tokens: int, shapes: Shapes, size: int) -> int:
    """Keys and values of `tokens` tokens in all layers."""
    return 2 * shapes.layers * shapes.kv_heads * shapes.head_dim * size * tokens


def weight_bytes(shapes: Shapes, size: int, neurons: tuple[int, ...] | None = None, *, int8: bool = False) -> int:
    """The language model's matrices and its head, as far as one pass reads them; `int8` is `Work.int8`."""
    projections = shapes.hidden * shapes.head_dim * 2 * (shapes.heads + shapes.kv_heads)
    used = neurons or (shapes.intermediate,) * shapes.layers
    layers = sum(projections + 3 * shapes.hidden * each for each in used)
    head = shapes.hidden * shapes.vocab * size
    if not int8:
        return layers * size + head
    outputs = shapes.head_dim * (shapes.heads + 2 * shapes.kv_heads) + 2 * shapes.hidden
    return layers + sum(outputs + 2 * each for each in used) * size + head


def prefill(work: Work, shapes: Shapes, size: int, batch: int = 1) -> Cost:
    """FLOPs as `vlmbench.work` counts them, of `batch` prompts alike. No tokens at all cost nothing."""
    if not any(work.tokens):
        return Cost(0, 0)
    own = max(work.tokens) * shapes.hidden * size + kv_bytes(1, shapes, size) * sum(work.tokens) // shapes.layers
    weights = weight_bytes(shapes, size, work.neurons, int8=work.int8)
    return Cost(batch * works.flops(work, shapes), weights + batch * own)


def decode(work: Work, shapes: Shapes, size: int) -> Cost:
    """One generated token (`Method.decode_work`): weights of the neurons that it uses, keys that it sees, a method's own."""
    keys = 2 * shapes.kv_heads * shapes.head_dim * size * sum(work.pairs)
    weights = weight_bytes(shapes, size, work.neurons, int8=work.int8)
    return Cost(works.flops(work, shapes), weights + keys + work.own_read)
