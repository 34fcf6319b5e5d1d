from __future__ import annotations

import functools

import numpy as np
import pytest

from asr_kd.targets.posteriors import SparsePosteriors
from asr_kd.targets.prior import fit_prior, from_text, gain, leftover, prior_of, to_text


def utterances(lengths: tuple[int, ...] = (30, 50)) -> list[np.ndarray]:
    """Posteriors over 60 units, some of which are likelier than others everywhere."""
    rng = np.random.default_rng(0)
    common = rng.normal(0, 2, 60)
    logits = [common + rng.normal(0, 3, (frames, 60)) for frames in lengths]
    return [(one - np.log(np.exp(one).sum(1, keepdims=True))).astype(np.float32) for one in logits]


def test_what_it_saves_is_what_the_divergences_say() -> None:
    dense = utterances()
    kept = [SparsePosteriors.from_dense(one, 5, 0.9) for one in dense]
    total = functools.reduce(np.add, map(leftover, kept, dense))
    prior = prior_of(fit_prior(total))
    assert prior.sum() == pytest.approx(1.0) and prior.min() > 0
    even = sum(one.divergence(full).sum() for one, full in zip(kept, dense, strict=True))
    shaped = sum(one.divergence(full, prior).sum() for one, full in zip(kept, dense, strict=True))
    assert gain(total, prior, kept) == pytest.approx(even - shaped, abs=1e-3)
    assert shaped < 0.9 * even


def test_divergence_with_a_prior_against_dense_algebra() -> None:
    (dense,) = utterances((7,))
    kept = SparsePosteriors.from_dense(dense, 4, 0.8)
    prior = np.random.default_rng(1).dirichlet(np.ones(60))
    units, probs = kept.padded(4)
    full = np.zeros(dense.shape)
    for row, count in enumerate(kept.counts.tolist()):
        others = np.setdiff1d(np.arange(60), units[row, :count])
        full[row, others] = kept.tail[row] * prior[others] / prior[others].sum()
        full[row, units[row, :count]] = probs[row, :count]
    expected = (np.exp(dense) * (dense - np.log(full))).sum(1)
    np.testing.assert_allclose(kept.divergence(dense, prior), expected, atol=1e-5)


def test_text_and_back() -> None:
    codes = np.arange(60, dtype=np.uint8)
    np.testing.assert_array_equal(from_text(to_text(codes), 60), codes)
    for text, units in ((to_text(codes), 61), ("?", 60)):
        with pytest.raises(ValueError, match=r"codes for|base64|Incorrect|characters"):
            from_text(text, units)


def test_nothing_left_over_is_an_even_prior() -> None:
    np.testing.assert_allclose(prior_of(fit_prior(np.zeros((2, 4)))), 0.25)
