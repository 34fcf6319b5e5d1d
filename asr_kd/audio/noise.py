"""Noise and reverberation, on the student's input only. Length and timing do not change, so targets of the clean sound stay valid."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from asr_kd.audio.decode import EXTENSIONS, decode, seconds_of
from asr_kd.audio.settings import NoiseSettings
from asr_kd.errors import AudioError, UserError

# exponent with which power falls with frequency
COLOURS = {"white": 0.0, "pink": 1.0, "brown": 2.0}
LOWEST = 20.0  # Hz; brown noise would have most of its power below, where there are no mel filters
# pieces of this many seconds count as active if their power is at least this share of the loudest piece's
PIECE, ACTIVE_RANGE = 0.02, 1e-3
LONGEST_FILE = 600.0  # seconds; noise files are held in memory


class Voice(NamedTuple):
    """Another utterance, for babble: waveform float32 [samples]; speaker None if unknown."""

    key: str
    speaker: str | None
    waveform: np.ndarray


def coloured(colour: str, samples: int, rate: int, rng: np.random.Generator) -> np.ndarray:
    """Gaussian noise whose power density is flat (white) or falls with 1/f (pink) or 1/f² (brown), without parts below 20 Hz.

    It is a random excerpt of a minute of noise that is generated once: generating it each time costs as much as the features.

    Args:
        colour: a key of `COLOURS`.
        samples: length.
        rate: Hz.
        rng: decides the excerpt.

    Returns:
        float32 [samples].
    """
    return looped(_minute(colour, rate), samples, rng)


@functools.cache
def _minute(colour: str, rate: int) -> np.ndarray:
    size = 1 << 20  # a minute at 16 kHz
    frequencies = np.fft.rfftfreq(size, 1.0 / rate)
    shape = np.zeros(len(frequencies), np.float32)
    heard = frequencies >= LOWEST
    shape[heard] = (frequencies[heard] / LOWEST) ** (-COLOURS[colour] / 2)
    spectrum = np.random.default_rng(0).standard_normal((len(shape), 2), np.float32).view(np.complex64)[:, 0]
    return np.fft.irfft(spectrum * shape, size).astype(np.float32)


def looped(sound: np.ndarray, samples: int, rng: np.random.Generator) -> np.ndarray:
    """A random excerpt of `samples` samples; a shorter sound is looped."""
    if len(sound) < samples:
        return sound.take(np.arange(samples) + rng.integers(len(sound)), mode="wrap")
    start = int(rng.integers(len(sound) - samples + 1))
    return sound[start : start + samples]


def babble(voices: Sequence[np.ndarray], samples: int, rng: np.random.Generator) -> np.ndarray:
    """The sum of voices, each made equally loud: float32 [samples]."""
    total = np.zeros(samples, np.float32)
    for voice in voices:
        part = looped(voice, samples, rng)
        total += part / np.float32(max(np.sqrt(_power(part)), 1e-9))
    return total


def choose_voices(
    voices: Sequence[Voice], key: str, speaker: str | None, talkers: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """Waveforms of random utterances for the babble behind an utterance, of other speakers unless there are none.

    Args:
        voices: to choose from.
        key: of that utterance.
        speaker: of that utterance; None if unknown.
        talkers: number of utterances; fewer if there are not as many.
        rng: decides the choice.
    """
    others = [voice for voice in voices if voice.key != key]
    strangers = [voice for voice in others if None in (speaker, voice.speaker) or voice.speaker != speaker]
    pool = strangers or others
    return [pool[index].waveform for index in rng.permutation(len(pool))[:talkers]]


def _power(waveform: np.ndarray) -> float:
    return float(np.mean(np.square(waveform, dtype=np.float64))) if len(waveform) else 0.0


def active_power(waveform: np.ndarray, rate: int) -> float:
    """Mean power of the pieces of 20 ms that are within 30 dB of the loudest one, so that pauses do not count."""
    piece = max(1, min(len(waveform), int(PIECE * rate)))
    whole = len(waveform) // piece * piece
    if not whole:
        return 0.0
    powers = np.mean(np.square(waveform[:whole], dtype=np.float64).reshape(-1, piece), axis=1)
    return float(powers[powers >= powers.max() * ACTIVE_RANGE].mean())


def mix(speech: np.ndarray, noise: np.ndarray, snr: float, rate: int) -> np.ndarray:
    """Add noise so that the active speech's power (`active_power`) is `snr` dB over the noise's mean power.

    Speech keeps its level. If either is silent, the speech is returned unchanged.

    Args:
        speech: float32 [samples].
        noise: float32 [samples], of the same length.
        snr: dB.
        rate: Hz.
    """
    loud, quiet = active_power(speech, rate), _power(noise)
    if not loud or not quiet:
        return speech
    return speech + noise * np.float32(np.sqrt(loud / quiet / 10 ** (snr / 10)))


def impulse_response(rt60: float, direct: float, rate: int, rng: np.random.Generator) -> np.ndarray:
    """A room: the direct sound at sample 0, followed by Gaussian noise that decays exponentially (Polack's model).

    Args:
        rt60: seconds in which the reverberation falls by 60 dB.
        direct: energy ratio of the direct sound to all that follows, dB.
        rate: Hz.
        rng: draws the noise.

    Returns:
        float32 [samples], of unit energy.
    """
    tail = rng.standard_normal(max(1, int(rt60 * rate)))
    tail *= 10 ** (-3 * np.arange(len(tail)) / len(tail))
    tail *= np.sqrt(10 ** (-direct / 10) / np.sum(tail**2))
    response = np.concatenate([[1.0], tail])
    return (response / np.sqrt(np.sum(response**2))).astype(np.float32)


def _fast_size(samples: int) -> int:
    """The smallest 2^n, 3·2^n or 5·2^n of at least `samples`: lengths for which the Fourier transform is fast."""
    return min(factor << max(0, (-(-samples // factor) - 1).bit_length()) for factor in (1, 3, 5))


def reverberate(waveform: np.ndarray, response: np.ndarray) -> np.ndarray:
    """The sound in a room, cut to its own length, with the same energy: float32 [samples]."""
    response = response[: len(waveform)]
    size = _fast_size(len(waveform) + len(response) - 1)
    wet = np.fft.irfft(np.fft.rfft(waveform, size) * np.fft.rfft(response, size), size)[: len(waveform)]
    power = _power(wet)
    return (wet * np.sqrt(_power(waveform) / power)).astype(np.float32) if power else waveform


@functools.cache
def noise_files(folder: str) -> tuple[Path, ...]:
    """All audio files under a folder, sorted by name; UserError when there is none."""
    paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower().removeprefix(".") in EXTENSIONS)
    if not paths:
        what = "holds no audio" if Path(folder).is_dir() else "no such folder of noise"
        raise UserError(f"{folder}: {what}; give a folder with files of {', '.join(EXTENSIONS)}")
    return tuple(paths)


def check_noise_files(folder: str) -> None:
    """Open every noise file, so that a run stops at its start with a UserError if there is none, or one is bad or too long."""
    noise_files.cache_clear()  # the folder may have changed since this process last looked
    for path in noise_files(folder):
        with _of_noise():
            minutes = seconds_of(path, str(path)) / 60
        if minutes > LONGEST_FILE / 60:
            raise UserError(f"{path}: {minutes:.0f} minutes, a noise file has {LONGEST_FILE / 60:.0f} at most; cut it")


def read_noise(path: Path, rate: int) -> np.ndarray:
    """A noise file at the wanted rate: float32 [samples]; UserError when it is damaged."""
    with _of_noise():
        return decode(path.read_bytes(), str(path), rate, LONGEST_FILE)[0]


@contextmanager
def _of_noise() -> Iterator[None]:
    try:
        yield
    except (AudioError, OSError) as error:
        raise UserError(f"noise file {error}") from None


def generator(seed: Sequence[int], name: str) -> np.random.Generator:
    """A random generator for a seed and a name, independent of all others."""
    words = np.frombuffer(hashlib.sha256(name.encode()).digest()[:16], "<u4")
    return np.random.default_rng([*seed, *words.tolist()])


@dataclass
class Corruption:
    """Everything needed to corrupt the utterances of a shard.

    Args:
        settings: kinds and levels of noise, and rooms.
        rate: of every waveform, Hz.
        seed: with an utterance's key it decides all draws, so that neither order nor process matters.
        voices: utterances for babble; if there is none but the utterance itself, pink noise is used instead.
        files: noises of the settings' folder, float32 [samples] each.
    """

    settings: NoiseSettings
    rate: int
    seed: tuple[int, ...]
    voices: list[Voice] = field(default_factory=list)
    files: list[np.ndarray] = field(default_factory=list)

    def apply(self, waveform: np.ndarray, key: str, speaker: str | None) -> np.ndarray:
        """Draw a room and a noise for an utterance, or neither: float32 [samples], same length and timing.

        The signal-to-noise ratio is that of the reverberant speech. The result is scaled down if it exceeds both full scale
        and the peak of the clean sound.
        """
        settings, rng = self.settings, generator(self.seed, key)
        noisy, reverberant = rng.random() < settings.share, rng.random() < settings.reverb
        changed = waveform
        if reverberant:
            rt60 = rng.uniform(settings.rt60_min, settings.rt60_max)
            direct = rng.uniform(settings.direct_min, settings.direct_max)
            changed = reverberate(changed, impulse_response(rt60, direct, self.rate, rng))
        if noisy:
            kind = settings.kinds[int(rng.integers(len(settings.kinds)))]
            snr = rng.uniform(settings.snr_min, settings.snr_max)
            changed = mix(changed, self._noise(kind, len(waveform), key, speaker, rng), snr, self.rate)
        if changed is waveform:
            return waveform
        peak, limit = float(np.abs(changed).max()), max(1.0, float(np.abs(waveform).max()))
        return changed if peak <= limit else changed * np.float32(limit / peak)

    def _noise(self, kind: str, samples: int, key: str, speaker: str | None, rng: np.random.Generator) -> np.ndarray:
        if kind == "files":
            return looped(self.files[int(rng.integers(len(self.files)))], samples, rng)
        if kind == "babble":
            talkers = int(rng.integers(self.settings.talkers_min, self.settings.talkers_max + 1))
            chosen = choose_voices(self.voices, key, speaker, talkers, rng)
            if chosen:
                return babble(chosen, samples, rng)
            kind = "pink"
        return coloured(kind, samples, self.rate, rng)
