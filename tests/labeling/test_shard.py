from __future__ import annotations

import itertools

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from asr_kd.labeling.shard import hold, occupancy


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


@given(seed=st.integers(0, 2**32 - 1), frames=st.integers(1, 5), ids=st.lists(st.integers(1, 2), max_size=2))
def test_occupancy_is_the_share_of_the_paths_that_spell_the_text(seed: int, frames: int, ids: list[int]) -> None:
    probs = np.random.default_rng(seed).dirichlet(np.ones(3), frames)
    paths = [path for path in itertools.product(range(3), repeat=frames) if spelled(np.array(path)) == ids]
    if not paths:
        return
    shares = np.zeros((frames, 3))
    for path in paths:
        for frame, unit in enumerate(path):
            shares[frame, unit] += np.prod(probs[np.arange(frames), path])
    with torch.inference_mode():
        log_probs = torch.from_numpy(probs).float().log()
    found = occupancy(log_probs, ids)
    np.testing.assert_allclose(found.exp(), shares / shares.sum(1, keepdims=True), atol=1e-5)
    assert found.isfinite().all()


def test_the_occupancy_of_a_single_path_is_the_alignment() -> None:
    log_probs = torch.full((3, 4), 0.25).log()
    assert occupancy(log_probs, [2, 2]).exp().round(decimals=5).tolist() == [[0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 1, 0]]
