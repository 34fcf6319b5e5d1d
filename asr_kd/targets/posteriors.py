"""SparsePosteriors: per frame a few (unit, log-probability) pairs and the mass left over."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from asr_kd.errors import UserError

MAX_KEPT = 255
# A softmax in float32 over some thousand units adds up to 1 within about 1e-6, one rounded to float16 within 2e-3.
SUM_TOLERANCE = 5e-3
#: numbers of a block of frames that is gone through several times
CACHED = 1 << 17
#: a key above all: minus infinity, and no unit
EMPTY = 0x7F800000 << 32
#: mass that is left over at least, where a unit was not kept
LEAST = 1e-12


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

    def __getitem__(self, frames: slice) -> SparsePosteriors:
        """A stretch of frames."""
        begin, end, _ = frames.indices(self.frames)
        first, last = (int(self.counts[:edge].sum(dtype=np.int64)) for edge in (begin, end))
        entries = slice(first, last)
        return SparsePosteriors(
            self.counts[begin:end], self.units[entries], self.log_probs[entries], self.tail[begin:end], self.num_units
        )

    @classmethod
    def from_dense(
        cls, log_probs: Tensor | np.ndarray, k: int, mass: float = 1.0, floor: float = 0.0
    ) -> SparsePosteriors:
        """Keep of each frame the fewest units that reach `mass` together, at most `k`; of equals the lower unit first.

        Args:
            log_probs: float [frames, units], normalised natural log-probabilities, on any device: what is looked at twice
                stays there.
            k: 1 to 255.
            mass: in (0, 1]; at 1 all units with a probability above 0, up to `k`.
            floor: units less probable than this are not kept, the most probable one of a frame excepted.

        Raises:
            UserError: when a frame is not a distribution.
        """
        values = torch.as_tensor(log_probs)
        frames, num_units = values.shape
        if not (1 <= k <= MAX_KEPT and 0.0 < mass <= 1.0 and 0.0 <= floor < 1.0 and frames > 0 and num_units > 0):
            raise ValueError(f"k {k}, mass {mass}, floor {floor}, log_probs {tuple(values.shape)}")
        k = min(k, num_units)
        # on a CPU as many frames as its cache holds
        block = frames if values.is_cuda else max(1, CACHED // num_units)
        search = _largest_on_device if values.is_cuda else _largest
        best = [search(values[row : row + block].float(), k, floor) for row in range(0, frames, block)]
        return cls._of_best(best, mass, floor, num_units)

    @classmethod
    def _of_best(
        cls, blocks: list[tuple[np.ndarray, np.ndarray]], mass: float, floor: float, num_units: int
    ) -> SparsePosteriors:
        """What is kept of the best units (int64) and their log-probabilities [frames of a block, at most k]."""
        width = max(units.shape[1] for units, _ in blocks)
        units, best = (
            np.concatenate([np.pad(part, ((0, 0), (0, width - part.shape[1])), constant_values=fill) for part in parts])
            for parts, fill in zip(zip(*blocks, strict=True), (0, -np.inf), strict=True)
        )
        probs = np.exp(best)
        if floor:
            probs[:, 1:][best[:, 1:] < math.log(floor)] = 0.0
        reached = np.cumsum(probs, axis=1, dtype=np.float64)
        counts = (probs > 0).sum(1)
        # all others together are as probable as the last one each, at most, or as the floor
        others = (num_units - counts) * np.maximum(probs[np.arange(len(probs)), counts - 1], floor)
        _refuse_broken(reached[:, -1], others)
        if mass < 1.0:
            counts = np.minimum(counts, 1 + (reached[:, :-1] < mass).sum(1))
        mask = np.arange(width) < counts[:, None]
        tail = 1.0 - reached[np.arange(len(counts)), counts - 1]
        # rounding must not lose what was left out, however little it is
        tail = np.where(counts < num_units, np.maximum(tail, LEAST), 0.0)
        return cls(
            counts.astype(np.uint8), units[mask].astype(np.int32), best[mask], tail.astype(np.float32), num_units
        )

    @classmethod
    def sampled(cls, log_probs: Tensor | np.ndarray, draws: int, generator: np.random.Generator) -> SparsePosteriors:
        """Draw units of each frame with replacement; a unit's probability is its share of the draws.

        The expectation of what is kept is the distribution itself, so that a student's loss is unbiased, tail and all (Random
        Sampling KD, arXiv 2503.16870).

        Args:
            log_probs: float [frames, units], normalised natural log-probabilities, on any device.
            draws: 1 to 255, of each frame.
        """
        values = torch.as_tensor(log_probs).double()
        frames, num_units = values.shape
        if not (1 <= draws <= MAX_KEPT and frames > 0 and num_units > 0):
            raise ValueError(f"draws {draws}, log_probs {tuple(values.shape)}")
        reached = values.exp().cumsum(1)
        _refuse_broken(reached[:, -1].cpu().numpy())
        points = torch.from_numpy(generator.random((frames, draws))).to(reached.device) * reached[:, -1:]
        units = torch.searchsorted(reached, points, right=True).clamp(max=num_units - 1).cpu().numpy()
        flat, counts = np.unique(units + num_units * np.arange(frames)[:, None], return_counts=True)
        rows, units = np.divmod(flat, num_units)
        order = np.lexsort((units, -counts, rows))
        log_shares = np.log(counts[order] / draws).astype(np.float32)
        kept = np.bincount(rows, minlength=frames).astype(np.uint8)
        return cls(kept, units[order].astype(np.int32), log_shares, np.zeros(frames, np.float32), num_units)

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

    def unkept(self, prior: np.ndarray) -> np.ndarray:
        """float64 [frames]: what a distribution, float64 [units], has for the units of a frame that were not kept."""
        return np.maximum(1.0 - np.add.reduceat(prior[self.units], self.starts), np.finfo(np.float64).tiny)

    def divergence(self, log_probs: np.ndarray, prior: np.ndarray | None = None) -> np.ndarray:
        """Kullback-Leibler divergence from the full distribution to this one, the tail spread over the units not kept.

        Args:
            log_probs: float [frames, units], the full distribution (normalised here).
            prior: float [units], in whose proportions the tail is spread; None spreads it evenly.

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
        if prior is None:
            shape: Any = 0.0
            left = np.maximum(self.num_units - self.counts.astype(np.float64), 1)
        else:
            shape = full @ np.log(prior)
            left = self.unkept(prior)
        with np.errstate(divide="ignore", invalid="ignore"):
            spread = np.where(rest > 0, rest * np.log(self.tail.astype(np.float64) / left) + shape, 0.0)
        return (entropy - cross - spread) / sums - np.log(sums)


def _refuse_broken(sums: np.ndarray, others: np.ndarray | float = 0.0) -> None:
    """Refuse frames whose probabilities cannot add up to 1, those of the `others` being so large at most."""
    wrong = np.flatnonzero(~((sums < 1 + SUM_TOLERANCE) & (sums + others > 1 - SUM_TOLERANCE)))
    if wrong.size:
        raise UserError(
            f"the probabilities of frame {wrong[0]} do not add up to 1 (its best units have {sums[wrong[0]]:.4g}); "
            "the teacher's weights are broken"
        )


def _largest(log_probs: Tensor, k: int, floor: float) -> tuple[np.ndarray, np.ndarray]:
    """The k largest of each row, falling, equals by position; fewer columns where no row has as many above the floor.

    Returns:
        int64 and float32 [rows, at most k]; a row with fewer ends in minus infinity.
    """
    rows, columns = log_probs.shape
    values = log_probs.numpy()
    width = next((width for width in (32, 16, 8) if columns // width > 2 * k), 1)
    bound = np.full((rows, 1), math.log(floor) if floor else -np.inf, np.float32)
    maxima = log_probs[:, : columns // width * width].view(rows, -1, width).amax(2).numpy() if width > 1 else values
    if width > 1:
        # the k-th largest block maximum is no larger than the k-th largest value: what is below it is out
        bound = np.maximum(bound, np.partition(maxima, maxima.shape[1] - k, axis=1)[:, maxima.shape[1] - k, None])
    bound = np.minimum(bound, maxima.max(1, keepdims=True))
    flat = np.flatnonzero(~(values < bound))  # what is no number is found, and refused, later
    row = flat // columns
    counts = np.bincount(row, minlength=rows)
    place = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    keys = np.full((rows, int(counts.max())), EMPTY)
    keys[row, place] = _keys(values.reshape(-1)[flat].view(np.int32).astype(np.int64), flat - row * columns)
    keys.sort(axis=1)
    keys = keys[:, :k]
    return (keys & 0xFFFFFFFF), -(keys >> 32).astype(np.uint32).view(np.float32)


def _largest_on_device(log_probs: Tensor, k: int, floor: float) -> tuple[np.ndarray, np.ndarray]:
    """The same where operations are cheap and many; only its result leaves the device."""
    keys = _keys(log_probs.view(torch.int32).long(), torch.arange(log_probs.shape[1], device=log_probs.device))
    keys = keys.topk(k, dim=1, largest=False, sorted=True)[0].cpu().numpy()
    return (keys & 0xFFFFFFFF), -(keys >> 32).astype(np.uint32).view(np.float32)


def _keys(bits: np.ndarray | Tensor, positions: np.ndarray | Tensor) -> Any:
    """Integers that rise as log-probabilities, given as the bits of float32, fall; equals rise with their position.

    Minus a log-probability is a non-negative float, whose bits rise with its value.

    Args:
        bits, positions: int64.
    """
    return ((bits & 0x7FFFFFFF) << 32) | positions
