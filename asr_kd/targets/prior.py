"""The tail prior: how the mass that was not kept is spread over units, one distribution for all frames of a shard."""

from __future__ import annotations

import base64
from collections.abc import Iterable

import numpy as np

from asr_kd.targets.posteriors import SparsePosteriors

#: code steps that halve a probability; code 255 is 2⁻³² of the most probable unit
STEPS = 8


def fit_prior(total: np.ndarray) -> np.ndarray:
    """The codes of the prior, fitted to a sum of `Reduced.leftover`: uint8 [units].

    They are -8 log2 of each unit's share of the mass that was not kept, relative to the largest share.
    """
    mass, exposed = total
    share = mass / np.maximum(exposed, 1e-300)
    if not share.max() > 0:
        return np.zeros(len(share), np.uint8)
    halvings = np.log2(share.max() / np.maximum(share, share.max() * 2.0**-64))
    return np.clip(np.rint(STEPS * halvings), 0, 255).astype(np.uint8)


def gain(total: np.ndarray, prior: np.ndarray, kept: Iterable[SparsePosteriors]) -> float:
    """Divergence in nat, summed over all frames, that `prior` (as of `prior_of`) saves compared with an even spread.

    Args:
        total: float64 [2, units], sum of `Reduced.leftover`.
        kept: soft targets of the same utterances.
    """
    nat = float(total[0] @ np.log(prior))
    for one in kept:
        others = np.maximum(one.num_units - one.counts.astype(np.int64), 1)
        nat -= float(one.tail.astype(np.float64) @ np.log(one.unkept(prior) / others))
    return nat


def prior_of(codes: np.ndarray) -> np.ndarray:
    """float64 [units], adding up to 1, from the codes."""
    weights = np.exp2(-codes.astype(np.float64) / STEPS)
    return weights / weights.sum()


def to_text(codes: np.ndarray) -> str:
    """Codes as base64, for a shard's metadata."""
    return base64.b64encode(codes.tobytes()).decode()


def from_text(text: str, num_units: int) -> np.ndarray:
    """The codes in a shard's metadata; raises ValueError when they are not one for each unit."""
    codes = np.frombuffer(base64.b64decode(text, validate=True), np.uint8)
    if len(codes) != num_units:
        raise ValueError(f"{len(codes)} codes for {num_units} units")
    return codes
