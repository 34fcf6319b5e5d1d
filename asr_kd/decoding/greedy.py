"""Greedy CTC decoding: the best unit of every frame, repeats joined, blanks dropped."""

from __future__ import annotations

import numpy as np


def greedy(log_probs: np.ndarray, blank: int = 0) -> list[int]:
    """Unit ids of the most probable path.

    Args:
        log_probs: float [frames, units], natural logarithm (any monotonic score will do).

    Returns:
        unit ids without blanks; of equally probable units the lowest id counts.
    """
    best = log_probs.argmax(axis=1)
    starts = np.ones(len(best), dtype=bool)
    starts[1:] = best[1:] != best[:-1]
    return best[starts & (best != blank)].tolist()
