"""Word errors in training: the fewest edits. The report aligns words as NIST sclite does (`evaluation/wer.py`)."""

from __future__ import annotations

import jiwer


def word_errors(reference: str, hypothesis: str) -> int:
    """Words to be changed, dropped or put in; an empty reference makes every word of the hypothesis an error."""
    found = jiwer.process_words(reference, hypothesis)
    return found.substitutions + found.deletions + found.insertions
