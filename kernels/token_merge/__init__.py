"""Merging of duplicated, unimportant tokens by informativity, with the mass that later attention needs (Turbo, FOLDER)."""

from vlmbench.kernels.token_merge.mass import Attended, Importance, attention
from vlmbench.kernels.token_merge.matching import Decision, Folded, fold, match, merge, unit_metric, unmerge
from vlmbench.kernels.token_merge.schedule import N_REF, cap, counts, keep_text_side, schedule, weight

__all__ = [
    "N_REF",
    "Attended",
    "Decision",
    "Folded",
    "Importance",
    "attention",
    "cap",
    "counts",
    "fold",
    "keep_text_side",
    "match",
    "merge",
    "schedule",
    "unit_metric",
    "unmerge",
    "weight",
]
