"""SparsePosteriors: per frame a few (unit, log-probability) pairs and the mass left over."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from asr_kd.errors import UserError

MAX_KEPT = 255
# A softmax in float32 over some thousand units adds up to 1 within about 1e-6, one rounded to float16 within 2e-3.
SUM_TOLERANCE = 5e-3
# Units in one block of the search for the best: a power of two that makes the block maxima few and their scan cheap.
BLOCK = 32


@dataclass
class SparsePosteriors:
    """A distribution over units for every frame of an utterance, of which only the likely units are kept.

    Attributes:
        counts: uint8 [frames], units kept of each frame, at least 1.
        units: int32 [entries], the kept units, frame after frame, each frame's most probable first.
        log_probs: float32 [entries], natural logarithm of their probabilities.
        tail: float32 [frames], probability mass of all units that were not kept.
        num_units: units of the whole distribution.
    """

    counts: np.ndarray
    units: np.ndarray
    log_probs: np.ndarray
    tail: np.ndarray
    num_units: int

    @property
    def frames(self) -> int:
        """Number of frames."""
        return len(self.counts)

    @property
    def starts(self) -> np.ndarray:
        """int64 [frames], position of each frame's first entry."""
        return np.cumsum(self.counts, dtype=np.int64) - self.counts

    @classmethod
    def from_dense(cls, log_probs: np.ndarray, k: int, mass: float) -> SparsePosteriors:
        """Keep of each frame the fewest units that reach `mass` together, at most `k`; of equals the lower unit first.

        Args:
            log_probs: float [frames, units], normalised natural log-probabilities.
            k: 1 to 255.
            mass: in (0, 1]; at 1 all units with a probability above 0, up to `k`.

        Raises:
            UserError: when a frame is not a distribution.
        """
        frames, num_units = log_probs.shape
        if not (1 <= k <= MAX_KEPT and 0.0 < mass <= 1.0 and frames > 0 and num_units > 0):
            raise ValueError(f"k {k}, mass {mass}, log_probs {log_probs.shape}")
        log_probs = np.minimum(log_probs, 0.0, dtype=np.float32)
        with np.errstate(all="ignore"):
            full = np.exp(log_probs)
            sums = full.sum(1, dtype=np.float64)
        wrong = np.flatnonzero(~(np.abs(sums - 1.0) < SUM_TOLERANCE))
        if wrong.size:
            raise UserError(
                f"the probabilities of frame {wrong[0]} add up to {sums[wrong[0]]:.4g}, not 1; "
                "the teacher's weights are broken"
            )
        units, best = _largest(log_probs, min(k, num_units))
        probs = np.exp(best)
        reached = np.cumsum(probs, axis=1, dtype=np.float64)
        counts = 1 + (reached[:, :-1] < mass).sum(1) if mass < 1.0 else (probs > 0).sum(1)
        mask = np.arange(units.shape[1]) < counts[:, None]
        # the rest is summed, not subtracted from 1: rounding must neither invent mass nor lose a small one
        full[np.repeat(np.arange(frames), counts), units[mask]] = 0.0
        return cls(counts.astype(np.uint8), units[mask], best[mask], full.sum(1), num_units)

    @classmethod
    def from_alignment(cls, ids: np.ndarray, num_units: int) -> SparsePosteriors:
        """One certain unit a frame.

        Args:
            ids: int [frames], each below `num_units`.
        """
        ids = np.asarray(ids)
        if ids.size == 0 or ids.min() < 0 or ids.max() >= num_units:
            raise ValueError(f"alignment of {ids.size} frames over {num_units} units")
        zeros = np.zeros(len(ids), np.float32)
        return cls(np.ones(len(ids), np.uint8), ids.astype(np.int32), zeros, zeros.copy(), num_units)

    def padded(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The first `k` entries of every frame as rectangles.

        Returns:
            units int64 and probabilities float32 [frames, k]; unit 0 with probability 0 where there is no entry.
        """
        mask = np.arange(max(k, int(self.counts.max()))) < self.counts[:, None]
        units = np.zeros(mask.shape, np.int64)
        probs = np.zeros(mask.shape, np.float32)
        units[mask] = self.units
        probs[mask] = np.exp(self.log_probs)
        return units[:, :k], probs[:, :k]

    def divergence(self, log_probs: np.ndarray) -> np.ndarray:
        """Kullback-Leibler divergence from the full distribution to this one, the tail spread evenly over the others.

        Args:
            log_probs: float [frames, units], the full distribution (normalised here).

        Returns:
            float64 [frames], in nat; infinite where the teacher gives mass to units that have none here.
        """
        full = np.exp(log_probs, dtype=np.float64 if log_probs.dtype == np.float64 else np.float32)
        with np.errstate(invalid="ignore"):
            entropy = np.where(full > 0, full * log_probs, 0.0).sum(1, dtype=np.float64)
        rows = np.repeat(np.arange(self.frames), self.counts)
        p = full[rows, self.units].astype(np.float64)
        starts = self.starts
        full[rows, self.units] = 0.0
        rest = full.sum(1, dtype=np.float64)
        sums = np.add.reduceat(p, starts) + rest
        cross = np.add.reduceat(p * self.log_probs, starts)
        left = self.num_units - self.counts.astype(np.int64)
        with np.errstate(divide="ignore", invalid="ignore"):
            spread = np.where(rest > 0, rest * np.log(self.tail.astype(np.float64) / np.maximum(left, 1)), 0.0)
        return (entropy - cross - spread) / sums - np.log(sums)


def _largest(log_probs: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k largest of each row, falling, equals by position: int32 and float32 [rows, k]."""
    rows, columns = log_probs.shape
    # Order as integers: minus a log-probability is a non-negative float, whose bits rise with its value; the position
    # below them breaks ties.
    if columns <= 4 * BLOCK or columns // BLOCK < k:
        keys = _keys(log_probs, np.arange(columns, dtype=np.uint64))
    else:
        # The k-th largest block maximum is no larger than the k-th largest value: what is below it is out.
        whole = columns // BLOCK * BLOCK
        maxima = log_probs[:, :whole].reshape(rows, -1, BLOCK).max(2)
        bound = np.partition(maxima, maxima.shape[1] - k, axis=1)[:, maxima.shape[1] - k]
        row, column = np.divmod(np.flatnonzero(log_probs >= bound[:, None]), columns)
        counts = np.bincount(row, minlength=rows)
        place = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
        keys = np.full((rows, int(counts.max())), np.uint64(2**64 - 1))
        keys[row, place] = _keys(log_probs[row, column], column.astype(np.uint64))
    keys = np.sort(keys, axis=1)[:, :k]
    return (keys & np.uint64(0xFFFFFFFF)).astype(np.int32), -(keys >> np.uint64(32)).astype(np.uint32).view(np.float32)


def _keys(log_probs: np.ndarray, positions: np.ndarray) -> np.ndarray:
    # abs, not minus: it makes the negative zero positive
    return (np.abs(log_probs).view(np.uint32).astype(np.uint64) << np.uint64(32)) | positions
