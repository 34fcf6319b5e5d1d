"""A full distribution reduced to the few numbers needed to tell later what was lost; computed where the full one is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from asr_kd.targets.posteriors import SparsePosteriors

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Reduced:
    """An utterance's distribution p, reduced to a few numbers a frame.

    Attributes:
        probs: float64 [entries], p of each of the units `kept`.
        negentropy: float64 [frames], sum of p ln p over all units.
        rest: float64 [frames], sum of p over all units not kept.
        leftover: float64 [2, units]: p of each unit summed over the frames in which it was not kept, and `rest` summed over
            these frames. Those of several utterances add up.
    """

    kept: SparsePosteriors
    probs: np.ndarray
    negentropy: np.ndarray
    rest: np.ndarray
    leftover: np.ndarray


def reduced(kept: SparsePosteriors, log_probs: Tensor | np.ndarray) -> Reduced:
    """Reduce a full distribution, float [frames, units], natural logarithm, on its device; only results leave it."""
    rows = kept.rows
    flat_indices = rows * kept.num_units + kept.units
    sums = _sums if isinstance(log_probs, np.ndarray) or log_probs.device.type == "cpu" else _sums_on_device
    probs, negentropy, rest, mass = sums(log_probs, flat_indices)
    exposed = rest.sum() - np.bincount(kept.units, rest[rows], minlength=kept.num_units)
    return Reduced(kept, probs, negentropy, rest, np.stack([mass, exposed]))


def _sums(log_probs: Tensor | np.ndarray, indices: np.ndarray) -> tuple[np.ndarray, ...]:
    values = np.asarray(log_probs)
    full = np.exp(values)
    with np.errstate(invalid="ignore"):
        negentropy = np.where(full > 0, full * values, 0.0).sum(1, dtype=np.float64)
    flat = full.reshape(-1)
    probs = flat[indices].astype(np.float64)
    flat[indices] = 0.0
    return probs, negentropy, full.sum(1, dtype=np.float64), full.sum(0, dtype=np.float64)


def _sums_on_device(log_probs: Any, indices: np.ndarray) -> tuple[np.ndarray, ...]:
    """As `_sums` in PyTorch, which is slower than numpy on a CPU."""
    import torch  # not at the top: processes that only encode do not need it

    full = log_probs.exp()
    negentropy = torch.where(full > 0, full * log_probs, 0.0).sum(1, dtype=torch.float64)
    flat, where = full.view(-1), torch.from_numpy(indices).to(full.device)
    probs = flat[where].double()
    flat.index_fill_(0, where, 0.0)
    found = probs, negentropy, full.sum(1, dtype=torch.float64), full.sum(0, dtype=torch.float64)
    return tuple(one.cpu().numpy() for one in found)


def divergence(full: Reduced, stored: SparsePosteriors) -> np.ndarray:
    """Kullback-Leibler divergence from the full distribution (normalised here) to a stored one, its tail spread evenly.

    Returns float64 [frames], in nat; infinite if a unit has mass in the full distribution and none in the stored one, which
    has the units of `full.kept`, in any order within a frame.
    """
    starts = stored.starts
    cross = np.add.reduceat(full.probs * _in_order(stored, full.kept), starts)
    left = np.maximum(stored.num_units - stored.counts.astype(np.float64), 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = np.where(full.rest > 0, full.rest * np.log(stored.tail.astype(np.float64) / left), 0.0)
    sums = np.add.reduceat(full.probs, starts) + full.rest
    return (full.negentropy - cross - spread) / sums - np.log(sums)


def _in_order(stored: SparsePosteriors, kept: SparsePosteriors) -> np.ndarray:
    """The stored log-probabilities in the order of `kept`: units whose rounded values are equal may have been swapped."""
    if np.array_equal(stored.units, kept.units):
        return stored.log_probs
    rows = kept.rows * kept.num_units
    found = np.empty_like(stored.log_probs)
    found[np.argsort(rows + kept.units)] = stored.log_probs[np.argsort(rows + stored.units)]
    return found
