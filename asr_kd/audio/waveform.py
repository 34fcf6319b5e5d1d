"""Samples of any shape → a mono waveform; checks that they are sensible numbers and that channels do not cancel out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import soxr

from asr_kd.audio.parts import named
from asr_kd.audio.wav import MAX_CHANNELS, RATES
from asr_kd.errors import AudioError

MAX_AMPLITUDE = 100.0  # full scale is 1; far larger values are integers stored as floats, or noise
# channels cancel out in a window of so many samples if their mean has less than this share of the power it would have if they were
# uncorrelated, and in a recording if such windows hold this share of its energy
WINDOW, CANCELLED, LOST = 1 << 12, 0.1, 0.2
FEW = 64  # samples that are too few to tell
AUDIBLE = 1e-8  # mean power (full scale is 1) below which channels are not checked


def _peak(samples: np.ndarray) -> float:
    """The largest amplitude, 0 of no samples, NaN where a sample is."""
    return max(float(samples.max(initial=0.0)), -float(samples.min(initial=0.0)))


class Mixer:
    """The mean of the channels of a recording that arrives in pieces."""

    def __init__(self) -> None:
        self._channels, self._count = 1, 0
        self._energy, self._lost = 0.0, 0.0  # of all, and of what cancels out
        self._begin()

    def _begin(self) -> None:
        # sums and sums of squares in a window: of each channel, and of their mean
        self._filled, self._sums, self._squares = 0, np.zeros(MAX_CHANNELS + 1), np.zeros(MAX_CHANNELS + 1)

    def mix(self, samples: np.ndarray) -> np.ndarray:
        """Float32 [samples, channels] → float32 [samples]; AudioError when one is not a number or far beyond full scale."""
        peak = _peak(samples)
        if not np.isfinite(peak):
            raise AudioError("holds samples that are not numbers (NaN or infinite); make the file again")
        if peak > MAX_AMPLITUDE:
            raise AudioError(f"its samples reach {peak:.3g} where full scale is 1; scale them and write the file again")
        channels = samples.shape[1]
        if channels == 1:
            return samples[:, 0]
        mean = samples.mean(axis=1, dtype=np.float32)
        self._channels = max(channels, self._channels)
        for start in range(-self._filled, len(samples), WINDOW):
            here = slice(max(start, 0), start + WINDOW)
            for at, one in enumerate([*samples[here].T, mean[here]]):
                at = at if at < channels else -1
                self._sums[at] += one.sum(dtype=np.float64)
                self._squares[at] += np.dot(one.astype(np.float64), one)
            self._filled = min(WINDOW, len(samples) - start)
            if self._filled == WINDOW:
                self._end()
        return mean

    def _end(self) -> None:
        powers = self._squares - self._sums**2 / max(self._filled, 1)
        energy = powers[:-1].sum() / self._channels
        self._count, self._energy = self._count + self._filled, self._energy + energy
        if self._filled > FEW and powers[-1] * self._channels < CANCELLED * energy:
            self._lost += energy
        self._begin()

    def finish(self) -> None:
        """End the recording; AudioError when its channels cancel out, for example if one is the other inverted."""
        self._end()
        if self._energy > AUDIBLE * self._count and self._lost > LOST * self._energy:
            share = self._lost / self._energy
            where = f" in {share:.0%} of it" if share < 0.99 else ""
            raise AudioError(
                f"its {self._channels} channels cancel out{where} (one is the other inverted), their mean is not what was said; "
                "take one of them: ffmpeg -i bad.wav -af 'pan=mono|c0=c0' good.wav"
            )


def checked(waveform: Any) -> np.ndarray:
    """A waveform as float32 [samples]; AudioError when it is no array of floats with one axis, or not of full scale 1."""
    if not isinstance(waveform, np.ndarray) or waveform.ndim != 1 or waveform.dtype.kind != "f":
        is_array = isinstance(waveform, np.ndarray)
        what = f"{waveform.dtype} {list(waveform.shape)}" if is_array else type(waveform).__name__
        raise AudioError(
            f"a waveform must be float32 [samples], mono, not {what}; make it one with asr_kd.audio.waveform.from_array"
        )
    peak = _peak(waveform)
    if not peak <= MAX_AMPLITUDE:
        raise AudioError(f"the samples of a waveform reach {peak:.3g} where full scale is 1; scale them")
    return waveform if waveform.dtype == np.float32 else waveform.astype(np.float32)


def from_array(samples: np.ndarray, rate: int, sample_rate: int, name: str = "the array") -> np.ndarray:
    """A waveform from an array of samples, as soundfile, SciPy or torchaudio (transposed) read them.

    Args:
        samples: [samples] or [samples, channels]; floats of full scale 1, or integers (int16, int32, uint8) of their own full scale.
        rate: of the samples, in Hz.
        sample_rate: wanted rate in Hz.
        name: of the recording, for messages.

    Returns:
        float32 [samples], mono (the mean of the channels), full scale 1.

    Raises:
        AudioError: when its shape, type or rate cannot be those of sound, and as `Mixer`.
    """
    samples = np.array(samples)  # a copy: what is made of it is changed in place
    with named(name):
        values = _floats(samples, rate)
        if not samples.size:
            raise AudioError("holds no samples (zero length); leave it out")
        if samples.dtype.name == "int32" and 0 < np.abs(samples).max() <= 1 << 15:
            raise AudioError("holds samples of 16 bits as int32, which would be heard as silence; convert it to int16")
        return converted(mixed([values]), int(rate), sample_rate)


def _floats(samples: np.ndarray, rate: int) -> np.ndarray:
    """Samples of any type as float32 [samples, channels]; AudioError when they or their rate cannot be those of sound."""
    scales = {"int16": 2.0**15, "int32": 2.0**31, "uint8": 2.0**7}
    if samples.ndim not in (1, 2) or (samples.ndim == 2 and not 1 <= samples.shape[1] <= MAX_CHANNELS):
        raise AudioError(
            f"must be [samples] or [samples, channels], not {list(samples.shape)}; transpose it where channels come first"
        )
    if isinstance(rate, bool) or not isinstance(rate, int | np.integer) or int(rate) not in RATES:
        raise AudioError(f"needs its sample rate in Hz, not {rate!r}")
    if samples.dtype.kind != "f" and samples.dtype.name not in scales:
        raise AudioError(f"must hold floats, int16, int32 or uint8, not {samples.dtype}; convert it")
    values = samples.astype(np.float32, copy=False)
    if samples.dtype.kind != "f":
        values = (values - (128 if samples.dtype.kind == "u" else 0)) / np.float32(scales[samples.dtype.name])
    return values if values.ndim == 2 else values[:, None]


def mixed(pieces: Iterable[np.ndarray]) -> np.ndarray:
    """All pieces of a recording, float32 [samples, channels], as one waveform float32 [samples]; AudioError as `Mixer`."""
    mixer = Mixer()
    waveforms = [mixer.mix(piece) for piece in pieces] or [np.empty(0, np.float32)]
    mixer.finish()
    return waveforms[0] if len(waveforms) == 1 else np.concatenate(waveforms)


def converted(waveform: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """A waveform at `rate` Hz as float32 [samples] at `wanted` Hz; AudioError when there are no samples, or too few."""
    if not (found := len(waveform)):
        raise AudioError("holds no samples (zero length); leave it out")
    if rate != wanted:
        waveform = soxr.resample(np.ascontiguousarray(waveform), rate, wanted)
        if not len(waveform):
            raise AudioError(f"too short to be converted to {wanted} Hz ({found} samples); leave it out")
    return np.ascontiguousarray(waveform, dtype=np.float32)


def streamed(pieces: Iterable[tuple[int, np.ndarray]], wanted: int, name: str) -> Iterator[np.ndarray]:
    """The same as the pieces arrive, each with its rate, which does not change; memory holds one. AudioError as `Mixer`."""
    arriving = Arriving(wanted, name)
    for rate, samples in pieces:
        yield arriving.push(samples, rate)
    if len(rest := arriving.finish()):
        yield rest


class Arriving:
    """A recording called `name` that arrives in pieces, as a waveform at `wanted` Hz; AudioError as `from_array`."""

    def __init__(self, wanted: int, name: str) -> None:
        self._wanted, self._name, self._mixer = wanted, name, Mixer()
        self._resample: soxr.ResampleStream | None = None

    def push(self, samples: np.ndarray, rate: int) -> np.ndarray:
        """What the next samples, [samples] or [samples, channels] at a rate that does not change, add: float32 [samples]."""
        with named(self._name):
            waveform = self._mixer.mix(_floats(samples, rate))
        if self._resample is None and rate != self._wanted:
            self._resample = soxr.ResampleStream(rate, self._wanted, 1, dtype="float32")
        return self._resample.resample_chunk(waveform) if self._resample else waveform

    def finish(self) -> np.ndarray:
        """End the recording; returns the rest."""
        with named(self._name):
            self._mixer.finish()
        none = np.empty(0, np.float32)
        return self._resample.resample_chunk(none, last=True) if self._resample else none
