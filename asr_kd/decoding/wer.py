"""Word errors: the fewest edits. The report aligns words as NIST sclite does (`evaluation/wer.py`)."""

from __future__ import annotations

import jiwer


def word_errors(reference: str, hypothesis: str) -> tuple[int, int, int]:
    """Substitutions, deletions and insertions; an empty reference makes every word of the hypothesis an insertion."""
    ours, theirs = (" ".join(text.split()) for text in (reference, hypothesis))
    found = jiwer.process_words(ours, theirs)
    return found.substitutions, found.deletions, found.insertions
