"""How many tokens each layer merges, and what attention weighs against similarity: numbers alone, no tensors."""

from __future__ import annotations

from collections.abc import Sequence

N_REF = 577
"""Tokens of CLIP-L/14 at 336 pixels and of ViT-B/16 at 384, class token included: what the published c was chosen for."""


def schedule(r: int | Sequence[int], layers: int, inflection: float = 0.0) -> tuple[int, ...]:
    """Tokens to merge in each of `layers` layers.

    An int is the same everywhere, or, with an inflection from -1 to 1, runs in a line from r(1 - f) to r(1 + f), floored. A
    list is padded with zeros. Raises `ValueError` for a negative number, a list that is longer, or an inflection outside.
    """
    if not isinstance(r, int):
        if len(r) > layers:
            raise ValueError(f"a schedule of {len(r)} numbers is longer than the tower's {layers} layers")
        found = (*r, *(0,) * (layers - len(r)))
    else:
        if not -1 <= inflection <= 1:
            raise ValueError(f"the inflection must be from -1 to 1, not {inflection}")
        low = int(r * (1 - inflection))
        step = 2 * (r - low)  # from the first layer to the last
        found = tuple(low + step * layer // max(1, layers - 1) for layer in range(layers))
    if min(found, default=0) < 0:
        raise ValueError(f"a layer cannot merge fewer than 0 tokens: {found}")
    return found


def cap(n: int, protected: int = 0) -> int:
    """Most tokens that one matching of `n` can merge: half of those that are not protected."""
    return max(0, (n - protected) // 2)


def counts(n: int, schedule: Sequence[int], *, protected: int = 0, min_tokens: int = 0) -> tuple[int, ...]:
    """Tokens after each layer, from `n` before the first."""
    found = []
    for r in schedule:
        n -= 0 if n < min_tokens else min(r, cap(n, protected))
        found.append(n)
    return tuple(found)


def weight(alpha: float, c: float, layer: int = 0, *, beta: float = 1.0, gamma: float = 0.0) -> float:
    """alpha · c · beta^|gamma - layer|: what one unit of attention counts against one unit of cosine similarity."""
    return alpha * c * beta ** abs(gamma - layer)


def keep_text_side(n: int, layer: int, *, step: float = 0.07, least: float = 0.2) -> int:
    """Visual tokens left after text layer `layer` (from 0) of `n` in the prompt: at least that share, `step` fewer a layer.

    In thousandths, so that 1 - 0.8 is the 0.2 it is meant to be and not 0.1999….
    """
    floor, now = round(1000 * least), 1000 - round(1000 * step) * (layer + 1)
    return n * max(floor, now) // 1000
