"""SpecAugment on the learner's input: never changes time, so that targets of the clean audio stay aligned."""

from __future__ import annotations

import numpy as np

from asr_kd.config import AugmentSettings


def spec_augment(features: np.ndarray, stack: int, settings: AugmentSettings, rng: np.random.Generator) -> np.ndarray:
    """Mask stretches of time and bands of mel filters with the features' mean, 0 (Park et al. 2019, arXiv 1904.08779).

    Args:
        features: float [frames, stack * mels].
        stack: how many spectral frames one network frame joins; a band is masked in all of them.

    Returns:
        a masked copy, same shape.
    """
    features = features.copy()
    frames, mels = len(features), features.shape[1] // stack
    for _ in range(settings.time_masks):
        width = int(rng.integers(0, min(settings.time_frames, frames) + 1))
        start = int(rng.integers(0, frames - width + 1))
        features[start : start + width] = 0.0
    bands = features.reshape(frames, stack, mels)
    for _ in range(settings.mel_masks):
        width = int(rng.integers(0, min(settings.mel_bands, mels) + 1))
        start = int(rng.integers(0, mels - width + 1))
        bands[:, :, start : start + width] = 0.0
    return features
