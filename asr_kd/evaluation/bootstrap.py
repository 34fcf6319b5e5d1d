"""Confidence intervals of word error rates by the blocked bootstrap, with the same resamples for every system."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

CONFIDENCE = 0.95


def resampled_errors(errors: np.ndarray, words: np.ndarray, resamples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Errors int64 [systems, resamples] and words int64 [resamples] of as many blocks as there are, drawn with replacement.

    A block (a speaker, or else an utterance) is what may be taken as independent of the others. Every system sees the
    same draws, so that the difference of two systems is resampled too.

    Args:
        errors: int [systems, blocks].
        words: int [blocks].
    """
    rng = np.random.default_rng(seed)
    blocks = len(words)
    data = np.vstack([errors, words]).astype(np.int64)
    sums = np.empty((len(data), resamples), np.int64)
    for index in range(resamples):
        sums[:, index] = data @ np.bincount(rng.integers(0, blocks, blocks), minlength=blocks)
    return sums[:-1], sums[-1]


def blocks_of(speakers: np.ndarray) -> tuple[Literal["speakers", "utterances"], int, np.ndarray]:
    """What resamples of utterances are drawn of, how many there are, and the one of each utterance.

    That is speakers where all are known, and two or more. `speakers` are int [utterances], numbered from 0 on; -1 where one
    is not known.
    """
    present = np.bincount(speakers) > 0 if (speakers >= 0).all() else np.zeros(0, bool)
    number = int(present.sum())
    if number < 2:
        return "utterances", len(speakers), np.arange(len(speakers))
    return "speakers", number, (np.cumsum(present) - 1)[speakers]


def resampled_rates(rows: np.ndarray, words: np.ndarray, speakers: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Error rates float [systems, resamples]; not finite where no words were drawn, no resample where there is one block.

    Args:
        rows: errors, int [systems, utterances].
        words: int [utterances].
        speakers: int [utterances], see `blocks_of`.
    """
    _, number, labels = blocks_of(speakers)
    if number < 2:
        return np.zeros((len(rows), 0))
    sums = np.array([np.bincount(labels, row, number) for row in (*rows, words)]).astype(np.int64)
    errors, drawn_words = resampled_errors(sums[:-1], sums[-1], resamples, seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        return errors / drawn_words


def interval(values: Sequence[float] | np.ndarray) -> tuple[float, float] | None:
    """The middle 95 % of resampled values, low and high; None when any of them is undefined or there are none."""
    values = np.asarray(values, dtype=np.float64)
    if not len(values) or not np.isfinite(values).all():
        return None
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def two_sided(differences: np.ndarray) -> float | None:
    """The p-value of the paired bootstrap: twice the share of resampled differences on the rarer side of 0.

    One resample is added to each side, so that it is never 0. None where there is no resample or one is undefined.
    """
    if not len(differences) or not np.isfinite(differences).all():
        return None
    below, above = (differences <= 0).sum(), (differences >= 0).sum()
    return float(min(1.0, 2 * (min(below, above) + 1) / (len(differences) + 1)))
