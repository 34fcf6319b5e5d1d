"""Errors in words and in characters: the fewest edits. The report aligns words as NIST sclite does (`evaluation/wer.py`)."""

from __future__ import annotations

import jiwer


def word_errors(reference: str, hypothesis: str) -> tuple[int, int, int]:
    """Substitutions, deletions and insertions; an empty reference makes every word of the hypothesis an insertion."""
    ours, theirs = (" ".join(text.split()) for text in (reference, hypothesis))
    found = jiwer.process_words(ours, theirs)
    return found.substitutions, found.deletions, found.insertions


def character_errors(reference: str, hypothesis: str) -> int:
    """The fewest characters to change, remove or insert; spaces count, several in a row once."""
    ours, theirs = (" ".join(text.split()) for text in (reference, hypothesis))
    found = jiwer.process_characters(ours, theirs)
    return found.substitutions + found.deletions + found.insertions
