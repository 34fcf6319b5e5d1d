"""Augmentation of the learner's input: SpecAugment, which keeps the timing, and stretches, which report the new timing.

What is drawn is apart from what is done, so that the features may be made, and changed, elsewhere (`audio.batched`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from asr_kd.audio.settings import AugmentSettings, FeatureSettings

#: of each new row the old one before it and the one behind it, int64 [new rows], and the share of the latter, float32 [new rows]
Between = tuple[np.ndarray, np.ndarray, np.ndarray]


class Stretch(NamedTuple):
    """Another speaking rate and vocal tract, drawn for an utterance.

    Attributes:
        before: its network frames.
        frames: those that they become.
        scale: factor on the mel axis.
    """

    before: int
    frames: int
    scale: float = 1.0

    def hops(self, stack: int) -> Between:
        """Where the new spectral frames are among the old."""
        return _between(np.linspace(0, self.before * stack - 1, self.frames * stack), self.before * stack)

    def bands(self, mels: int) -> Between:
        """Where the new mel bands are among the old."""
        return _between(np.minimum(np.arange(mels) * self.scale, mels - 1), mels)

    @property
    def origin(self) -> np.ndarray:
        """int64 [frames]: the old frame of each new one, by which targets must be selected."""
        places = (np.arange(self.frames) + 0.5) * self.before / self.frames
        return np.minimum(places, self.before - 1).astype(np.int64)


class Masks(NamedTuple):
    """Stretches of network frames and of mel bands that are masked, each with its start and width."""

    times: list[tuple[int, int]]
    bands: list[tuple[int, int]]


def draw_stretch(frames: int, settings: AugmentSettings, rng: np.random.Generator) -> Stretch:
    """Draw for an utterance of so many frames."""
    new_frames = max(1, round(frames * (1 + rng.uniform(-settings.stretch, settings.stretch))))
    return Stretch(
        frames, new_frames, 1 + rng.uniform(-settings.mel_warp, settings.mel_warp) if settings.mel_warp else 1.0
    )


def draw_masks(frames: int, like: FeatureSettings, settings: AugmentSettings, rng: np.random.Generator) -> Masks:
    """Draw for an utterance.

    Args:
        frames: its network frames.
        like: front end.
        settings: how many masks, and how wide.
        rng: places them.
    """
    masks = Masks([], [])
    for _ in range(settings.time_masks):
        width = int(rng.integers(0, min(settings.mask_frames(like.frame_ms), frames) + 1))
        masks.times.append((int(rng.integers(0, frames - width + 1)), width))
    for _ in range(settings.mel_masks):
        width = int(rng.integers(0, min(settings.mel_bands, like.mels) + 1))
        masks.bands.append((int(rng.integers(0, like.mels - width + 1)), width))
    return masks


def stretched(features: np.ndarray, stack: int, drawn: Stretch) -> np.ndarray:
    """Simulate another speaking rate and vocal tract: resample the time and the mel axis linearly.

    Args:
        features: float [frames, stack * mels].
        stack: number of spectral frames joined in one network frame.
        drawn: for these features.

    Returns:
        float32 [new frames, stack * mels].
    """
    rows = in_time(features, stack, drawn)
    if drawn.scale == 1:
        return rows
    spectra = rows.reshape(drawn.frames * stack, -1)
    warped = _resampled(spectra.T, drawn.bands(spectra.shape[1])).T
    return np.ascontiguousarray(warped).reshape(drawn.frames, -1)


def in_time(features: np.ndarray, stack: int, drawn: Stretch) -> np.ndarray:
    """Features float [old frames, stack * mels] at another speaking rate, as `stretched` makes them: float32 [frames, …]."""
    if drawn.frames == drawn.before:
        return features.astype(np.float32)
    spectra = features.reshape(drawn.before * stack, -1).astype(np.float32)
    return _resampled(spectra, drawn.hops(stack)).reshape(drawn.frames, -1)


def _resampled(rows: np.ndarray, places: Between) -> np.ndarray:
    low, high, share = places
    return rows[low] * (1 - share[:, None]) + rows[high] * share[:, None]


def _between(at: np.ndarray, size: int) -> Between:
    """Places float64 [new rows] among so many old rows."""
    low = np.floor(at).astype(np.int64)
    return low, np.minimum(low + 1, size - 1), (at - low).astype(np.float32)


def masked(features: np.ndarray, stack: int, masks: Masks) -> np.ndarray:
    """Mask stretches of time and bands of mel filters with the features' mean, 0 (SpecAugment, Park et al. 2019, arXiv 1904.08779).

    Args:
        features: float [frames, stack * mels].
        stack: as of `stretched`: a band is masked in all spectral frames of a network frame.
        masks: drawn for these features.

    Returns:
        a masked copy, same shape.
    """
    features = features.copy()
    for start, width in masks.times:
        features[start : start + width] = 0.0
    bands = features.reshape(len(features), stack, -1)
    for start, width in masks.bands:
        bands[:, :, start : start + width] = 0.0
    return features
