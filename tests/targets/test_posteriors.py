from __future__ import annotations

import hypothesis.extra.numpy as npst
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asr_kd.errors import UserError
from asr_kd.targets import posteriors
from asr_kd.targets.posteriors import SparsePosteriors


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    logits = logits - logits.max(1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


# few different values, so that ties are common; wide enough that some probabilities underflow
LOGITS = npst.arrays(
    np.float32,
    st.tuples(st.integers(1, 6), st.sampled_from([1, 2, 7, 40, 300])),
    elements=st.sampled_from([-200.0, -3.0, -1.0, 0.0, 0.5, 2.0, 6.0]),
)


@given(logits=LOGITS, k=st.integers(1, 255), mass=st.sampled_from([0.3, 0.9, 0.999, 1.0]))
def test_from_dense_keeps_what_its_definition_says(logits: np.ndarray, k: int, mass: float) -> None:
    dense = log_softmax(logits).astype(np.float32)
    sparse = SparsePosteriors.from_dense(dense, k, mass)
    assert (sparse.frames, sparse.num_units) == dense.shape
    start = 0
    for row, count, tail in zip(dense, sparse.counts.tolist(), sparse.tail, strict=True):
        units, log_probs = sparse.units[start : start + count], sparse.log_probs[start : start + count]
        start += count
        best = sorted(range(len(row)), key=lambda unit: (-row[unit], unit))
        assert units.tolist() == best[:count]
        np.testing.assert_array_equal(log_probs, row[units])
        probs = np.exp(row.astype(np.float64))
        kept = probs[units].sum()
        assert tail == pytest.approx(np.delete(probs, units).sum(), abs=1e-6)
        assert (tail > 0) == (count < len(row))
        assert count <= k
        positive = int((np.exp(row) > 0).sum())
        assert kept >= mass - 1e-6 or count == min(k, positive) or (mass < 1 and count == min(k, len(row)))
        if mass < 1.0:
            assert count == 1 or kept - probs[units[-1]] < mass + 1e-6  # no entry more than needed
        else:
            assert count == min(k, positive)


@pytest.mark.parametrize("k", [1, 20, 100, 250])
def test_the_searches_equal_a_full_sort(k: int) -> None:
    rng = np.random.default_rng(0)
    dense = log_softmax(rng.normal(0, 2, (50, 3701)).round(1)).astype(np.float32)
    expected = np.argsort(-dense, axis=1, kind="stable")[:, :k]
    for search in (posteriors._largest, posteriors._largest_on_device):
        counts, units, best = search(torch.from_numpy(dense), k, 0.0)
        assert (counts == k).all()
        np.testing.assert_array_equal(units.reshape(50, k), expected)
        np.testing.assert_array_equal(best.reshape(50, k), np.take_along_axis(dense, expected, 1))
    np.testing.assert_array_equal(SparsePosteriors.from_dense(dense, k).units.reshape(50, k), expected)


@given(logits=LOGITS, floor=st.sampled_from([1e-4, 0.01, 0.3]), mass=st.sampled_from([0.9, 1.0]))
def test_below_the_floor_nothing_is_kept_but_the_best(logits: np.ndarray, floor: float, mass: float) -> None:
    dense = log_softmax(logits).astype(np.float32)
    free, sparse = (SparsePosteriors.from_dense(dense, 20, mass, least) for least in (0.0, floor))
    for row in range(len(dense)):
        mine, theirs = (p.log_probs[p.starts[row] :][: p.counts[row]] for p in (sparse, free))
        above = max(1, int((theirs >= np.float32(np.log(floor))).sum()))
        np.testing.assert_array_equal(mine, theirs[:above])


@given(logits=LOGITS, k=st.integers(1, 20), floor=st.sampled_from([0.0, 0.01, 0.9]))
def test_the_searches_find_the_same(logits: np.ndarray, k: int, floor: float) -> None:
    dense = torch.from_numpy(log_softmax(logits).astype(np.float32))
    on_host, on_device = (
        search(dense, min(k, dense.shape[1]), floor) for search in (posteriors._largest, posteriors._largest_on_device)
    )
    for mine, theirs in zip(on_host, on_device, strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("value", [np.nan, np.inf, 5.0])
def test_from_dense_refuses_what_is_no_distribution(value: float) -> None:
    dense = log_softmax(np.zeros((3, 4))).astype(np.float32)
    dense[1] = value if value != 5.0 else -9.0
    with pytest.raises(UserError, match="frame 1 do not add up to 1"):
        SparsePosteriors.from_dense(dense, 2, 0.9)


def test_alignment_is_one_certain_unit_a_frame() -> None:
    sparse = SparsePosteriors.from_alignment(np.array([0, 3, 3, 1]), 4)
    units, probs = sparse.padded(2)
    np.testing.assert_array_equal(units, [[0, 0], [3, 0], [3, 0], [1, 0]])
    np.testing.assert_array_equal(probs, [[1, 0]] * 4)
    assert sparse.tail.tolist() == [0, 0, 0, 0]
    with pytest.raises(ValueError, match="alignment"):
        SparsePosteriors.from_alignment(np.array([0, 4]), 4)


def test_padded_cuts_and_fills() -> None:
    sparse = SparsePosteriors.from_dense(np.log(np.array([[0.7, 0.2, 0.1], [0.01, 0.98, 0.01]], np.float32)), 3, 0.95)
    assert sparse.counts.tolist() == [3, 1]
    units, probs = sparse.padded(2)
    assert units.tolist() == [[0, 1], [1, 0]]
    np.testing.assert_allclose(probs, [[0.7, 0.2], [0.98, 0.0]], rtol=1e-6)
    assert sparse.padded(5)[0].shape == (2, 5)


def test_draws_are_unbiased_and_whole() -> None:
    dense = log_softmax(np.random.default_rng(0).normal(0, 2, (4, 30)))
    sums = np.zeros(dense.shape)
    for seed in range(400):
        sparse = SparsePosteriors.sampled(dense, 20, np.random.default_rng(seed))
        units, probs = sparse.padded(20)
        np.testing.assert_allclose(probs.sum(1), 1, rtol=1e-6)
        np.testing.assert_allclose(probs * 20, np.rint(probs * 20), atol=1e-5)
        assert (np.diff(probs, axis=1) <= 0).all() and not sparse.tail.any()
        np.add.at(sums, (np.arange(4)[:, None], units), probs)
    error = np.sqrt(np.exp(dense) / (400 * 20))
    assert (np.abs(sums / 400 - np.exp(dense)) < 5 * error + 1e-3).all()
    with pytest.raises(UserError, match="frame 0 do not add up to 1"):
        SparsePosteriors.sampled(np.full((2, 3), np.nan, np.float32), 2, np.random.default_rng(0))
