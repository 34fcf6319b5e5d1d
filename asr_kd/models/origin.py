"""What a checkpoint says about the one its training started from."""

from __future__ import annotations

from typing import Any


def won_nothing(training: Any) -> str | None:
    """A sentence for a run that is no better than its start, from the `training` of its checkpoint; None if it is better."""
    match training:
        case {"started_from": {"won": False, "folder": str(folder), "wer": float(wer), "loss": float(loss)}}:
            return f"no checkpoint was better than {folder}, where it started ({figures(wer, loss)})"
    return None


def figures(wer: float, loss: float) -> str:
    """Scores on the development set in words."""
    return f"development WER {100 * wer:.1f} %, loss {loss:.3g}"
