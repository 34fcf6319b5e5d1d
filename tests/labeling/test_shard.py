from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from asr_kd.labeling.shard import hold


def spelled(path: np.ndarray) -> list[int]:
    return [unit for unit, _ in itertools.groupby(path.tolist()) if unit]


@given(path=st.lists(st.integers(0, 3), max_size=20).map(np.array), frames=st.integers(1, 6))
def test_held_units_spell_the_same(path: np.ndarray, frames: int) -> None:
    path = path.astype(np.int64)
    held = hold(path, frames)
    assert spelled(held) == spelled(path)
    assert np.all(held[path != 0] == path[path != 0]), "only blanks give way"
    for frame in np.flatnonzero(held != path):
        recent = path[max(0, frame - frames + 1) : frame]
        assert recent[recent != 0][-1] == held[frame], "the last unit goes on, and no longer than asked"


def test_a_spike_lasts_until_the_next_and_a_blank_parts_equals() -> None:
    path = np.array([0, 1, 0, 0, 0, 2, 0, 2, 0, 0, 3])
    np.testing.assert_array_equal(hold(path, 3), [0, 1, 1, 1, 0, 2, 0, 2, 2, 2, 3])
