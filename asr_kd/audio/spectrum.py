"""Sound → log mel energies: the one description of how, from which numpy, torch and an exported graph compute."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from asr_kd.audio.settings import KALDI_BELOW, LOW_HERTZ, FeatureSettings

# Energies below the floor (noise some 80 dB under full scale) are of no use.
LOG_FLOOR = 1e-5
# Hops whose mel energies are computed at once: their spectra fit into a processor's cache.
HOP_BLOCK = 64


@dataclass(frozen=True, eq=False)
class Spectrum:
    """How a window of sound becomes log mel energies.

    From each window its mean is taken (`centring`), from each sample `preemphasis` times the one before, from the first times itself; it is
    multiplied by the taper; the squared magnitudes of its DFT of `fft` points go through the mel filters. The logarithm is of the energy
    plus the floor (`floor_added`), or of the larger of the two.

    Attributes:
        window: its length in samples.
        hop: samples from window to window.
        before: samples by which the first window begins before the sound.
        mirrored: whether the sound goes on beyond both ends as its mirror image, and all windows count whose middle it reaches; else those
            that it fills.
        taper: float32 [window].
        filters: float32 [fft // 2 + 1, mels], triangles on the mel scale.
        scale: full scale of the samples; those of a waveform are multiplied by it.
    """

    window: int
    hop: int
    fft: int
    taper: np.ndarray
    filters: np.ndarray
    floor: float
    floor_added: bool = False
    before: int = 0
    mirrored: bool = False
    centring: bool = False
    preemphasis: float = 0.0
    scale: float = 1.0

    @property
    def mels(self) -> int:
        """Number of filters."""
        return int(self.filters.shape[1])

    def hops(self, samples: int) -> int:
        """Windows of a sound of so many samples."""
        if self.mirrored:
            return (samples + self.hop // 2) // self.hop
        return 1 + (samples - self.window) // self.hop if samples >= self.window else 0

    def of(self, waveform: np.ndarray) -> np.ndarray:
        """Log mel energies float32 [hops, mels] of a whole waveform float32 [samples], of at least one hop."""
        hops = self.hops(len(waveform))
        behind = max(0, (hops - 1) * self.hop + self.window - self.before - len(waveform))
        samples = np.pad(waveform, (self.before, behind), "symmetric")
        return self.log_energies(np.lib.stride_tricks.sliding_window_view(samples, self.window)[:: self.hop][:hops], 0)

    def log_energies(self, windows: np.ndarray, position: int) -> np.ndarray:
        """Log mel energies float32 [hops, mels] of windows float32 [hops, window]; `position`: number of hops before them.

        The filters are applied to full blocks, aligned to the utterance's start: a product of another shape rounds differently.
        """
        before = position % HOP_BLOCK
        energy = np.empty((len(windows), self.mels), np.float32)
        block = np.zeros((HOP_BLOCK, self.fft // 2 + 1), np.float32)
        for start in range(-before, len(windows), HOP_BLOCK):
            first, last = max(start, 0), min(start + HOP_BLOCK, len(windows))
            spectrum = np.fft.rfft(self._prepared(windows[first:last]) * self.taper, self.fft)
            block[first - start : last - start] = spectrum.real**2 + spectrum.imag**2
            energy[first:last] = (block @ self.filters)[first - start : last - start]
        floor = np.float32(self.floor)
        return np.log(energy + floor if self.floor_added else np.maximum(energy, floor))

    def _prepared(self, windows: np.ndarray) -> np.ndarray:
        """Windows float32 [hops, window] before the taper."""
        if self.scale != 1:
            windows = windows * np.float32(self.scale)
        if self.centring:
            windows = windows - windows.mean(1, keepdims=True)
        if self.preemphasis:
            behind = np.concatenate([windows[:, :1], windows[:, :-1]], 1)
            windows = windows - np.float32(self.preemphasis) * behind
        return windows


@functools.cache
def spectrum_of(settings: FeatureSettings) -> Spectrum:
    """The spectrum of a front end with these settings."""
    rate, mels = settings.sample_rate, settings.mels
    if settings.kind == "kaldi":
        return kaldi(rate, mels, below=KALDI_BELOW, mirrored=True)
    window, hop = rate * settings.window_ms // 1000, rate * settings.hop_ms // 1000
    # twice the next power of two: with fewer bins the lowest mel filters would be empty
    fft = 2 << (window - 1).bit_length()
    taper = np.hanning(window + 2)[1:-1].astype(np.float32)
    return Spectrum(window, hop, fft, taper, _mel_filters(rate, mels, fft, rate / 2), LOG_FLOOR, floor_added=True)


@functools.cache
def kaldi(rate: int, mels: int, *, below: float, mirrored: bool, scale: float = 1.0) -> Spectrum:
    """Kaldi's filterbank features without dither: windows of 25 ms every 10 ms.

    Args:
        rate: of the sound, Hz.
        mels: number of filters, from LOW_HERTZ Hz.
        below: where they end, in Hz below half the rate.
        mirrored: as of `Spectrum`; Kaldi's snip_edges=False.
        scale: as of `Spectrum`.
    """
    window, hop = rate * 25 // 1000, rate * 10 // 1000
    fft = 1 << (window - 1).bit_length()
    povey = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / (window - 1))) ** 0.85
    return Spectrum(
        window, hop, fft, povey.astype(np.float32), _mel_filters(rate, mels, fft, rate / 2 - below),
        floor=float(np.finfo(np.float32).eps), before=window // 2 - hop // 2 if mirrored else 0, mirrored=mirrored,
        centring=True, preemphasis=0.97, scale=scale,
    )  # fmt: skip


def _mel_filters(rate: int, mels: int, fft: int, high: float) -> np.ndarray:
    """Triangular filters on the HTK mel scale from 20 Hz to `high` Hz: float32 [fft // 2 + 1, mels]."""

    def mel(hertz: np.ndarray | float) -> np.ndarray:
        return 2595.0 * np.log10(1.0 + np.asarray(hertz) / 700.0)

    corners = np.linspace(mel(LOW_HERTZ), mel(high), mels + 2)
    bins = mel(np.fft.rfftfreq(fft, 1.0 / rate))[:, None]
    rising = (bins - corners[:-2]) / (corners[1:-1] - corners[:-2])
    falling = (corners[2:] - bins) / (corners[2:] - corners[1:-1])
    return np.maximum(0.0, np.minimum(rising, falling)).astype(np.float32)
