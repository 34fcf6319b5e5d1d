"""Combining the soft targets of several teachers, with exact tails; and resampling them to another frame period.

A teacher's distribution is completed first: its tail is spread over the units that it did not keep in a frame, evenly or in
proportion to a prior. The result keeps every unit that any teacher kept; its tail is the combined mass of all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from asr_kd.errors import UserError
from asr_kd.targets.posteriors import MAX_KEPT, SparsePosteriors

CombineMode = Literal["mean", "log_mean", "confidence", "surest"]

#: least mass of a prior on the units that were not kept; less is lost in rounding
EPSILON = np.finfo(np.float64).eps


def combine(
    targets: Sequence[SparsePosteriors],
    mode: CombineMode = "mean",
    weights: Sequence[float] | None = None,
    priors: Sequence[np.ndarray] | None = None,
) -> SparsePosteriors:
    """Combine several distributions q_i a frame, completed, with the weights w_i / Σ w.

    - `mean`: Σ w_i q_i;
    - `log_mean`: Π q_i^w_i, normalised over all units, kept or not;
    - `confidence`: Σ w_i c_i q_i / Σ w_i c_i with the `certainty` c_i of each in the frame;
    - `surest`: the q_i with the largest w_i c_i, the first of equal ones.

    Kept are the units that any teacher with a weight above 0 kept, the best MAX_KEPT of a frame. A single teacher is
    returned unchanged.

    Args:
        targets: with the same units and number of frames.
        mode: see above.
        weights: at least 0, not all 0; None: equal.
        priors: float64 [units] each, above 0 and adding up to 1, for spreading each tail; None: evenly.

    Raises:
        UserError: when no unit of a frame has a probability from all teachers in mode `log_mean`.
    """
    first = targets[0]
    fixed = np.ones(len(targets)) if weights is None else np.asarray(weights, np.float64)
    if len(fixed) != len(targets) or not (fixed >= 0).all() or not 0 < fixed.sum() < np.inf:
        raise ValueError(f"weights {weights} for {len(targets)} teachers")
    if any((one.frames, one.num_units) != (first.frames, first.num_units) for one in targets):
        raise ValueError(f"frames and units differ: {[(one.frames, one.num_units) for one in targets]}")
    used = [index for index, weight in enumerate(fixed) if weight]
    if len(used) == 1:
        return targets[used[0]]
    every = [_even(first.num_units)] * len(targets) if priors is None else priors
    targets, every = [targets[index] for index in used], [every[index] for index in used]
    fixed = fixed[used] / fixed[used].sum()
    if mode == "log_mean":
        return _log_mean(targets, fixed, every)
    by_frame = np.repeat(fixed[:, None], first.frames, axis=1)
    if mode in ("confidence", "surest"):
        by_frame *= [certainty(target, prior) for target, prior in zip(targets, every, strict=True)]
    if mode == "surest":
        by_frame = (np.arange(len(targets))[:, None] == by_frame.argmax(0)).astype(np.float64)
    elif mode == "confidence":
        by_frame /= by_frame.sum(0)
    return _mean(targets, by_frame, every)


def combine_priors(
    priors: Sequence[np.ndarray], mode: CombineMode, weights: Sequence[float], leftover: Sequence[float]
) -> np.ndarray:
    """The proportions in which the tail of a combination is spread: float64 [units], adding up to 1.

    For `log_mean` the weighted geometric mean of the priors, which is exact. Otherwise their mean, weighted by w_i and by the
    mass that each teacher did not keep; the tail of a single frame may be composed differently.

    Args:
        priors: float64 [units] each, above 0 and adding up to 1.
        mode: as of `combine`.
        weights: above 0.
        leftover: mean mass that each teacher did not keep, at least 0.
    """
    shares = np.asarray(weights, np.float64)
    if mode == "log_mean":
        return _geometric(priors, shares / shares.sum())[0]
    by_tail = shares * np.asarray(leftover)
    shares = by_tail if by_tail.sum() > 0 else shares
    return np.asarray(shares @ np.stack(priors) / shares.sum())


def certainty(target: SparsePosteriors, prior: np.ndarray | None = None) -> np.ndarray:
    """exp(-H) of each frame's completed distribution, float64 [frames], H its entropy in nat: 1 if one unit has all, 1 / units if
    all are equal.

    It is the inverse of the perplexity, the number of units the teacher hesitates between. Weighting recognisers frame by
    frame by their entropy is from Misra, Bourlard and Tyagi (ICASSP 2003), who use 1 / H; exp(-H) stays finite when a teacher
    is sure. `prior` as of `combine`.
    """
    prior = _even(target.num_units) if prior is None else prior
    rows, probs = target.rows, np.exp(target.log_probs, dtype=np.float64)
    kept = np.bincount(rows, probs * target.log_probs, target.frames)
    share = _share(target, prior)
    own = prior * np.log(prior)
    others = own.sum() - np.bincount(rows, own[target.units], target.frames)
    spread = np.where(share > 0, target.tail * np.log(np.where(share > 0, share, 1.0)) + share * others, 0.0)
    return np.exp(np.minimum(kept + spread, 0.0))


def resample(
    target: SparsePosteriors,
    frame_ms: int,
    offset_ms: int,
    frames: int,
    wanted_ms: int,
    prior: np.ndarray | None = None,
    anywhere: bool = False,
) -> SparsePosteriors:
    """Soft targets on another grid of frames, averaged by overlap in time.

    A wanted frame t covers [t p, (t+1) p), a given frame f covers [o + f P, o + (f+1) P), in whole milliseconds. A wanted
    frame is the mean of the (completed) given frames that it overlaps, weighted by the overlap; the nearest one if it overlaps
    none.

    Args:
        target: on the given grid.
        frame_ms: P.
        offset_ms: o.
        frames: number of wanted frames.
        wanted_ms: p.
        prior: as of `combine`.
        anywhere: starts and ends may differ by any time.

    Raises:
        UserError: when starts or ends differ by at least one frame of each grid together, unless they may.
    """
    if (frame_ms, offset_ms, target.frames) == (wanted_ms, 0, frames):
        return target
    end, wanted_end = offset_ms + target.frames * frame_ms, frames * wanted_ms
    if not anywhere and max(abs(offset_ms), abs(end - wanted_end)) >= frame_ms + wanted_ms:
        raise UserError(
            f"its {target.frames} frames of {frame_ms} ms cover {offset_ms} to {end} ms, the {frames} wanted ones of "
            f"{wanted_ms} ms cover 0 to {wanted_end} ms; label this audio again"
        )
    start = np.arange(frames) * wanted_ms
    first, last = (
        np.clip((edge - offset_ms) // frame_ms, 0, target.frames - 1) for edge in (start, start + wanted_ms - 1)
    )
    # int64 [most given frames that a wanted one overlaps, frames]
    given = np.minimum(first + np.arange((last - first).max() + 1)[:, None], last)
    begins = offset_ms + given * frame_ms
    overlap = np.minimum(start + wanted_ms, begins + frame_ms) - np.maximum(start, begins)
    overlap[np.arange(len(given))[:, None] > last - first] = 0  # these repeat the last one
    overlap = np.maximum(overlap, 0)
    overlap[0, overlap.sum(0) == 0] = 1
    weights = overlap / overlap.sum(0)
    prior = _even(target.num_units) if prior is None else prior
    return _mean([_taken(target, row) for row in given], weights, [prior] * len(given))


def _taken(target: SparsePosteriors, frames: np.ndarray) -> SparsePosteriors:
    """Some frames (int64), in any order, any of them several times."""
    counts = target.counts[frames].astype(np.int64)
    entries = np.repeat(target.starts[frames] - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
    return SparsePosteriors(
        target.counts[frames], target.units[entries], target.log_probs[entries], target.tail[frames], target.num_units
    )


def _mean(targets: Sequence[SparsePosteriors], weights: np.ndarray, priors: Sequence[np.ndarray]) -> SparsePosteriors:
    """Σ w_i q_i; weights: float64 [targets, frames], of each frame adding up to 1."""
    union = _Union.of(targets, weights)
    probs, tail = np.zeros(len(union.ids)), np.zeros(targets[0].frames)
    for target, indices, weight, prior in zip(targets, union.indices, weights, priors, strict=True):
        share = _share(target, prior)
        probs += weight[union.rows] * union.completed(target, indices, share, prior)
        tail += weight * share * union.left(prior)
    return union.kept(probs, tail)


def _log_mean(
    targets: Sequence[SparsePosteriors], weights: np.ndarray, priors: Sequence[np.ndarray]
) -> SparsePosteriors:
    """Π q_i^w_i, normalised; weights: float64 [targets], above 0 and adding up to 1."""
    union = _Union.of(targets, np.repeat(weights[:, None], targets[0].frames, axis=1))
    prior, total = _geometric(priors, weights)
    logs, tail = np.zeros(len(union.ids)), np.zeros(targets[0].frames)
    with np.errstate(divide="ignore"):
        for target, indices, weight, own in zip(targets, union.indices, weights, priors, strict=True):
            share = _share(target, own)
            logs += weight * np.log(union.completed(target, indices, share, own))
            tail += weight * np.log(share)
        tail += np.log(total * union.left(prior))
    largest = np.maximum(np.maximum.reduceat(logs, union.starts), tail)
    if not np.isfinite(largest).all():
        raise UserError(
            f"no unit of frame {np.flatnonzero(~np.isfinite(largest))[0]} has a probability from all teachers, and a mean of "
            "log-probabilities needs one; choose combine.mode=mean"
        )
    return union.kept(np.exp(logs - largest[union.rows]), np.exp(tail - largest))


def _geometric(priors: Sequence[np.ndarray], weights: np.ndarray) -> tuple[np.ndarray, float]:
    """Π s_i^w_i over the units, normalised, and its sum before that."""
    product = np.exp(weights @ np.log(np.stack(priors)))
    return product / product.sum(), float(product.sum())


def _even(num_units: int) -> np.ndarray:
    return np.full(num_units, 1.0 / num_units)


def _left(prior: np.ndarray, rows: np.ndarray, ids: np.ndarray, frames: int) -> np.ndarray:
    """float64 [frames]: the prior's mass on units that are not kept in the frame; 0 if all are kept."""
    left = 1.0 - np.bincount(rows, prior[ids], frames)
    return np.where(np.bincount(rows, minlength=frames) < len(prior), np.maximum(left, EPSILON), 0.0)


def _share(target: SparsePosteriors, prior: np.ndarray) -> np.ndarray:
    """float64 [frames]: factor on the prior that gives the probabilities of units not kept; 0 if all are kept."""
    left = _left(prior, target.rows, target.units, target.frames)
    return np.where(left > 0, target.tail / np.where(left > 0, left, 1.0), 0.0)


@dataclass
class _Union:
    """The units kept by any of several distributions.

    Attributes:
        rows: int64 [entries], frame of each entry, rising.
        ids: int64 [entries], unit of each entry, rising within a frame.
        starts: int64 [frames], index of each frame's first entry.
        indices: for each distribution int64, where its own entries are among these; -1 for those with weight 0.
    """

    rows: np.ndarray
    ids: np.ndarray
    starts: np.ndarray
    indices: list[np.ndarray]
    num_units: int

    @classmethod
    def of(cls, targets: Sequence[SparsePosteriors], weights: np.ndarray) -> _Union:
        """The union for weights float64 [targets, frames]; where a weight is 0, the distribution's units do not count."""
        num_units = targets[0].num_units
        every = [target.rows for target in targets]
        keys = np.concatenate([row * num_units + target.units for row, target in zip(every, targets, strict=True)])
        counting = np.flatnonzero(np.concatenate([weight[row] > 0 for weight, row in zip(weights, every, strict=True)]))
        order = counting[np.argsort(keys[counting])]
        union = keys[order]
        new = np.diff(union, prepend=-1) != 0
        indices = np.full(len(keys), -1)
        indices[order] = np.cumsum(new) - 1
        rows, ids = np.divmod(union[new], num_units)
        counts = np.bincount(rows, minlength=targets[0].frames)
        by_target = np.split(indices, np.cumsum([len(row) for row in every])[:-1])
        return cls(rows, ids, np.cumsum(counts) - counts, by_target, num_units)

    def completed(
        self, target: SparsePosteriors, indices: np.ndarray, share: np.ndarray, prior: np.ndarray
    ) -> np.ndarray:
        """float64 [entries]: a completed distribution's probabilities of all units here; `share` as of `_share`, `indices` its own."""
        probs = share[self.rows] * prior[self.ids]
        counts = indices >= 0
        probs[indices[counts]] = np.exp(target.log_probs[counts], dtype=np.float64)
        return probs

    def left(self, prior: np.ndarray) -> np.ndarray:
        """float64 [frames]: the prior's mass on all other units."""
        return _left(prior, self.rows, self.ids, len(self.starts))

    def kept(self, probs: np.ndarray, tail: np.ndarray) -> SparsePosteriors:
        """The distribution with these probabilities [entries] and tails [frames], normalised; keeps the best MAX_KEPT."""
        totals = np.add.reduceat(probs, self.starts) + tail
        with np.errstate(divide="ignore"):
            log_probs = np.log(probs / totals[self.rows]).astype(np.float32)
        # by frame, then by falling log-probability (its bits without the sign rise as integers); ties stay in unit order
        falling = log_probs.view(np.int32).astype(np.int64) & 0x7FFFFFFF
        order = np.argsort((self.rows << 32) | falling, kind="stable")
        rows, probs = self.rows, probs[order]
        keep = (np.arange(len(rows)) - self.starts[rows] < MAX_KEPT) & (probs > 0)
        tail = tail + np.bincount(rows[~keep], probs[~keep], len(tail))
        return SparsePosteriors(
            np.bincount(rows[keep], minlength=len(tail)).astype(np.uint8),
            self.ids[order[keep]].astype(np.int32),
            log_probs[order[keep]],
            (tail / totals).astype(np.float32),
            self.num_units,
        )
