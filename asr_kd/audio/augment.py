"""Augmentation of the learner's input: SpecAugment, which keeps the timing, and stretches, which report the new timing."""

from __future__ import annotations

import numpy as np

from asr_kd.audio.settings import AugmentSettings, FeatureSettings


def stretched(
    features: np.ndarray, stack: int, settings: AugmentSettings, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Simulate another speaking rate and vocal tract: resample the time and the mel axis linearly, at random.

    Args:
        features: float [frames, stack * mels].
        stack: number of spectral frames joined in one network frame.

    Returns:
        features float32 [new frames, stack * mels], and int64 [new frames]: the old frame of each new one, by which targets
        must be selected too.
    """
    frames, mels = len(features), features.shape[1] // stack
    new_frames = max(1, round(frames * (1 + rng.uniform(-settings.stretch, settings.stretch))))
    rows = in_time(features, stack, new_frames) if settings.stretch else features.astype(np.float32)
    spectra = rows.reshape(new_frames * stack, mels)
    if settings.mel_warp:
        scale = 1 + rng.uniform(-settings.mel_warp, settings.mel_warp)
        spectra = _resampled(spectra.T, np.minimum(np.arange(mels) * scale, mels - 1)).T
    origin = np.minimum((np.arange(new_frames) + 0.5) * frames / new_frames, frames - 1).astype(np.int64)
    return np.ascontiguousarray(spectra).reshape(new_frames, -1), origin


def in_time(features: np.ndarray, stack: int, frames: int) -> np.ndarray:
    """Features float [old frames, stack * mels] at another speaking rate, as `stretched` makes them: float32 [frames, …]."""
    spectra = features.reshape(len(features) * stack, -1).astype(np.float32)
    return _resampled(spectra, np.linspace(0, len(spectra) - 1, frames * stack)).reshape(frames, -1)


def _resampled(rows: np.ndarray, at: np.ndarray) -> np.ndarray:
    low = np.floor(at).astype(np.int64)
    share = (at - low).astype(np.float32)[:, None]
    return rows[low] * (1 - share) + rows[np.minimum(low + 1, len(rows) - 1)] * share


def spec_augment(
    features: np.ndarray, like: FeatureSettings, settings: AugmentSettings, rng: np.random.Generator
) -> np.ndarray:
    """Mask stretches of time and bands of mel filters with the features' mean, 0 (Park et al. 2019, arXiv 1904.08779).

    Args:
        features: float [frames, stack * mels].
        like: front end, whose `stack` spectral frames are joined in a network frame (a band is masked in all of them).
        settings: how many masks, and how wide.
        rng: places them.

    Returns:
        a masked copy, same shape.
    """
    features, stack = features.copy(), like.stack
    frames, mels = len(features), features.shape[1] // stack
    for _ in range(settings.time_masks):
        width = int(rng.integers(0, min(settings.mask_frames(like.frame_ms), frames) + 1))
        start = int(rng.integers(0, frames - width + 1))
        features[start : start + width] = 0.0
    bands = features.reshape(frames, stack, mels)
    for _ in range(settings.mel_masks):
        width = int(rng.integers(0, min(settings.mel_bands, mels) + 1))
        start = int(rng.integers(0, mels - width + 1))
        bands[:, :, start : start + width] = 0.0
    return features
