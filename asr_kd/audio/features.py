"""Waveform → 64 log mel filterbank energies (25 ms / 10 ms), mean-normalised causally, three frames stacked to one every 30 ms."""

from __future__ import annotations

import functools

import numpy as np

from asr_kd.audio.blas import one_thread
from asr_kd.audio.settings import FeatureSettings
from asr_kd.audio.waveform import checked
from asr_kd.errors import AudioError

#: version of the computation. Raise it whenever the same settings would give other features for the same sound: checkpoints,
#: cached features and soft targets record it, and those of another version are refused
FRONTEND_VERSION = 1
# Energies below the floor (noise some 80 dB under full scale) are of no use.
LOG_FLOOR = 1e-5
# Start of the causal mean: a quiet room, with the weight of this many hops. Without it the first frames would be normalised by
# themselves and lose their level.
PRIOR_MEAN, PRIOR_HOPS = -6.0, 50
# Standard deviation of log energies of speech, about; dividing by it gives the network inputs near unit variance.
LOG_SCALE = 3.0
# Frames of the exponential mean that are computed at once.
MEAN_BLOCK = 100
# Hops whose mel energies are computed at once: their spectra fit into a processor's cache.
HOP_BLOCK = 64


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


class CausalMean:
    """Running mean of every column over present and past frames, as frames arrive.

    A cumulative mean that starts from the prior for the first `time_constant` frames (including the prior's); then an
    exponential mean with that time constant.
    """

    def __init__(self, time_constant: int, columns: int) -> None:
        prior = min(PRIOR_HOPS, time_constant)
        self._count = prior
        self._head = time_constant - prior + 1  # number of further frames for the cumulative mean
        self._sum = np.full(columns, PRIOR_MEAN * prior)
        # The exponential part is computed by blocks: a triangular matrix has the weight of each frame in each later mean.
        # The product is always of a full block, so that the bits do not depend on how many frames arrive together.
        self._weights, self._decay = _exponential_weights(time_constant)
        self._block = np.zeros((MEAN_BLOCK, columns))
        self._filled = 0
        self._before = np.empty(columns)  # the mean before the block

    def push(self, frames: np.ndarray) -> np.ndarray:
        """Means at the next frames: float32 [frames, columns], same shape."""
        mean = np.empty(frames.shape)
        head = min(self._head, len(frames))
        if head:
            sums = np.cumsum(np.concatenate([self._sum[None], frames[:head]]), axis=0)[1:]
            mean[:head] = sums / np.arange(self._count + 1, self._count + 1 + head)[:, None]
            self._sum, self._before = sums[-1], mean[head - 1]
            self._count, self._head = self._count + head, self._head - head
        done = head
        while done < len(frames):
            more = min(MEAN_BLOCK - self._filled, len(frames) - done)
            here = slice(self._filled, self._filled + more)
            self._block[here] = frames[done : done + more]
            mean[done : done + more] = (self._weights @ self._block + self._decay[:, None] * self._before)[here]
            done, self._filled = done + more, self._filled + more
            if self._filled == MEAN_BLOCK:
                self._before, self._filled = mean[done - 1].copy(), 0
                self._block[:] = 0.0
        return mean.astype(np.float32)


@functools.cache
def _exponential_weights(time_constant: int) -> tuple[np.ndarray, np.ndarray]:
    keep = 1.0 - 1.0 / time_constant
    age = np.subtract.outer(np.arange(MEAN_BLOCK), np.arange(MEAN_BLOCK))
    return np.where(age >= 0, keep ** np.maximum(age, 0) / time_constant, 0.0), keep ** np.arange(1.0, MEAN_BLOCK + 1)


def versioned(settings: FeatureSettings) -> dict[str, object]:
    """Everything that features depend on, to be hashed: the settings, and the version if it is not the first."""
    values = settings.model_dump()
    return values if FRONTEND_VERSION == 1 else {**values, "frontend": FRONTEND_VERSION}


class Frontend:
    """Turns a waveform into network input, frame by frame, without looking beyond the stacked frame."""

    def __init__(self, settings: FeatureSettings) -> None:
        self.settings = settings
        self.window = settings.sample_rate * settings.window_ms // 1000
        self.hop = settings.sample_rate * settings.hop_ms // 1000
        # twice the next power of two: with fewer bins the lowest mel filters would be empty
        self.fft = 2 << (self.window - 1).bit_length()
        self._filters = _mel_filters(settings.sample_rate, settings.mels, self.fft)
        self._taper = np.hanning(self.window + 2)[1:-1].astype(np.float32)

    @property
    def overhang_ms(self) -> int:
        """How far the last window of a stacked frame reaches beyond the frame's own period, in milliseconds."""
        return max(0, self.settings.window_ms - self.settings.hop_ms)

    def start(self) -> FeatureStream:
        """Start an utterance whose audio arrives in pieces."""
        return FeatureStream(self)

    def compute(self, waveform: np.ndarray) -> np.ndarray:
        """Features of a mono waveform float32 [samples] at the settings' sample rate, in [-1, 1] (`checked`).

        They are float16 [frames, mels * stack], a frame every hop_ms * stack milliseconds; an incomplete last frame is
        dropped. It raises AudioError when the audio is shorter than one frame.
        """
        features = self.start().push(waveform)
        if not len(features):
            raise AudioError(f"too short: {len(waveform)} samples do not fill one frame of {self.settings.frame_ms} ms")
        return features

    def log_energies(self, windows: np.ndarray, position: int) -> np.ndarray:
        """Log mel energies float32 [hops, mels] of windows float32 [hops, window]; `position`: number of hops before them.

        The filters are applied to full blocks, aligned to the utterance's start: a product of another shape rounds differently.
        """
        before = position % HOP_BLOCK
        energy = np.empty((len(windows), self._filters.shape[1]), np.float32)
        block = np.zeros((HOP_BLOCK, self.fft // 2 + 1), np.float32)
        for start in range(-before, len(windows), HOP_BLOCK):
            first, last = max(start, 0), min(start + HOP_BLOCK, len(windows))
            spectrum = np.fft.rfft(windows[first:last] * self._taper, self.fft)
            block[first - start : last - start] = spectrum.real**2 + spectrum.imag**2
            energy[first:last] = (block @ self._filters)[first - start : last - start]
        return np.log(energy + np.float32(LOG_FLOOR))


class FeatureStream:
    """The features of one utterance as its audio arrives: the same bits for pieces of any size.

    They are rounded to float16 here, and only here, so that a network gets the same input in every job, with or without a
    cache.
    """

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend
        settings = frontend.settings
        self._mean = CausalMean(settings.mean_frames, settings.mels)
        self._waiting = np.empty(0, np.float32)  # samples from the next window on
        self._skip = 0  # number of further samples before it, if hops are longer than windows
        self._hops = 0

    @one_thread()
    def push(self, waveform: np.ndarray) -> np.ndarray:
        """Add a waveform (`checked`); returns the frames that are now complete, float16 [frames, mels * stack]."""
        waveform = checked(waveform)
        front, stack = self._frontend, self._frontend.settings.stack
        skipped = min(self._skip, len(waveform))
        self._skip -= skipped
        samples = np.concatenate([self._waiting, waveform[skipped:]]) if len(self._waiting) else waveform[skipped:]
        hops = 1 + (len(samples) - front.window) // front.hop if len(samples) >= front.window else 0
        hops -= hops % stack
        if not hops:
            self._waiting = samples.copy()
            return np.empty((0, front.settings.dimension), np.float16)
        windows = np.lib.stride_tricks.sliding_window_view(samples, front.window)[:: front.hop][:hops]
        logs = front.log_energies(windows, self._hops)
        self._hops += hops
        self._skip += max(0, hops * front.hop - len(samples))
        self._waiting = samples[hops * front.hop :].copy()
        features = (logs - self._mean.push(logs)) / np.float32(LOG_SCALE)
        return features.astype(np.float16).reshape(hops // stack, -1)
