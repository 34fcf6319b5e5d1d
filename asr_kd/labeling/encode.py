"""A teacher's answer → the bytes of a soft target, and the rounding loss. Does not import torch, like `load.py`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from asr_kd.targets import codec
from asr_kd.targets.posteriors import SparsePosteriors
from asr_kd.targets.reduced import Reduced, divergence


@dataclass
class Answer:
    """A teacher's answer for an utterance.

    Attributes:
        kept: what is kept of its distribution.
        best: int [frames], the teacher's most probable unit; empty for an alignment.
        full: its full distribution, reduced; only in modes mass and top_k.
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
        divergence: float64 [frames], in nat; empty without a full distribution.
    """

    data: bytes
    top1: np.ndarray
    divergence: np.ndarray


def encode(answer: Answer, draws: int | None) -> Encoded:
    """Encode an answer; `draws`: number of draws a frame in mode sampled."""
    data, kept = codec.encode(answer.kept, draws=draws), answer.kept
    if answer.full is None:
        return Encoded(data, kept.units[kept.starts][: len(answer.best)] == answer.best, np.empty(0))
    # the reported figures are of what a reader will get
    stored = codec.decode(data)
    return Encoded(data, stored.units[stored.starts] == answer.best, divergence(answer.full, stored))
