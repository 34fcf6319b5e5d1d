"""A recording, a file or an array of any length → what a checkpoint makes of it: its hypotheses, or its log-probabilities."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from asr_kd.audio.decode import decode, read_blocks, seconds_of
from asr_kd.audio.parts import named
from asr_kd.audio.segments import slices, speech
from asr_kd.audio.settings import SpeechSettings
from asr_kd.audio.vad import RATE, Silero, track
from asr_kd.audio.waveform import from_array
from asr_kd.decoding.decoder import Decoder, checked
from asr_kd.decoding.listening import listen, network_for, whole
from asr_kd.decoding.words import Hypothesis, Word
from asr_kd.errors import UserError
from asr_kd.files import local_copy, place
from asr_kd.models.acoustic import Checkpoint

#: seconds of a block of an array that is heard block by block
BLOCK = 10


class Recording(NamedTuple):
    """A recording at the rate of who hears it.

    Attributes:
        name: for messages.
        blocks: float32 [samples] each, mono, full scale 1; one, if it is heard at once.
        at_once: whether it is no longer than what may be heard at once.
    """

    name: str
    blocks: Iterable[np.ndarray]
    at_once: bool


@contextlib.contextmanager
def fetched(file: str) -> Iterator[Path]:
    """A local copy of an audio file; UserError when it cannot be read."""
    if not file.strip():
        raise UserError("command line: an empty word where an audio file belongs; a variable of the shell may be empty")
    with contextlib.ExitStack() as stack:
        try:
            path = stack.enter_context(local_copy(place(file)))
            path.open("rb").close()
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror or 'not there'}); check the path") from None
        yield path


def of_file(path: Path, name: str, sample_rate: int, window: float) -> Recording:
    """The recording in a local file; AudioError as `decode`, of one longer than `window` seconds while it is read.

    Args:
        path: of the file.
        name: of the recording, for messages.
        sample_rate: wanted rate in Hz.
        window: seconds that are heard at once.
    """
    if seconds_of(path, name) <= window:
        return Recording(name, [decode(path.read_bytes(), name, sample_rate, window)[0]], True)
    return Recording(name, read_blocks(path, name, sample_rate), False)


def of_array(samples: np.ndarray, rate: int, name: str, sample_rate: int, window: float) -> Recording:
    """The recording in an array.

    Args:
        samples: as of `from_array`, like `rate`, in Hz.
        name: of the recording, for messages.
        sample_rate: wanted rate in Hz.
        window: seconds that are heard at once.

    Raises:
        AudioError: as `from_array`.
    """
    waveform = from_array(samples, rate, sample_rate, name)
    if len(samples) <= window * rate:
        return Recording(name, [waveform], True)
    edges = range(0, len(waveform), BLOCK * sample_rate)
    return Recording(name, (waveform[at : at + BLOCK * sample_rate] for at in edges), False)


def hypotheses(checkpoint: Checkpoint, decoder: Decoder, recording: Recording, window: float) -> list[Hypothesis]:
    """What was said, the best first; of a recording that is not heard at once the best alone, whose score is NaN.

    Args:
        checkpoint: the network.
        decoder: of its output.
        recording: at its rate.
        window: as of `listen`.

    Raises:
        AudioError: when the recording cannot be used.
    """
    if recording.at_once:
        with named(recording.name):
            return decoder(whole(checkpoint, *recording.blocks))
    words = list(listen(checkpoint, decoder, recording.blocks, recording.name, window))
    return [Hypothesis(" ".join(word.text for word in words), float("nan"), words)]


def spoken(
    checkpoint: Checkpoint,
    decoder: Decoder,
    sound: Callable[[int], Iterable[np.ndarray]],
    name: str,
    settings: SpeechSettings,
) -> Hypothesis:
    """What was said in a recording of any length that is cut at its pauses, each utterance heard by itself; its score is NaN.

    Memory holds an utterance, a block, and what `track` keeps. Where nobody speaks there are no words.

    Args:
        checkpoint: the network.
        decoder: of its output.
        sound: the recording at a rate in Hz, in blocks float32 [samples]; it is asked twice.
        name: of the recording, for messages.
        settings: where it is cut.

    Raises:
        AudioError: when the recording cannot be used.
        UserError: when the detector is not installed.
    """
    rate = checkpoint.features.sample_rate
    spans = speech(track(sound(RATE), Silero() if settings.detector == "silero" else None), settings)
    words: list[Word] = []
    with named(name):
        for span, waveform in zip(spans, slices(sound(rate), (span.at(rate) for span in spans)), strict=True):
            words += (_later(word, span.start / RATE) for word in decoder(whole(checkpoint, waveform))[0].words)
    return Hypothesis(" ".join(word.text for word in words), float("nan"), words)


def _later(word: Word, seconds: float) -> Word:
    """The same word so many seconds later."""
    moved = [dataclasses.replace(one, start=one.start + seconds, end=one.end + seconds) for one in word.tokens]
    return dataclasses.replace(word, start=word.start + seconds, end=word.end + seconds, tokens=tuple(moved))


def log_probs_of(checkpoint: Checkpoint, recording: Recording, window: float) -> np.ndarray:
    """The log-probabilities of which `hypotheses` are made, float32 [frames, units], nat; arguments and errors as there."""
    if recording.at_once:
        with named(recording.name):
            return checked(whole(checkpoint, *recording.blocks))
    network = network_for(checkpoint, window)
    heard = [network.push(block) for block in recording.blocks]
    with named(recording.name):
        return checked(np.concatenate([*heard, network.finish()]))
