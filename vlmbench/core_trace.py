"""Sets of neurons as short text: thousands of scattered indices a layer would make a record of megabytes."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


def pack_neurons(layers: Mapping[int, Tensor], of: int) -> dict[str, str]:
    """One base64 text a layer: bit n, most significant first, is whether neuron n of `of` is in the set ``[K]``."""
    import torch

    if not layers:
        return {}
    chosen = torch.stack(list(layers.values()))
    bits = torch.zeros(len(layers), of, dtype=torch.bool, device=chosen.device).scatter_(1, chosen, True)
    rows = np.packbits(bits.cpu().numpy(), axis=1)  # one copy to the host for all layers
    return {str(layer): base64.b64encode(row.tobytes()).decode() for layer, row in zip(layers, rows, strict=True)}


def unpack_neurons(text: str, of: int) -> list[int]:
    """The ascending indices that `pack_neurons` wrote."""
    packed = np.frombuffer(base64.b64decode(text), dtype=np.uint8)
    found: list[int] = np.unpackbits(packed, count=of).nonzero()[0].tolist()
    return found
