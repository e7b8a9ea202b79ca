"""A-shape attention: the first tokens, and a window behind every query; as Tri-shape, the last rows see everything."""

from __future__ import annotations

from vlmbench.kernels.a_shape.banded import a_shape
from vlmbench.kernels.a_shape.reference import seen, visible

__all__ = ["a_shape", "seen", "visible"]
