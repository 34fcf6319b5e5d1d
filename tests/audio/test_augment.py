from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asr_kd.audio import augment
from asr_kd.audio.settings import AugmentSettings, FeatureSettings

STACK, MELS = 3, 10
LIKE = FeatureSettings(mels=MELS, stack=STACK)


def ramp(frames: int) -> np.ndarray:
    """Features that say when they were: every band of spectral frame i holds i."""
    return np.repeat(np.arange(frames * STACK, dtype=np.float32), MELS).reshape(frames, STACK * MELS)


def noise(frames: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(3, 1, (frames, STACK * MELS)).astype(np.float16)


def stretched(
    features: np.ndarray, stack: int, wanted: AugmentSettings, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    drawn = augment.draw_stretch(len(features), wanted, rng)
    return augment.stretched(features, stack, drawn), drawn.origin


def spec_augment(
    features: np.ndarray, like: FeatureSettings, wanted: AugmentSettings, rng: np.random.Generator
) -> np.ndarray:
    return augment.masked(features, like.stack, augment.draw_masks(len(features), like, wanted, rng))


def test_nothing_asked_nothing_changed() -> None:
    features = noise(20)
    same, origin = stretched(features, STACK, AugmentSettings(), np.random.default_rng(0))
    np.testing.assert_array_equal(same, features)
    assert same.dtype == np.float32 and origin.tolist() == list(range(20))
    np.testing.assert_array_equal(spec_augment(features, LIKE, AugmentSettings(), np.random.default_rng(0)), features)


@given(frames=st.integers(1, 60), share=st.sampled_from([0.05, 0.2, 0.49]), seed=st.integers(0, 200))
@settings(max_examples=80, deadline=None)
def test_origin_says_which_frame_is_shown(frames: int, share: float, seed: int) -> None:
    features = ramp(frames)
    shown, origin = stretched(features, STACK, AugmentSettings(stretch=share), np.random.default_rng(seed))
    assert origin.dtype == np.int64 and len(shown) == len(origin) and shown.shape[1] == STACK * MELS
    assert round(frames * (1 - share)) - 1 <= len(shown) <= round(frames * (1 + share)) + 1
    assert origin.min() >= 0 and origin.max() < frames and (np.diff(origin) >= 0).all()
    middle = shown.reshape(len(shown), STACK, MELS)[:, STACK // 2, 0]
    if len(shown) > 1:  # a lone frame shows the beginning
        # the middle of each new frame lies within the old frame that `origin` names, or just across its border
        assert np.abs(middle - (origin * STACK + STACK // 2)).max() <= STACK / 2 + 1


def test_targets_follow_the_origin() -> None:
    marks = np.zeros((30, STACK * MELS), np.float32)
    marks[10:14] = 1.0
    for seed in range(20):
        shown, origin = stretched(marks, STACK, AugmentSettings(stretch=0.3), np.random.default_rng(seed))
        heard = shown.mean(1) > 0.5
        targets = (origin >= 10) & (origin < 14)
        assert np.count_nonzero(heard != targets) <= 2  # the two borders
        assert targets.any()


def test_mel_warp_keeps_time_and_moves_bands() -> None:
    features = np.tile(np.arange(MELS, dtype=np.float32), (8, STACK))
    for seed in range(10):
        warped, origin = stretched(features, STACK, AugmentSettings(mel_warp=0.2), np.random.default_rng(seed))
        assert origin.tolist() == list(range(8))
        bands = warped.reshape(8, STACK, MELS)
        assert (bands == bands[0, 0]).all()
        rise = bands[0, 0, 1] - bands[0, 0, 0]
        assert 0.8 <= rise <= 1.2
        np.testing.assert_allclose(bands[0, 0], np.minimum(np.arange(MELS) * rise, MELS - 1), atol=1e-5)


@given(frames=st.integers(1, 40), seed=st.integers(0, 200))
@settings(max_examples=60, deadline=None)
def test_masks_cover_stretches_and_bands_and_nothing_else(frames: int, seed: int) -> None:
    features = noise(frames, seed)
    before = features.copy()
    wanted = AugmentSettings(time_masks=1, time_frames=6, mel_masks=1, mel_bands=4)
    masked = spec_augment(features, LIKE, wanted, np.random.default_rng(seed))
    np.testing.assert_array_equal(features, before)  # a copy: targets and cache see nothing
    assert masked.shape == features.shape and masked.dtype == features.dtype
    hidden = (masked == 0).reshape(frames, STACK, MELS)
    assert (masked[masked != 0] == features[masked != 0]).all()
    rows, bands = hidden.all((1, 2)), hidden.all((0, 1))
    assert rows.sum() <= 6 and (bands.sum() <= 4 or rows.all())
    for run in (rows, bands):
        assert np.count_nonzero(np.diff(run, prepend=False, append=False)) <= 2  # one piece
    np.testing.assert_array_equal(hidden, np.broadcast_to(rows[:, None, None] | bands, hidden.shape))


def test_a_mask_in_milliseconds_is_as_long_whatever_the_frame_period() -> None:
    for hop_ms in (5, 10, 20):
        like = FeatureSettings(mels=MELS, stack=STACK, hop_ms=hop_ms)
        asked = AugmentSettings(time_masks=1, time_ms=180)
        rng = np.random.default_rng(0)
        widths = [(spec_augment(noise(60), like, asked, rng) == 0).all(1).sum() for _ in range(300)]
        assert max(widths) * like.frame_ms == 180


@pytest.mark.parametrize("frames", [1, 2, 30])
def test_the_seed_alone_decides(frames: int) -> None:
    wanted = AugmentSettings(
        stretch=0.2, mel_warp=0.1, time_masks=2, time_frames=50, mel_masks=2, mel_bands=50
    )  # wider than what there is

    def changed(seed: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        rows, _ = stretched(noise(frames), STACK, wanted, rng)
        return spec_augment(rows, LIKE, wanted, rng)

    np.testing.assert_array_equal(changed(1), changed(1))
    assert len({changed(seed).tobytes() for seed in range(5)}) > 1
