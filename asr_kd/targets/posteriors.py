"""SparsePosteriors: for each frame a few (unit, log-probability) pairs and the mass of all other units."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from asr_kd.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

MAX_KEPT = 255
# A softmax in float32 over some thousand units adds up to 1 within about 1e-6, one rounded to float16 within 2e-3.
SUM_TOLERANCE = 5e-3
#: numbers in a block of frames that is read several times: as many as a CPU's cache holds
CACHED = 1 << 19
#: least tail of a frame in which some unit was not kept
LEAST = 1e-12


@dataclass
class SparsePosteriors:
    """A distribution over units for every frame of an utterance; only likely units are kept.

    Attributes:
        counts: uint8 [frames], number of units kept, at least 1.
        units: int32 [entries], ids of the kept units, frame after frame, each frame's most probable first.
        log_probs: float32 [entries], natural logarithm of their probabilities.
        tail: float32 [frames], probability mass of all units that were not kept.
        num_units: number of units of the whole distribution.
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
    def rows(self) -> np.ndarray:
        """int64 [entries], frame of each entry."""
        return np.repeat(np.arange(self.frames), self.counts)

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
        """Keep in each frame the fewest units that together reach `mass`, at most `k`; on a tie the lower unit first.

        Args:
            log_probs: float [frames, units], normalised natural log-probabilities, on any device; only results leave it.
            k: 1 to 255.
            mass: in (0, 1]; 1 keeps all units with a probability above 0, up to `k`.
            floor: units less probable than this are not kept, except the most probable one of a frame.

        Raises:
            UserError: when a frame is not a distribution.
        """
        import torch  # not at the top: reading and encoding do not need it

        values = torch.as_tensor(log_probs)
        frames, num_units = values.shape
        if not (1 <= k <= MAX_KEPT and 0.0 < mass <= 1.0 and 0.0 <= floor < 1.0 and frames > 0 and num_units > 0):
            raise ValueError(f"k {k}, mass {mass}, floor {floor}, log_probs {tuple(values.shape)}")
        k = min(k, num_units)
        # on a CPU as many frames as its cache holds
        block = frames if values.is_cuda else max(1, CACHED // num_units)
        search = _largest_on_device if values.is_cuda else _largest
        found = [search(values[row : row + block].float(), k, floor) for row in range(0, frames, block)]
        counts, ids, best = (
            np.concatenate(parts) if len(parts) > 1 else parts[0] for parts in zip(*found, strict=True)
        )
        starts, probs = np.cumsum(counts) - counts, np.exp(best)
        sums = np.add.reduceat(probs, starts, dtype=np.float64)
        # each of the others is at most as probable as the last one, or as the floor
        _refuse_broken(sums, (num_units - counts) * np.maximum(probs[starts + counts - 1], floor))
        keep = counts
        if not floor:
            keep = np.add.reduceat(probs > 0, starts, dtype=np.int64)
        if mass < 1.0:
            reached = np.cumsum(probs, dtype=np.float64)
            short = reached - np.repeat(reached[starts] - probs[starts], counts) < mass
            keep = np.minimum(keep, 1 + np.add.reduceat(short, starts, dtype=np.int64))
        if (keep < counts).any():
            mask = np.arange(len(ids)) < np.repeat(starts + keep, counts)
            ids, best, probs, counts = ids[mask], best[mask], probs[mask], keep
            sums = np.add.reduceat(probs, np.cumsum(counts) - counts, dtype=np.float64)
        # a tail must not be rounded to 0 if units were left out
        tail = np.where(counts < num_units, np.maximum(1.0 - sums, LEAST), 0.0)
        return cls(counts.astype(np.uint8), ids.astype(np.int32), best, tail.astype(np.float32), num_units)

    @classmethod
    def sampled(cls, log_probs: Tensor | np.ndarray, draws: int, generator: np.random.Generator) -> SparsePosteriors:
        """Draw units of each frame with replacement; a unit's probability is its share of the draws.

        The expectation of the result is the full distribution, so a student's loss is unbiased (Random Sampling KD, arXiv
        2503.16870).

        Args:
            log_probs: float [frames, units], normalised natural log-probabilities, on any device.
            draws: draws a frame, 1 to 255.
        """
        import torch

        values = torch.as_tensor(log_probs).double()
        frames, num_units = values.shape
        if not (1 <= draws <= MAX_KEPT and frames > 0 and num_units > 0):
            raise ValueError(f"draws {draws}, log_probs {tuple(values.shape)}")
        reached = values.exp().cumsum(1)
        _refuse_broken(reached[:, -1].cpu().numpy())
        points = torch.from_numpy(generator.random((frames, draws))).to(reached.device) * reached[:, -1:]
        ids = torch.searchsorted(reached, points, right=True).clamp(max=num_units - 1).cpu().numpy()
        flat, counts = np.unique(ids + num_units * np.arange(frames)[:, None], return_counts=True)
        rows, ids = np.divmod(flat, num_units)
        order = np.lexsort((ids, -counts, rows))
        log_shares = np.log(counts[order] / draws).astype(np.float32)
        kept = np.bincount(rows, minlength=frames).astype(np.uint8)
        return cls(kept, ids[order].astype(np.int32), log_shares, np.zeros(frames, np.float32), num_units)

    @classmethod
    def from_alignment(cls, ids: np.ndarray, num_units: int) -> SparsePosteriors:
        """One certain unit a frame: ids int [frames], each below `num_units`."""
        ids = np.asarray(ids)
        if ids.size == 0 or ids.min() < 0 or ids.max() >= num_units:
            raise ValueError(f"alignment of {ids.size} frames over {num_units} units")
        zeros = np.zeros(len(ids), np.float32)
        return cls(np.ones(len(ids), np.uint8), ids.astype(np.int32), zeros, zeros.copy(), num_units)

    def padded(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The first `k` entries of every frame: units int64 and probabilities float32, both [frames, k].

        Where there is no entry, unit 0 with probability 0.
        """
        mask = np.arange(max(k, int(self.counts.max()))) < self.counts[:, None]
        units = np.zeros(mask.shape, np.int64)
        probs = np.zeros(mask.shape, np.float32)
        units[mask] = self.units
        probs[mask] = np.exp(self.log_probs)
        return units[:, :k], probs[:, :k]

    def dense(self, prior: np.ndarray | None = None) -> np.ndarray:
        """The probabilities of all units, float32 [frames, units], of each frame adding up to 1.

        The tail is spread over the units that were not kept in proportion to a distribution, float64 [units]; None: evenly.
        """
        prior = np.full(self.num_units, 1.0 / self.num_units) if prior is None else prior
        share = np.where(self.counts < self.num_units, self.tail / self.unkept(prior), 0.0)
        found = share[:, None] * prior
        found[self.rows, self.units] = np.exp(self.log_probs)
        return (found / found.sum(1, keepdims=True)).astype(np.float32)

    def unkept(self, prior: np.ndarray) -> np.ndarray:
        """float64 [frames]: the mass of a distribution, float64 [units], on the units that were not kept in the frame."""
        return np.maximum(1.0 - np.add.reduceat(prior[self.units], self.starts), np.finfo(np.float64).tiny)


def _refuse_broken(sums: np.ndarray, others: np.ndarray | float = 0.0) -> None:
    """Refuse frames whose probabilities cannot add up to 1; `others` bounds the mass that is not in `sums`."""
    wrong = np.flatnonzero(~((sums < 1 + SUM_TOLERANCE) & (sums + others > 1 - SUM_TOLERANCE)))
    if wrong.size:
        raise UserError(
            f"the probabilities of frame {wrong[0]} do not add up to 1 (its best units have {sums[wrong[0]]:.4g}); "
            "the teacher's weights are broken"
        )


def _largest(log_probs: Tensor, k: int, floor: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The k largest values of each row that reach the floor, falling, ties by position; always the largest one.

    Returns their number in each row, int64 [rows], and their positions, int64, and values, float32 [entries], row after row.
    """
    rows, columns = log_probs.shape
    values = log_probs.numpy()
    bound: Any = np.float32(math.log(floor)) if floor else np.float32(-np.inf)
    width = next((width for width in (32, 16, 8) if columns // width > 2 * k), 1)
    if width > 1:
        # the k-th largest of the maxima of groups is at most the k-th largest value: what is below it is out; the members
        # of a group are far apart, so that units that are likely together are in different groups
        maxima = values[:, : columns // width * width].reshape(rows, width, -1).max(1)
        bound = np.maximum(bound, np.partition(maxima, maxima.shape[1] - k, axis=1)[:, maxima.shape[1] - k, None])
    flat = _true(~(values < bound))  # NaN passes here and is refused later
    row = flat // columns
    counts = np.bincount(row, minlength=rows)
    if empty := np.flatnonzero(counts == 0).tolist():
        row = np.concatenate([row, empty])
        flat = np.concatenate([flat, [index * columns + int(values[index].argmax()) for index in empty]])
        counts[empty] = 1
    shift = (columns - 1).bit_length()
    keys = _keys(values.reshape(-1)[flat].view(np.int32).astype(np.int64), flat - row * columns, shift)
    keys |= row << (31 + shift)
    keys.sort()
    if counts.max() > k:
        keys = keys[np.arange(len(keys)) < np.repeat(np.cumsum(counts) - counts + k, counts)]
        counts = np.minimum(counts, k)
    return counts, *_values(keys, shift)


def _true(mask: np.ndarray) -> np.ndarray:
    """`np.flatnonzero`, faster if little is true: it skips eight values at a time."""
    flat = mask.reshape(-1)
    whole = len(flat) & ~7
    words = flat[:whole].view(np.uint64)
    found = np.flatnonzero(words != 0)
    inner = np.flatnonzero(words[found].view(bool))
    return np.concatenate([(found[inner >> 3] << 3) + (inner & 7), whole + np.flatnonzero(flat[whole:])])


def _largest_on_device(log_probs: Tensor, k: int, floor: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As `_largest`, on the device; only the result leaves it."""
    import torch

    columns = log_probs.shape[1]
    shift = (columns - 1).bit_length()
    keys = _keys(log_probs.view(torch.int32).long(), torch.arange(columns, device=log_probs.device), shift)
    keys = keys.topk(k, dim=1, largest=False, sorted=True)[0].cpu().numpy()
    ids, best = _values(keys, shift)
    kept = ~(best < np.float32(math.log(floor))) if floor else np.ones(keys.shape, bool)
    kept[:, 0] = True
    return kept.sum(1), ids[kept], best[kept]


def _keys(bits: np.ndarray | Tensor, positions: np.ndarray | Tensor, shift: int) -> Any:
    """Integers that sort by falling log-probability, float32 given as its bits (int64), then by rising position, below 2 ** `shift`.

    Minus a log-probability is a non-negative float, whose bits rise with its value.
    """
    return ((bits & 0x7FFFFFFF) << shift) | positions


def _values(keys: np.ndarray, shift: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions, int64, and log-probabilities, float32, of such integers."""
    return keys & ((1 << shift) - 1), -((keys >> shift) & 0x7FFFFFFF).astype(np.uint32).view(np.float32)
