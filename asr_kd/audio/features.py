"""Waveform → 64 log mel filterbank energies (25 ms / 10 ms), mean-normalised causally, three frames stacked to one every 30 ms."""

from __future__ import annotations

import functools

import numpy as np

from asr_kd.config import FeatureSettings
from asr_kd.errors import AudioError

# Energies below the floor (noise some 80 dB under full scale) carry nothing that helps.
LOG_FLOOR = 1e-5
# What the causal mean holds before an utterance begins: a quiet room, worth so many hops. Without it the first frames would be
# normalised by themselves, and their level be lost.
PRIOR_MEAN, PRIOR_HOPS = -6.0, 50
# Log energies of speech vary by about this much; dividing by it gives the network inputs near unit variance.
LOG_SCALE = 3.0
# Frames of the exponential mean that are computed at once.
MEAN_BLOCK = 100
# Windows that are transformed at once: their spectra stay in a processor's cache, and memory is not asked for in megabytes.
SPECTRUM_BLOCK = 32


@functools.cache
def _mel_filters(sample_rate: int, mels: int, fft: int) -> np.ndarray:
    """Triangular filters on the HTK mel scale from 20 Hz to the Nyquist rate: float32 [fft // 2 + 1, mels]."""

    def mel(hertz: np.ndarray | float) -> np.ndarray:
        return 2595.0 * np.log10(1.0 + np.asarray(hertz) / 700.0)

    corners = np.linspace(mel(20.0), mel(sample_rate / 2), mels + 2)
    bins = mel(np.fft.rfftfreq(fft, 1.0 / sample_rate))[:, None]
    rising = (bins - corners[:-2]) / (corners[1:-1] - corners[:-2])
    falling = (corners[2:] - bins) / (corners[2:] - corners[1:-1])
    return np.maximum(0.0, np.minimum(rising, falling)).astype(np.float32)


def causal_mean(frames: np.ndarray, time_constant: int) -> np.ndarray:
    """Running mean of every column over the present and the past: float32 [frames, columns], same shape.

    A cumulative mean that starts from the prior, until it has seen more than `time_constant` frames (the prior's
    included); an exponential one with that time constant from then on.
    """
    prior = min(PRIOR_HOPS, time_constant)
    head = frames[: time_constant - prior + 1]
    mean = np.empty(frames.shape)
    counts = np.arange(prior + 1, prior + 1 + len(head))[:, None]
    mean[: len(head)] = (np.cumsum(head, axis=0, dtype=np.float64) + PRIOR_MEAN * prior) / counts
    # The exponential part goes block by block: a triangular matrix holds the weight of each frame in each later mean.
    # Blocks are always full, so that a frame's mean is the same bits however long the utterance is.
    weights, decay = _exponential_weights(time_constant)
    for start in range(len(head), len(frames), MEAN_BLOCK):
        block = frames[start : start + MEAN_BLOCK]
        padded = np.zeros((MEAN_BLOCK, frames.shape[1]))
        padded[: len(block)] = block
        mean[start : start + len(block)] = (weights @ padded + decay[:, None] * mean[start - 1])[: len(block)]
    return mean.astype(np.float32)


@functools.cache
def _exponential_weights(time_constant: int) -> tuple[np.ndarray, np.ndarray]:
    keep = 1.0 - 1.0 / time_constant
    age = np.subtract.outer(np.arange(MEAN_BLOCK), np.arange(MEAN_BLOCK))
    return np.where(age >= 0, keep ** np.maximum(age, 0) / time_constant, 0.0), keep ** np.arange(1.0, MEAN_BLOCK + 1)


class Frontend:
    """Turns a waveform into network input, frame by frame without a look into the future beyond the stacked frame."""

    def __init__(self, settings: FeatureSettings) -> None:
        self.settings = settings
        self.window = settings.sample_rate * settings.window_ms // 1000
        self.hop = settings.sample_rate * settings.hop_ms // 1000
        # twice the next power of two: with fewer bins the lowest mel filters would hold none
        self.fft = 2 << (self.window - 1).bit_length()
        self._filters = _mel_filters(settings.sample_rate, settings.mels, self.fft)
        self._taper = np.hanning(self.window + 2)[1:-1].astype(np.float32)

    @property
    def overhang_ms(self) -> int:
        """Audio past the end of a stacked frame's own period that its last window reads, in milliseconds."""
        return max(0, self.settings.window_ms - self.settings.hop_ms)

    def compute(self, waveform: np.ndarray) -> np.ndarray:
        """Features of a mono waveform at the settings' sample rate.

        Args:
            waveform: float32 [samples] in [-1, 1].

        Returns:
            float32 [frames, mels * stack], a frame every hop_ms * stack milliseconds; what does not fill a frame is dropped.

        Raises:
            AudioError: when the audio is shorter than one frame.
        """
        hops = 1 + (len(waveform) - self.window) // self.hop if len(waveform) >= self.window else 0
        frames = hops // self.settings.stack
        if frames == 0:
            raise AudioError(f"too short: {len(waveform)} samples do not fill one frame of {self.settings.frame_ms} ms")
        hops = frames * self.settings.stack
        windows = np.lib.stride_tricks.sliding_window_view(waveform, self.window)[:: self.hop][:hops]
        energy = np.empty((hops, self.fft // 2 + 1), np.float32)
        for start in range(0, hops, SPECTRUM_BLOCK):
            block = slice(start, start + SPECTRUM_BLOCK)
            spectrum = np.fft.rfft(windows[block] * self._taper, self.fft)
            energy[block] = spectrum.real**2 + spectrum.imag**2
        logs = np.log(energy @ self._filters + np.float32(LOG_FLOOR))
        logs = (logs - causal_mean(logs, self.settings.mean_frames)) / np.float32(LOG_SCALE)
        return logs.reshape(frames, -1)
