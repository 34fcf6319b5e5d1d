"""Speech in stated conditions, for test sets: babble or pink noise at a signal-to-noise ratio, or a room.

Made in other ways than what training hears (`noise.py`), so that a test is not of the same noises once more, and with integers
alone, so that the samples are the same everywhere.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np

TALKERS = 6  # of babble
STEADY = 0.128  # seconds that the longest steps of pink noise last
#: speech is active in pieces of a 50th of a second whose energy is over a 1000th of the loudest one's
PIECES, RANGE = 50, 1000
ROOM = (3, 6)  # range of the reverberation time in tenths of a second
DIRECT = (0, 6)  # range of the direct sound over the reverberation, in dB
#: 10^(dB / 10) in thousandths
POWERS = (1000, 1259, 1585, 1995, 2512, 3162, 3981, 5012, 6310, 7943)
_NOISE = re.compile(r"(babble|pink) (-?\d{1,2}) dB")


def in_condition(
    condition: str, waveform: np.ndarray, rate: int, voices: Sequence[np.ndarray], rng: np.random.Generator
) -> np.ndarray:
    """A waveform in a condition, of the same length and timing: int16 [samples]. What would exceed 16 bits is turned down, not cut off.

    Args:
        condition: `clean`, `reverberation`, or a noise and its ratio to active speech, such as `babble 10 dB` and `pink 0 dB`.
        waveform: int16 [samples].
        rate: Hz.
        voices: what babble is made of, int16 [samples] each; for other conditions it may be empty.
        rng: draws the noise or the room.
    """
    mixed = waveform.astype(np.int64)
    if condition == "reverberation":
        mixed = reverberate(waveform, rate, rng)
    elif found := _NOISE.fullmatch(condition):
        babbled = found[1] == "babble"
        noise = babble(voices, len(waveform), rng) if babbled else pink(len(waveform), rate, rng)
        mixed = add_noise(waveform, noise, int(found[2]), rate)
    elif condition != "clean":
        raise ValueError(f"{condition}: no such condition")
    peak = int(np.abs(mixed).max())
    if peak > 32767:
        mixed = mixed * 32767 // peak
    return mixed.astype(np.int16)


def babble(voices: Sequence[np.ndarray], samples: int, rng: np.random.Generator) -> np.ndarray:
    """The sum of `TALKERS` voices, each a row of recordings: int64 [samples]."""
    total = np.zeros(samples, np.int64)
    for _ in range(TALKERS):
        row: list[np.ndarray] = []
        while sum(map(len, row)) < samples:
            row += [voices[index] for index in rng.permutation(len(voices))]
        voice = np.concatenate(row)
        start = int(rng.integers(len(voice) - samples + 1))
        total += voice[start : start + samples]
    return total


def pink(samples: int, rate: int, rng: np.random.Generator) -> np.ndarray:
    """Noise whose density falls with 1/f, as the sum of steps that last 1, 2, 4, … samples (Voss): int64 [samples]."""
    total = np.zeros(samples, np.int64)
    for octave in range(int(math.log2(STEADY * rate)) + 1):
        steps = rng.integers(-1000, 1001, samples // 2**octave + 2)
        start = int(rng.integers(2**octave))
        total += np.repeat(steps, 2**octave)[start : start + samples]
    return total


def active_energy(waveform: np.ndarray, rate: int) -> tuple[int, int]:
    """Sum of squares and number of samples of the pieces of 20 ms within 30 dB of the loudest one."""
    piece = min(rate // PIECES, len(waveform))
    pieces = waveform[: len(waveform) // piece * piece].astype(np.int64).reshape(-1, piece)
    energies = (pieces**2).sum(axis=1)
    active = energies * RANGE >= energies.max()
    return int(energies[active].sum()), int(active.sum()) * piece


def add_noise(waveform: np.ndarray, noise: np.ndarray, decibels: int, rate: int) -> np.ndarray:
    """The sum, in which the noise's mean power is by a ratio below that of the active speech: int64 [samples].

    Args:
        waveform: int16 [samples].
        noise: int64 [samples], of the same length.
        decibels: the ratio, in whole dB.
        rate: Hz.
    """
    speech, samples = active_energy(waveform, rate)
    power = int((noise**2).sum())
    tens, ones = divmod(decibels, 10)
    louder, softer = POWERS[ones] * 10 ** max(tens, 0), 1000 * 10 ** max(-tens, 0)
    # the gain in steps of 2^-16
    gain = math.isqrt((speech * len(noise) * softer << 32) // max(1, power * samples * louder))
    return waveform + (noise * gain >> 16)


def reverberate(waveform: np.ndarray, rate: int, rng: np.random.Generator) -> np.ndarray:
    """The direct sound, and after it noise that decays exponentially: int64 [samples], as loud as before."""
    shortest, longest = (rate * tenths // 10 for tenths in ROOM)
    length, decibels = int(rng.integers(shortest, longest)), int(rng.integers(*DIRECT))
    envelope, level = np.zeros(length, np.int64), 1 << 30
    for sample in range(length):  # by 60 dB, a factor of e^6.908, over the whole length
        level -= level * 6908 // (1000 * length)
        envelope[sample] = level
    tail = rng.integers(-1000, 1001, length) * envelope >> 30
    direct = math.isqrt(int((tail**2).sum()) * POWERS[decibels] // 1000)
    response = np.concatenate([[direct], tail])
    # The convolution of integers is exact: the transform's error is far below a half.
    size = 1 << (len(waveform) + length).bit_length()
    wet = np.rint(np.fft.irfft(np.fft.rfft(waveform, size) * np.fft.rfft(response, size), size)).astype(np.int64)
    wet = wet[: len(waveform)] >> 8  # so that squares fit
    gain = math.isqrt((int((waveform.astype(np.int64) ** 2).sum()) << 32) // max(1, int((wet**2).sum())))
    return wet * gain >> 16
