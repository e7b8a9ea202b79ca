"""What the last queries of a prompt attend to, summed along columns and diagonals: what indices are made from."""

from __future__ import annotations

from vlmbench.kernels.last_queries.fused import log_sum_exp
from vlmbench.kernels.last_queries.reference import Sums, diagonal_sums, sums

__all__ = ["Sums", "diagonal_sums", "log_sum_exp", "sums"]
