"""Every word that the reference models know."""

from __future__ import annotations

from vlmbench.suites._synth import captions, questions

VOCABULARY = tuple(dict.fromkeys([*questions.VOCABULARY, *captions.CAPTION_VOCABULARY]))
"""In a fixed order: a word's token id depends on it."""
