"""How far one recording of a moment is behind another of the same: through another microphone, line, rate or amplifier."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

#: Hz at most: telephone speech has no more, and all that is shared by recordings of different rates lies below
RATE = 8000
#: seconds of a window, in which clocks do not drift apart by much
WINDOW = 1.0
#: width in Hz of the means by which a spectrum is made even, and the least power that is, of the most
SMOOTH, LEAST = 200.0, 1e-5
#: share of a recording's mean power below which a window counts as silent
SILENT = 0.1
#: ms between windows that drift may explain
APART = 50.0


@dataclass(frozen=True)
class Match:
    """How two recordings lie to each other.

    Attributes:
        offset_ms: what is heard at t in the one is heard at t + this in the other, in the middle of the one.
        drift_ms: how much larger that is at the end of the one than at its start.
        correlation: of the two at these offsets, in 0 to 1, whatever their polarity; 1: they are alike but for gain and filter.
    """

    offset_ms: float
    drift_ms: float
    correlation: float


def offset_of(one: np.ndarray, other: np.ndarray, rate: int, most_ms: float) -> Match:
    """Find the offset between two recordings of the same moments.

    Both are made white, which takes off what microphones and lines do to the spectrum (generalised cross-correlation, Knapp and Carter 1976,
    with a smoothed spectrum, so that what is loud counts for more than what is noise). Each window of the one is laid on the other
    where their correlation is highest. A line through the windows' offsets gives offset and drift; windows count by their energy and by
    the fourth power of their correlation, so that those which found nothing do not.

    Args:
        one: float [samples], not empty.
        other: float [samples], not empty.
        rate: of both, Hz; at most RATE says as much in less time.
        most_ms: offset at most, either way.
    """
    first, second = whitened(one, rate), whitened(other, rate)
    width, reach = min(len(first), round(WINDOW * rate)), round(most_ms * rate / 1000)
    starts = np.linspace(0, len(first) - width, max(1, round(len(first) / width))).round().astype(int)
    padded = np.pad(second, (reach, reach + max(0, len(first) - len(second))))
    least = SILENT * width * np.array([np.square(first).mean(), np.square(second).mean()])
    found = np.array([_best(first[at : at + width], padded[at : at + width + 2 * reach], least) for at in starts])
    energy, correlation, offsets = found[:, 0], found[:, 1], (found[:, 2] - reach) * 1000 / rate
    weights = energy * correlation**4
    if not weights.sum():
        return Match(0.0, 0.0, 0.0)
    order = np.argsort(offsets)
    middle = offsets[order][np.searchsorted(weights[order].cumsum(), weights.sum() / 2)]
    near = np.abs(offsets - middle) <= APART
    offset, drift = _line(starts[near], offsets[near], weights[near], len(first) - width)
    score = float((energy * correlation * near).sum() / energy.sum())
    return Match(offset, drift * len(first) / max(len(first) - width, 1), score)


def whitened(waveform: np.ndarray, rate: int) -> np.ndarray:
    """The same recording, float64 [samples], with an even spectrum: each frequency divided by the mean level around it."""
    size = 1 << (len(waveform) - 1).bit_length()
    spectrum = np.fft.rfft(waveform, size)
    power = np.square(np.abs(spectrum))
    half = max(1, round(SMOOTH / 2 * size / rate))
    sums = np.concatenate([[0.0], power.cumsum()])
    at = np.arange(len(power))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(power))
    level = (sums[high] - sums[low]) / (high - low)
    white = spectrum / np.sqrt(level + LEAST * level.max() + np.finfo(float).tiny)
    return np.asarray(np.fft.irfft(white, size)[: len(waveform)])


def _best(window: np.ndarray, around: np.ndarray, least: np.ndarray) -> tuple[float, float, int]:
    """Energy of a window, and the highest correlation with a stretch as long of what is around it, and where that begins.

    Args:
        window: float [samples].
        around: float [samples or more].
        least: energies that a window and a stretch count for at least.
    """
    size = 1 << (len(around) - 1).bit_length()  # what wraps around is not looked at
    products = np.fft.irfft(np.fft.rfft(around, size) * np.conj(np.fft.rfft(window, size)), size)
    products = products[: len(around) - len(window) + 1]
    sums = np.concatenate([[0.0], np.square(around).cumsum()])
    energies = np.maximum(sums[len(window) :] - sums[: len(products)], least[1])
    energy = float(np.square(window).sum())
    correlation = np.abs(products) / np.sqrt(energies * max(energy, least[0]) + np.finfo(float).tiny)
    place = int(correlation.argmax())
    return energy, float(correlation[place]), place


def _line(starts: np.ndarray, offsets: np.ndarray, weights: np.ndarray, span: int) -> tuple[float, float]:
    """The weighted line through windows' offsets: its value in the middle of the span, and how much it rises over all of it."""
    place = starts / max(span, 1) - 0.5
    mean, centre = (float((weights * one).sum() / weights.sum()) for one in (offsets, place))
    spread = float((weights * np.square(place - centre)).sum())
    if spread <= 1e-6 * weights.sum():
        return mean, 0.0
    slope = float((weights * (place - centre) * (offsets - mean)).sum()) / spread
    return mean - slope * centre, slope
