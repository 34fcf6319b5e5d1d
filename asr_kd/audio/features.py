"""Waveform → log mel energies (25 ms / 10 ms), mean-normalised causally, several stacked to one network frame."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from asr_kd.audio.blas import one_thread
from asr_kd.audio.settings import FeatureSettings, InputSettings, SoundSettings
from asr_kd.audio.spectrum import spectrum_of
from asr_kd.audio.waveform import checked
from asr_kd.errors import AudioError

#: version of the computation, of our own front end and of kaldi's. Raise it whenever the same settings would give other features for the
#: same sound: checkpoints, cached features and soft targets record it, and those of another version are refused
FRONTEND_VERSION, KALDI_VERSION = 1, 1
# Start of the causal mean: a quiet room, with the weight of this many hops. Without it the first frames would be normalised by
# themselves and lose their level.
PRIOR_MEAN, PRIOR_HOPS = -6.0, 50
# The same room in Kaldi's energies.
KALDI_PRIOR_MEAN = -8.0
# Standard deviation of log energies of speech, about; dividing by it gives the network inputs near unit variance.
LOG_SCALE = 3.0
# Frames of the exponential mean that are computed at once.
MEAN_BLOCK = 100


class CausalMean:
    """Running mean of every column over present and past frames, as frames arrive.

    A cumulative mean that starts from the prior for the first `time_constant` frames (including the prior's); then an
    exponential mean with that time constant.
    """

    def __init__(self, time_constant: int, columns: int, prior_mean: float = PRIOR_MEAN) -> None:
        self._count, self._head = cumulative(time_constant)
        self._sum = np.full(columns, prior_mean * self._count)
        # The exponential part is computed by blocks: a triangular matrix has the weight of each frame in each later mean.
        # The product is always of a full block, so that the bits do not depend on how many frames arrive together.
        self._weights, self._decay = exponential_weights(time_constant)
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


def cumulative(time_constant: int) -> tuple[int, int]:
    """The weight of the prior, in frames, and of how many frames the mean is cumulative."""
    prior = min(PRIOR_HOPS, time_constant)
    return prior, time_constant - prior + 1


@functools.cache
def exponential_weights(time_constant: int) -> tuple[np.ndarray, np.ndarray]:
    """Of the exponential mean: the weight float64 [MEAN_BLOCK, MEAN_BLOCK] that it has for each frame of a block (column) in the mean at each
    frame of it (row), and that [MEAN_BLOCK] of the mean before the block."""
    keep = 1.0 - 1.0 / time_constant
    age = np.subtract.outer(np.arange(MEAN_BLOCK), np.arange(MEAN_BLOCK))
    return np.where(age >= 0, keep ** np.maximum(age, 0) / time_constant, 0.0), keep ** np.arange(1.0, MEAN_BLOCK + 1)


def version_of(settings: InputSettings) -> int:
    """Version of the front end with these settings."""
    return KALDI_VERSION if isinstance(settings, FeatureSettings) and settings.kind == "kaldi" else FRONTEND_VERSION


def versioned(settings: InputSettings) -> dict[str, object]:
    """Everything that features depend on, to be hashed: the settings, and the version, of our own if it is not the first."""
    values, version = settings.model_dump(), version_of(settings)
    return values if version == 1 and "kind" not in values else {**values, "frontend": version}


@dataclass
class Deferred:
    """An utterance whose features are made where the network is; its length is their number.

    Attributes:
        sound: int16 or float32 [samples]; the former stands for 32,768 times the waveform, of which nothing is lost.
        frames: number of its features.
    """

    sound: np.ndarray
    frames: int

    def __len__(self) -> int:
        return self.frames


#: the input of a network for an utterance: its rows, or the sound that they will be made of
Features = np.ndarray | Deferred


class Frontend:
    """Turns a waveform into network input, frame by frame.

    Our own never looks beyond the stacked frame's last window. Kaldi's windows are centred, and the sound is mirrored at both ends.
    """

    def __init__(self, settings: FeatureSettings) -> None:
        self.settings, self.spectrum = settings, spectrum_of(settings)
        self.prior_mean = KALDI_PRIOR_MEAN if settings.kind == "kaldi" else PRIOR_MEAN

    @property
    def overhang_ms(self) -> int:
        """How far the last window of a stacked frame reaches beyond the frame's own period, in milliseconds."""
        beyond = max(0, self.settings.window_ms - self.settings.hop_ms)
        return (beyond + 1) // 2 if self.spectrum.mirrored else beyond

    def frames(self, samples: int) -> int:
        """Frames of an utterance of so many samples: an incomplete last one is dropped."""
        return self.spectrum.hops(samples) // self.settings.stack

    def start(self) -> FeatureStream:
        """Start an utterance whose audio arrives in pieces."""
        return FeatureStream(self)

    def compute(self, waveform: np.ndarray) -> np.ndarray:
        """Features of a mono waveform float32 [samples] at the settings' sample rate, in [-1, 1] (`checked`).

        They are float16 [frames, mels * stack], a frame every hop_ms * stack milliseconds. It raises AudioError when the audio is
        shorter than one frame.
        """
        stream = self.start()
        features = stream.push(waveform)
        if self.spectrum.mirrored:
            features = np.concatenate([features, stream.finish()])
        if not len(features):
            raise AudioError(self._too_short(waveform))
        return features

    def defer(self, waveform: np.ndarray) -> Deferred:
        """A waveform whose features are made later, by `audio.batched`; refused where `compute` refuses it."""
        waveform = checked(waveform)
        if not (frames := self.frames(len(waveform))):
            raise AudioError(self._too_short(waveform))
        scaled = waveform * np.float32(1 << 15)
        with np.errstate(invalid="ignore"):  # beyond full scale
            short = scaled.astype(np.int16)
        return Deferred(short if np.array_equal(short, scaled) else waveform, frames)

    def _too_short(self, waveform: np.ndarray) -> str:
        return f"too short: {len(waveform)} samples do not fill one frame of {self.settings.frame_ms} ms"


class Sound:
    """The front end of a network that has its own: it passes the waveform on, a row a sample."""

    #: as of `Frontend`
    overhang_ms = 0

    def __init__(self, settings: SoundSettings) -> None:
        self.settings = settings

    def start(self) -> Sound:
        """Start an utterance whose audio arrives in pieces."""
        return self

    def push(self, waveform: np.ndarray) -> np.ndarray:
        """The next samples, float32 [samples, 1], of a waveform (`checked`)."""
        return checked(waveform)[:, None]

    def finish(self) -> np.ndarray:
        """End the utterance: nothing is left, float32 [0, 1]."""
        return np.empty((0, 1), np.float32)

    def compute(self, waveform: np.ndarray) -> np.ndarray:
        """A whole waveform (`checked`) as float32 [samples, 1]; AudioError when it is shorter than the network needs."""
        if len(waveform) < self.settings.least:
            raise AudioError(
                f"too short: {len(waveform)} samples, the network needs {self.settings.least} for one frame of {self.settings.frame_ms} ms"
            )
        return self.push(waveform)


def frontend_of(settings: InputSettings) -> Frontend | Sound:
    """The front end with these settings."""
    return Sound(settings) if isinstance(settings, SoundSettings) else Frontend(settings)


class FeatureStream:
    """The features of one utterance as its audio arrives: the same bits for pieces of any size.

    They are rounded to float16 here, and only here, so that a network gets the same input in every job, with or without a
    cache.
    """

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend
        settings = frontend.settings
        self._mean = CausalMean(settings.mean_frames, settings.mels, frontend.prior_mean)
        self._waiting = np.empty(0, np.float32)  # samples from the next window on
        self._skip = 0  # number of further samples before it, if hops are longer than windows
        self._hops = 0
        # where the sound is mirrored: how many samples in front are still to be mirrored, how many there were, and the last ones
        self._ahead, self._samples, self._last = frontend.spectrum.before, 0, np.empty(0, np.float32)

    @one_thread()
    def push(self, waveform: np.ndarray) -> np.ndarray:
        """Add a waveform (`checked`); returns the frames that are now complete, float16 [frames, mels * stack]."""
        waveform = checked(waveform)
        spectrum = self._frontend.spectrum
        if spectrum.mirrored:
            self._samples += len(waveform)
            self._last = np.concatenate([self._last, waveform[-spectrum.window :]])[-spectrum.window :]
        skipped = min(self._skip, len(waveform))
        self._skip -= skipped
        samples = np.concatenate([self._waiting, waveform[skipped:]]) if len(self._waiting) else waveform[skipped:]
        if self._ahead:
            if len(samples) < self._ahead:
                self._waiting = samples.copy()
                return self._none()
            samples, self._ahead = np.pad(samples, (self._ahead, 0), "symmetric"), 0
        hops = 1 + (len(samples) - spectrum.window) // spectrum.hop if len(samples) >= spectrum.window else 0
        return self._computed(samples, hops)

    @one_thread()
    def finish(self) -> np.ndarray:
        """End the utterance; returns the frames for which its mirror image is needed, as of `push`."""
        spectrum = self._frontend.spectrum
        hops = spectrum.hops(self._samples) - self._hops
        if not spectrum.mirrored or hops <= 0:
            return self._none()
        samples = np.pad(self._waiting, (self._ahead, 0), "symmetric")
        lacking = (hops - 1) * spectrum.hop + spectrum.window - len(samples)
        if lacking > 0:
            samples = np.concatenate([samples, np.pad(self._last, (0, lacking), "symmetric")[-lacking:]])
        return self._computed(samples, hops)

    def _none(self) -> np.ndarray:
        return np.empty((0, self._frontend.settings.dimension), np.float16)

    def _computed(self, samples: np.ndarray, hops: int) -> np.ndarray:
        """The frames of so many hops of the samples that are there, without an incomplete last one; the rest waits."""
        spectrum, stack = self._frontend.spectrum, self._frontend.settings.stack
        hops -= hops % stack
        if not hops:
            self._waiting = samples.copy()
            return self._none()
        windows = np.lib.stride_tricks.sliding_window_view(samples, spectrum.window)[:: spectrum.hop][:hops]
        logs = spectrum.log_energies(windows, self._hops)
        self._hops += hops
        self._skip += max(0, hops * spectrum.hop - len(samples))
        self._waiting = samples[hops * spectrum.hop :].copy()
        features = (logs - self._mean.push(logs)) / np.float32(LOG_SCALE)
        return features.astype(np.float16).reshape(hops // stack, -1)
