"""Vertical-slash attention: a head's own columns and diagonals, chosen from the attention of its last queries."""

from __future__ import annotations

from vlmbench.kernels.vertical_slash.gathered import Lists, lists, vertical_slash
from vlmbench.kernels.vertical_slash.index import FIRST, NEAR, Index, diagonal_sums, make_index

__all__ = ["FIRST", "NEAR", "Index", "Lists", "diagonal_sums", "lists", "make_index", "vertical_slash"]
