"""What was kept of a teacher's answer → bytes, and what they lost. Without torch, as `load.py`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from asr_kd.targets import codec
from asr_kd.targets.posteriors import SparsePosteriors
from asr_kd.targets.reduced import Reduced, divergence


@dataclass
class Answer:
    """What a teacher says of an utterance.

    Attributes:
        best: int [frames], the teacher's most probable unit; empty for an alignment.
        full: only of mass and top_k.
    """

    kept: SparsePosteriors
    best: np.ndarray
    full: Reduced | None = None


@dataclass
class Encoded:
    """One utterance's soft target.

    Attributes:
        data: its bytes.
        top1: bool [frames], whether the best unit is the teacher's; empty for an alignment.
        divergence: float64 [frames], in nat; of what has no full distribution empty.
    """

    data: bytes
    top1: np.ndarray
    divergence: np.ndarray


def encode(answer: Answer, draws: int | None) -> Encoded:
    """Encode an answer; `draws` of each frame, where it was drawn."""
    data, kept = codec.encode(answer.kept, draws=draws), answer.kept
    if answer.full is None:
        return Encoded(data, kept.units[kept.starts][: len(answer.best)] == answer.best, np.empty(0))
    # what is reported is what a reader will get
    stored = codec.decode(data)
    return Encoded(data, stored.units[stored.starts] == answer.best, divergence(answer.full, stored))
