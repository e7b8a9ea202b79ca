"""Attention in which blocks of a prompt see a shared sink and themselves, and the tail sees everything."""

from vlmbench.kernels.block_attention.plan import Plan, make_plan
from vlmbench.kernels.block_attention.reference import block_attention

__all__ = ["Plan", "block_attention", "make_plan"]
