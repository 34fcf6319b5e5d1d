from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asr_kd.targets import codec
from asr_kd.targets import reduced as module
from asr_kd.targets.posteriors import SparsePosteriors
from asr_kd.targets.reduced import divergence, reduced


def log_softmax(frames: int, units: int, seed: int = 0, spread: float = 3.0) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(0, spread, (frames, units))
    return (logits - np.log(np.exp(logits).sum(1, keepdims=True))).astype(np.float32)


@pytest.fixture(params=["numpy", "device"])
def sums(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways; the one of a device runs on the CPU here."""
    if request.param == "device":
        of_tensor: Callable[..., object] = lambda values, places: module._sums_on_device(torch.tensor(values), places)  # noqa: E731
        monkeypatch.setattr(module, "_sums", of_tensor)


@pytest.mark.usefixtures("sums")
@pytest.mark.parametrize(("units", "k", "mass"), [(7, 3, 0.9), (7, 7, 1.0), (300, 20, 0.99), (1, 1, 1.0)])
def test_divergence_against_dense_algebra(units: int, k: int, mass: float) -> None:
    dense = log_softmax(40, units)
    kept = SparsePosteriors.from_dense(dense, k, mass)
    stored = codec.decode(codec.encode(kept))
    others, probs = stored.padded(k)
    full = np.zeros(dense.shape)
    for row, count in enumerate(stored.counts.tolist()):
        full[row] = stored.tail[row] / max(units - count, 1)
        full[row, others[row, :count]] = probs[row, :count]
    expected = (np.exp(dense.astype(np.float64)) * (dense - np.log(full))).sum(1)
    np.testing.assert_allclose(divergence(reduced(kept, dense), stored), expected, atol=1e-6)


@pytest.mark.usefixtures("sums")
def test_what_is_left_over_by_unit() -> None:
    dense = log_softmax(50, 12)
    kept = SparsePosteriors.from_dense(dense, 3, 0.8)
    probs = np.exp(dense.astype(np.float64))
    is_kept = np.zeros(dense.shape, bool)
    is_kept[np.repeat(np.arange(50), kept.counts), kept.units] = True
    full = reduced(kept, dense)
    np.testing.assert_allclose(full.rest, np.where(is_kept, 0, probs).sum(1), atol=1e-6)
    np.testing.assert_allclose(full.leftover[0], np.where(is_kept, 0, probs).sum(0), atol=1e-5)
    np.testing.assert_allclose(full.leftover[1], (~is_kept * full.rest[:, None]).sum(0), atol=1e-5)


@pytest.mark.usefixtures("sums")
def test_a_unit_without_probability_costs_nothing_and_one_without_room_everything() -> None:
    with np.errstate(divide="ignore"):
        dense = np.log(np.array([[0.5, 0.5, 0.0, 0.0], [0.7, 0.2, 0.1, 0.0]], np.float32))
    kept = SparsePosteriors.from_dense(dense, 2)
    stored = SparsePosteriors(kept.counts, kept.units, kept.log_probs, np.zeros(2, np.float32), 4)
    found = divergence(reduced(kept, dense), stored)
    assert found[0] == pytest.approx(0.0, abs=1e-6) and found[1] == np.inf


@given(st.integers(0, 10_000))
def test_the_order_within_a_frame_does_not_matter(seed: int) -> None:
    """Rounding makes close probabilities equal, and equals are read back in the order of units."""
    dense = log_softmax(5, 30, seed, 0.1)
    kept = SparsePosteriors.from_dense(dense, 20)
    stored = codec.decode(codec.encode(kept))
    full = reduced(stored, dense)
    np.testing.assert_allclose(divergence(reduced(kept, dense), stored), divergence(full, stored), rtol=1e-9)
