from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import soxr

from asr_kd.audio.offset import RATE, offset_of, whitened

#: a frame of the student, ms
FRAME = 30.0


def speech(seed: int, seconds: float = 3.0, rate: int = RATE) -> np.ndarray:
    """What offsets need of speech: stretches of sound, each with its own spectrum, and pauses."""
    rng = np.random.default_rng(seed)
    pieces = [np.zeros(rate // 10)]
    while sum(map(len, pieces)) < seconds * rate:
        size = int(rng.integers(rate // 20, rate // 5))
        spectrum = np.fft.rfft(rng.normal(size=size))
        frequencies = np.fft.rfftfreq(size, 1 / rate)
        level = 1 / (1 + ((frequencies - rng.uniform(200, 3000)) / 200) ** 2) + 0.02
        pieces += [
            np.fft.irfft(spectrum * level, size) * np.hanning(size),
            np.zeros(int(rng.integers(0, rate // 10))),
        ]
    return np.concatenate(pieces)[: round(seconds * rate)]


def later(sound: np.ndarray, ms: float, rate: int = RATE) -> np.ndarray:
    steps = round(ms * rate / 1000)
    return np.concatenate([np.zeros(steps), sound]) if steps >= 0 else sound[-steps:]


def noisy(sound: np.ndarray, decibel: float) -> np.ndarray:
    noise = np.random.default_rng(99).normal(size=len(sound))
    return sound + noise * np.linalg.norm(sound) / np.linalg.norm(noise) * 10 ** (-decibel / 20)


def telephone(sound: np.ndarray) -> np.ndarray:
    spectrum = np.fft.rfft(sound)
    frequencies = np.fft.rfftfreq(len(sound), 1 / RATE)
    return np.fft.irfft(spectrum * ((frequencies > 300) & (frequencies < 3400)), len(sound))


def far(sound: np.ndarray) -> np.ndarray:
    rng = np.random.default_rng(7)
    room = rng.normal(size=RATE // 3) * np.exp(-np.arange(RATE // 3) / 500)
    return np.convolve(sound, np.concatenate([[np.linalg.norm(room)], room]))[: len(sound)]


@pytest.mark.parametrize("ms", [37.0, -37.0, 0.0, 400.0])
@pytest.mark.parametrize(
    "channel",
    [
        lambda sound: sound,
        lambda sound: -0.01 * sound,
        telephone,
        far,
        lambda sound: noisy(sound, 0),
        lambda sound: np.clip(noisy(-telephone(sound), 10), -0.5, 0.5),
    ],
    ids=["alike", "gain and polarity", "telephone", "far", "noise", "all"],
)
def test_a_shift_is_found_through_any_channel(ms: float, channel: Callable[[np.ndarray], np.ndarray]) -> None:
    sound = speech(1)
    match = offset_of(sound, later(channel(sound), ms), RATE, 500.0)
    assert match.offset_ms == pytest.approx(ms, abs=1.0) and abs(match.drift_ms) < FRAME / 2
    assert 0.25 < match.correlation <= 1.0


def test_recordings_of_other_rates_are_compared_at_one() -> None:
    wide = speech(2, rate=16000)
    narrow = soxr.resample(later(wide, 37, 16000), 16000, RATE)
    match = offset_of(soxr.resample(wide, 16000, RATE), narrow, RATE, 500.0)
    assert match.offset_ms == pytest.approx(37, abs=0.5) and match.correlation > 0.8


def test_other_recordings_do_not_match() -> None:
    right = [offset_of(speech(seed), far(noisy(speech(seed), 5)), RATE, 1000.0).correlation for seed in range(8)]
    wrong = [offset_of(speech(seed), speech(seed + 50), RATE, 1000.0).correlation for seed in range(8)]
    assert max(wrong) < 0.2 < 0.3 < min(right)


@pytest.mark.parametrize("ppm", [100, -300, 1000])
def test_drift_is_noticed(ppm: int) -> None:
    sound = speech(3, 20.0)
    times = np.arange(len(sound)) * (1 - ppm * 1e-6)
    match = offset_of(sound, np.interp(times, np.arange(len(sound)), sound), RATE, 500.0)
    assert match.drift_ms == pytest.approx(20.0 * ppm / 1000, abs=0.5)
    assert match.offset_ms == pytest.approx(10.0 * ppm / 1000, abs=0.5)


@pytest.mark.parametrize("size", [1, 7, 300])
def test_short_and_silent_recordings_have_an_answer(size: int) -> None:
    for one, other in ((np.ones(size), np.zeros(size)), (np.zeros(size), speech(0)), (speech(0), np.ones(size))):
        match = offset_of(one, other, RATE, 100.0)
        assert np.isfinite([match.offset_ms, match.drift_ms]).all() and 0 <= match.correlation <= 1
    assert offset_of(np.zeros(size), np.zeros(size), RATE, 100.0).correlation == 0.0


def test_a_longer_recording_contains_the_other() -> None:
    sound = speech(5, 4.0)
    match = offset_of(sound[RATE : 2 * RATE], sound, RATE, 1500.0)
    assert match.offset_ms == pytest.approx(1000, abs=0.5) and match.correlation > 0.8


def test_white_is_even_whatever_the_filter() -> None:
    sound = speech(6)
    level = np.abs(np.fft.rfft(whitened(telephone(sound) * 3, RATE)))
    frequencies = np.fft.rfftfreq(len(sound), 1 / RATE)
    low, high = (level[(frequencies > edge) & (frequencies < edge + 400)].mean() for edge in (400, 2800))
    assert low == pytest.approx(high, rel=0.3)
