from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from asr_kd.audio.pieces import pieces

RATE = 100


@given(
    st.integers(0, 3000), st.lists(st.integers(1, 900), min_size=1, max_size=20), st.floats(5.0, 9.0), st.integers(0, 9)
)
def test_nothing_is_lost_and_blocks_do_not_matter(samples: int, sizes: list[int], seconds: float, seed: int) -> None:
    sound = np.random.default_rng(seed).normal(0, 0.1, samples).astype(np.float32)
    cuts = np.cumsum(sizes)
    whole = list(pieces([sound], RATE, seconds))
    split = list(pieces(np.split(sound, cuts[cuts < samples]), RATE, seconds))
    assert [start for start, _ in whole] == [start for start, _ in split]
    assert all(np.array_equal(one, other) for (_, one), (_, other) in zip(whole, split, strict=True))
    assert np.array_equal(np.concatenate([sound[:0], *(piece for _, piece in whole)]), sound)
    assert all(0 < len(piece) <= seconds * RATE for _, piece in whole)
    # of a recording that is cut no piece is a scrap
    assert len(whole) < 2 or min(len(piece) for _, piece in whole) >= 0.1 * int(seconds * RATE)


def test_a_cut_lies_in_the_pause() -> None:
    sound = np.random.default_rng(0).normal(0, 0.1, 40 * RATE).astype(np.float32)
    sound[18 * RATE : 19 * RATE] *= 0.01
    starts = [start for start, _ in pieces([sound], RATE, 30.0)]
    assert len(starts) == 2 and 18 * RATE < starts[1] < 19 * RATE
