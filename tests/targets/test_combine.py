from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asr_kd.distillation.response import soft_cross_entropy
from asr_kd.errors import UserError
from asr_kd.targets.codec import encode
from asr_kd.targets.combine import CombineMode, certainty, combine, combine_priors, resample
from asr_kd.targets.posteriors import MAX_KEPT, SparsePosteriors

MODES: tuple[CombineMode, ...] = get_args(CombineMode)
SEEDS = st.integers(0, 2**32 - 1)


def drawn(rng: np.random.Generator, frames: int, num_units: int) -> SparsePosteriors:
    """Frames that keep one unit, some, or all, and leave over little or much."""
    parts = []
    for _ in range(frames):
        dense = rng.dirichlet(np.full(num_units, rng.choice([0.3, 3.0]))) * 0.99 + 0.01 / num_units
        parts.append(SparsePosteriors.from_dense(np.log(dense)[None], int(rng.integers(1, min(num_units, 255) + 1))))
    return SparsePosteriors(
        *(np.concatenate([getattr(one, name) for one in parts]) for name in ("counts", "units", "log_probs", "tail")),
        num_units,
    )


def drawn_prior(rng: np.random.Generator, num_units: int) -> np.ndarray:
    return rng.dirichlet(np.ones(num_units)) * 0.9 + 0.1 / num_units


def completed(target: SparsePosteriors, prior: np.ndarray | None = None) -> np.ndarray:
    """float64 [frames, units]: the definition, unit by unit."""
    dense = np.zeros((target.frames, target.num_units))
    start = 0
    for row, count, tail in zip(dense, target.counts.tolist(), target.tail, strict=True):
        units = target.units[start : start + count]
        row[:] = 1.0 if prior is None else prior
        row[units] = 0.0
        if row.sum() > 0:
            row *= tail / row.sum()
        row[units] = np.exp(target.log_probs[start : start + count], dtype=np.float64)
        start += count
    return dense


def expected(dense: np.ndarray, mode: str, weights: np.ndarray) -> np.ndarray:
    """float64 [frames, units] of [teachers, frames, units]."""
    weights = weights / weights.sum()
    if mode == "log_mean":
        product = np.prod(dense ** weights[:, None, None], axis=0)
        return product / product.sum(1, keepdims=True)
    if mode in ("confidence", "surest"):
        entropy = -(dense * np.log(np.where(dense > 0, dense, 1.0))).sum(2)
        by_frame = weights[:, None] * np.exp(-entropy)
        if mode == "surest":
            return np.stack([dense[best, row] for row, best in enumerate(by_frame.argmax(0))])
        return ((by_frame / by_frame.sum(0))[:, :, None] * dense).sum(0)
    return np.tensordot(weights, dense, 1)


def kept_in(target: SparsePosteriors) -> list[list[int]]:
    return [part.tolist() for part in np.split(target.units, target.starts[1:])]


def compare(found: SparsePosteriors, dense: np.ndarray) -> None:
    """Whether what is kept is right, and what is not adds up to the tail; and what always holds."""
    rows = np.repeat(np.arange(found.frames), found.counts)
    np.testing.assert_allclose(np.exp(found.log_probs), dense[rows, found.units], rtol=2e-6)
    rest = dense.copy()
    rest[rows, found.units] = 0.0
    np.testing.assert_allclose(found.tail, rest.sum(1), rtol=1e-5, atol=1e-9)
    sums = np.add.reduceat(np.exp(found.log_probs, dtype=np.float64), found.starts) + found.tail
    np.testing.assert_allclose(sums, 1.0, atol=1e-6)
    encode(found)  # refuses what is not sorted, out of range or contradicts itself


@pytest.mark.parametrize("mode", MODES)
@given(seed=SEEDS, teachers=st.integers(1, 4), num_units=st.integers(1, 12), with_prior=st.booleans())
def test_every_mode_is_what_its_algebra_says(
    mode: CombineMode, seed: int, teachers: int, num_units: int, with_prior: bool
) -> None:
    rng = np.random.default_rng(seed)
    targets = [drawn(rng, 3, num_units) for _ in range(teachers)]
    priors = [drawn_prior(rng, num_units) for _ in targets]
    weights = rng.uniform(0.1, 2.0, teachers)
    dense = np.stack([completed(*pair) for pair in zip(targets, priors if with_prior else [None] * 4, strict=False)])
    dense /= dense.sum(2, keepdims=True)  # they are so but for the float32 of what is kept
    found = combine(targets, mode, weights.tolist(), priors if with_prior else None)
    compare(found, expected(dense, mode, weights))
    unions = [sorted(set().union(*units)) for units in zip(*map(kept_in, targets), strict=True)]
    if mode == "surest":  # what one of them kept
        choices = zip(*map(kept_in, targets), strict=True)
        assert all(sorted(units) in map(sorted, one) for units, one in zip(kept_in(found), choices, strict=True))
    else:
        assert [sorted(units) for units in kept_in(found)] == unions


@pytest.mark.parametrize("mode", MODES)
@given(seed=SEEDS)
def test_the_order_of_teachers_one_teacher_and_none(mode: CombineMode, seed: int) -> None:
    rng = np.random.default_rng(seed)
    targets = [drawn(rng, 4, 9) for _ in range(3)]
    priors = [drawn_prior(rng, 9) for _ in targets]
    weights = [0.2, 1.5, 3.0]
    one = combine(targets, mode, weights, priors)
    other = combine(targets[::-1], mode, weights[::-1], priors[::-1])
    np.testing.assert_allclose(completed(one), completed(other), rtol=1e-5)
    for unused in (targets[:1], targets):
        assert combine(unused, mode, [2.0] + [0.0] * (len(unused) - 1)) is targets[0]
    # weights count among themselves only, and a teacher that says the same twice is one with twice the weight
    if mode != "surest":
        np.testing.assert_allclose(
            completed(combine(targets[:2], mode, [2, 1], priors[:2])),
            completed(combine([targets[0], *targets[:2]], mode, [7, 7, 7], [priors[0], *priors[:2]])),
            rtol=1e-4,
        )
    same = combine([targets[0]] * 2, mode, None, [priors[0]] * 2)
    np.testing.assert_array_equal(same.units, targets[0].units)
    np.testing.assert_allclose(completed(same), completed(targets[0]), rtol=1e-5)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "surest"])
def test_more_units_than_can_be_kept_go_to_the_tail(mode: CombineMode) -> None:
    rng = np.random.default_rng(0)
    dense = rng.dirichlet(np.ones(600), (2, 3))
    targets = [SparsePosteriors.from_dense(np.log(one), 200) for one in dense]
    found = combine(targets, mode)
    assert (found.counts == MAX_KEPT).all()
    exact = expected(np.stack([completed(one) for one in targets]), mode, np.ones(2))
    compare(found, exact)
    for row, units in zip(exact, kept_in(found), strict=True):
        dropped = set().union(*(set(one.units) for one in targets)) - set(units)
        assert min(row[units]) >= max(row[list(dropped)]) * (1 - 1e-6)


def test_certainty_is_one_over_the_perplexity() -> None:
    def of(*probs: float) -> float:
        with np.errstate(divide="ignore"):
            return float(certainty(SparsePosteriors.from_dense(np.log([probs]), 2))[0])

    assert of(1.0, 0.0, 0.0, 0.0) == pytest.approx(1.0)
    assert of(0.5, 0.5, 0.0, 0.0) == pytest.approx(0.5)
    assert of(0.25, 0.25, 0.25, 0.25) == pytest.approx(0.25)  # two of them are in the tail
    alignment = SparsePosteriors.from_alignment(np.array([1, 2]), 4)
    np.testing.assert_array_equal(certainty(alignment), 1.0)
    # who is sure decides
    unsure = SparsePosteriors.from_dense(np.log(np.full((2, 4), 0.25)), 4)
    assert np.exp(combine([unsure, alignment], "confidence").log_probs[0]) == pytest.approx(0.25 * 0.2 + 0.8)


@given(seed=SEEDS)
def test_log_mean_has_the_geometric_mean_of_the_priors_for_its_tail(seed: int) -> None:
    rng = np.random.default_rng(seed)
    targets = [drawn(rng, 3, 9) for _ in range(3)]
    priors = [drawn_prior(rng, 9) for _ in targets]
    weights = [1.0, 2.0, 0.5]
    found = combine(targets, "log_mean", weights, priors)
    prior = combine_priors(priors, "log_mean", weights, [0.1, 0.0, 0.0])
    dense = np.stack([completed(*pair) for pair in zip(targets, priors, strict=True)])
    np.testing.assert_allclose(completed(found, prior), expected(dense, "log_mean", np.array(weights)), rtol=1e-4)


def test_the_prior_of_a_mean_is_of_those_who_leave_something_over() -> None:
    priors = [np.array([0.7, 0.2, 0.1]), np.array([0.1, 0.1, 0.8]), np.full(3, 1 / 3)]
    mixed = combine_priors(priors, "mean", [1.0, 2.0, 5.0], [0.02, 0.03, 0.0])
    np.testing.assert_allclose(mixed, 0.25 * priors[0] + 0.75 * priors[1])
    np.testing.assert_allclose(combine_priors(priors[:2], "confidence", [1.0, 3.0], [0.0, 0.0]), [0.25, 0.125, 0.625])


@given(seed=SEEDS)
def test_the_loss_against_a_mean_is_the_mean_of_the_losses(seed: int) -> None:
    rng = np.random.default_rng(seed)
    targets = [drawn(rng, 5, 11) for _ in range(3)]
    weights = rng.uniform(0.1, 1.0, 3)
    logits = torch.from_numpy(rng.normal(0, 2, (5, 11)))

    def loss(target: SparsePosteriors) -> np.ndarray:
        arrays = (*target.padded(11), target.tail)
        return soft_cross_entropy(logits, *map(torch.from_numpy, arrays), "uniform").numpy()

    mean = np.tensordot(weights / weights.sum(), [loss(target) for target in targets], 1)
    np.testing.assert_allclose(loss(combine(targets, "mean", weights.tolist())), mean, rtol=1e-5)


def by_the_millisecond(dense: np.ndarray, frame_ms: int, offset_ms: int, frames: int, wanted_ms: int) -> np.ndarray:
    """The mean over time, a millisecond at a time."""
    rows = []
    for frame in range(frames):
        at = [(ms - offset_ms) // frame_ms for ms in range(frame * wanted_ms, (frame + 1) * wanted_ms)]
        there = [place for place in at if 0 <= place < len(dense)]
        rows.append(dense[there].mean(0) if there else dense[min(max(at[0], 0), len(dense) - 1)])
    return np.stack(rows)


@given(
    seed=SEEDS, frame_ms=st.sampled_from([1, 7, 10, 20, 30, 40, 60, 80]), offset_ms=st.integers(-45, 45),
    wanted_ms=st.sampled_from([7, 10, 30, 40]), frames=st.integers(1, 9), off=st.integers(-1, 1), with_prior=st.booleans(),
)  # fmt: skip
def test_another_frame_period_is_a_mean_over_time(
    seed: int, frame_ms: int, offset_ms: int, wanted_ms: int, frames: int, off: int, with_prior: bool
) -> None:
    rng = np.random.default_rng(seed)
    given_frames = max(1, (frames * wanted_ms - offset_ms) // frame_ms + off)
    target = drawn(rng, given_frames, 6)
    prior = drawn_prior(rng, 6) if with_prior else None
    end = offset_ms + given_frames * frame_ms
    if max(abs(offset_ms), abs(end - frames * wanted_ms)) >= frame_ms + wanted_ms:
        with pytest.raises(UserError, match=rf"{given_frames} frames of {frame_ms} ms cover {offset_ms} to {end} ms"):
            resample(target, frame_ms, offset_ms, frames, wanted_ms, prior)
        return
    found = resample(target, frame_ms, offset_ms, frames, wanted_ms, prior)
    dense = by_the_millisecond(completed(target, prior), frame_ms, offset_ms, frames, wanted_ms)
    compare(found, dense / dense.sum(1, keepdims=True))
    # one teacher's tails have one shape: nothing of it is lost
    np.testing.assert_allclose(completed(found, prior), dense, rtol=1e-4, atol=1e-9)


def test_frame_periods_by_hand() -> None:
    ids = np.array([0, 1, 2, 3])
    sixty = resample(SparsePosteriors.from_alignment(ids, 4), 60, 0, 7, 30)
    np.testing.assert_array_equal(sixty.units, [0, 0, 1, 1, 2, 2, 3])  # the last is half used
    forty = resample(SparsePosteriors.from_alignment(ids, 4), 40, 0, 5, 30)
    np.testing.assert_allclose(
        completed(forty),
        [[1, 0, 0, 0], [1 / 3, 2 / 3, 0, 0], [0, 2 / 3, 1 / 3, 0], [0, 0, 1, 0], [0, 0, 0, 1]],
        atol=1e-7,
    )
    ten = resample(SparsePosteriors.from_alignment(np.array([0, 0, 1, 2, 2, 2, 3]), 4), 10, 0, 3, 30)
    np.testing.assert_allclose(completed(ten), [[2 / 3, 1 / 3, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], atol=1e-7)
    # its frames begin 30 ms late: the first of ours gets the nearest
    late = resample(SparsePosteriors.from_alignment(ids, 4), 30, 30, 5, 30)
    np.testing.assert_array_equal(late.units, [0, 0, 1, 2, 3])
    same = SparsePosteriors.from_alignment(ids, 4)
    assert resample(same, 30, 0, 4, 30) is same
    resample(same, 40, 0, 7, 30)  # ends 50 ms before ours, within a frame of each together
    for frame_ms, offset_ms, frames in ((40, 0, 3), (40, 0, 8), (40, -70, 3), (40, 70, 8)):
        with pytest.raises(UserError, match=r"4 frames of 40 ms cover .* label this audio again"):
            resample(same, frame_ms, offset_ms, frames, 30)


def test_what_cannot_be_combined_is_refused() -> None:
    one, other = (SparsePosteriors.from_alignment(np.array(ids), 4) for ids in ([1, 2], [1, 3]))
    with pytest.raises(UserError, match=r"no unit of frame 1 has a probability from all teachers.*combine\.mode=mean"):
        combine([one, other], "log_mean")
    longer = SparsePosteriors.from_alignment(np.array([1, 2, 3]), 4)
    wider = SparsePosteriors.from_alignment(np.array([1, 2]), 5)
    wrong: list[tuple[list[SparsePosteriors], Any]] = [
        ([one, longer], None), ([one, wider], None), ([one, other], [1.0]), ([one, other], [0.0, 0.0]),
        ([one, other], [-1.0, 2.0]), ([one, other], [np.nan, 1.0]), ([one, other], [np.inf, 1.0]),
    ]  # fmt: skip
    for targets, weights in wrong:
        with pytest.raises(ValueError, match=r"weights|differ"):
            combine(targets, "mean", weights)
