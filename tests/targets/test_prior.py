from __future__ import annotations

import functools

import numpy as np
import pytest

from asr_kd.targets.posteriors import SparsePosteriors
from asr_kd.targets.prior import fit_prior, from_text, gain, prior_of, to_text
from asr_kd.targets.reduced import reduced


def utterances(lengths: tuple[int, ...] = (30, 50)) -> list[np.ndarray]:
    """Posteriors over 60 units, some of which are likelier than others everywhere."""
    rng = np.random.default_rng(0)
    common = rng.normal(0, 2, 60)
    logits = [common + rng.normal(0, 3, (frames, 60)) for frames in lengths]
    return [(one - np.log(np.exp(one).sum(1, keepdims=True))).astype(np.float32) for one in logits]


def dense_divergence(kept: SparsePosteriors, log_probs: np.ndarray, prior: np.ndarray) -> float:
    """Nat, summed over the frames, the tail spread in the proportions of the prior."""
    total = 0.0
    for row, start, count, tail in zip(log_probs, kept.starts, kept.counts, kept.tail, strict=True):
        units = kept.units[start : start + count]
        others = np.setdiff1d(np.arange(len(row)), units)
        stored = np.zeros(len(row))
        stored[others] = tail * prior[others] / prior[others].sum()
        stored[units] = np.exp(kept.log_probs[start : start + count])
        total += float((np.exp(row) * (row - np.log(stored))).sum())
    return total


def test_what_it_saves_is_what_dense_algebra_says() -> None:
    dense = utterances()
    kept = [SparsePosteriors.from_dense(one, 5, 0.9) for one in dense]
    total = functools.reduce(np.add, (reduced(*pair).leftover for pair in zip(kept, dense, strict=True)))
    prior = prior_of(fit_prior(total))
    assert prior.sum() == pytest.approx(1.0) and prior.min() > 0
    even, shaped = (
        sum(dense_divergence(*pair, shape) for pair in zip(kept, dense, strict=True)) for shape in (np.ones(60), prior)
    )
    assert gain(total, prior, kept) == pytest.approx(even - shaped, abs=1e-3)
    assert shaped < 0.9 * even


def test_text_and_back() -> None:
    codes = np.arange(60, dtype=np.uint8)
    np.testing.assert_array_equal(from_text(to_text(codes), 60), codes)
    for text, units in ((to_text(codes), 61), ("?", 60)):
        with pytest.raises(ValueError, match=r"codes for|base64|Incorrect|characters"):
            from_text(text, units)


def test_nothing_left_over_is_an_even_prior() -> None:
    np.testing.assert_allclose(prior_of(fit_prior(np.zeros((2, 4)))), 0.25)
