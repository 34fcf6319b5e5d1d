"""What a checkpoint says of its training: the one it started from, and how it did on development audio."""

from __future__ import annotations

from typing import Any, NamedTuple

from asr_kd.config.base import folders_of


class Score(NamedTuple):
    """Of a checkpoint on development audio, whose folder (or several, joined by +) is `audio`."""

    wer: float
    audio: str


def score_of(training: Any) -> Score | None:
    """How the weights did that a run kept, from the `training` of their checkpoint; None if it does not say."""
    match training:
        case {"development_wer": float(wer), "settings": {"development": (str() | list()) as audio}}:
            return Score(wer, " + ".join(folders_of(audio)))
    return None


def won_nothing(training: Any) -> str | None:
    """A sentence for a run that is no better than its start, from the `training` of its checkpoint; None if it is better."""
    match training:
        case {"started_from": {"won": False, "folder": str(folder), "wer": float(wer), "loss": float(loss)}}:
            return f"no checkpoint was better than {folder}, where it started ({figures(wer, loss)})"
    return None


def figures(wer: float, loss: float) -> str:
    """Scores on the development set in words."""
    return f"development WER {100 * wer:.1f} %, loss {loss:.3g}"
