"""Which FFN neurons and which visual tokens a prompt needs, and an FFN of those neurons alone (CoreMatching)."""

from __future__ import annotations

from vlmbench.kernels.core_neurons.compact import CompactFFN, compact, matrix_of
from vlmbench.kernels.core_neurons.count import Counts, co_activation, core_counts, core_set, n_core
from vlmbench.kernels.core_neurons.gathered import GatheredFFN, gathered, padded
from vlmbench.kernels.core_neurons.knee import Compare, CoreTokens, Knee, core_tokens, knee

__all__ = [
    "CompactFFN",
    "Compare",
    "CoreTokens",
    "Counts",
    "GatheredFFN",
    "Knee",
    "co_activation",
    "compact",
    "core_counts",
    "core_set",
    "core_tokens",
    "gathered",
    "knee",
    "matrix_of",
    "n_core",
    "padded",
]
