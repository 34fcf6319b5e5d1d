"""Sound of any length → pieces of a bounded one, cut where it is quiet."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

#: a cut lies in this part of what a piece may hold, so that neither it nor what follows is tiny
FROM, UNTIL = 0.5, 0.9
#: seconds over which the quietest place is looked for
PAUSE = 0.2


def pieces(blocks: Iterable[np.ndarray], rate: int, seconds: float) -> Iterator[tuple[int, np.ndarray]]:
    """Cut sound that comes in blocks; memory holds a piece and a block.

    Args:
        blocks: float32 [samples], of any lengths.
        rate: of their samples, Hz.
        seconds: the longest that a piece may be.

    Yields:
        number of its first sample, and the piece: together all samples, in order.
    """
    longest = int(seconds * rate)
    held, start = np.empty(0, np.float32), 0
    for block in blocks:
        held = np.concatenate([held, block])
        while len(held) > longest:
            cut = _quietest(held[:longest], int(PAUSE * rate))
            yield start, held[:cut]
            held, start = held[cut:], start + cut
    if len(held):
        yield start, held


def _quietest(sound: np.ndarray, pause: int) -> int:
    """The middle of the window of `pause` samples with the least energy, between FROM and UNTIL."""
    first, last = int(FROM * len(sound)), int(UNTIL * len(sound))
    sums = np.concatenate([[0.0], np.cumsum(sound[first:last].astype(np.float64) ** 2)])
    return first + int((sums[pause:] - sums[:-pause]).argmin()) + pause // 2
