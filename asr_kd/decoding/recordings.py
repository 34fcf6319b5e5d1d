"""A recording, a file or an array of any length → what a checkpoint makes of it: its hypotheses, or its log-probabilities."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
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
        at: the whole of it again, in blocks at a rate in Hz.
    """

    name: str
    blocks: Iterable[np.ndarray]
    at_once: bool
    at: Callable[[int], Iterable[np.ndarray]]


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
    at = functools.partial(read_blocks, path, name)
    if seconds_of(path, name) <= window:
        return Recording(name, [decode(path.read_bytes(), name, sample_rate, window)[0]], True, at)
    return Recording(name, at(sample_rate), False, at)


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
    at = lambda wanted: [from_array(samples, rate, wanted, name)]  # noqa: E731
    if len(samples) <= window * rate:
        return Recording(name, [waveform], True, at)
    edges = range(0, len(waveform), BLOCK * sample_rate)
    return Recording(name, (waveform[edge : edge + BLOCK * sample_rate] for edge in edges), False, at)


def hypotheses(
    checkpoint: Checkpoint,
    decoder: Decoder,
    recording: Recording,
    window: float,
    segment: SpeechSettings | None = None,
) -> list[Hypothesis]:
    """What was said, the best first; of a recording that is cut or not heard at once the best alone, whose score is NaN.

    Args:
        checkpoint: the network.
        decoder: of its output.
        recording: at its rate.
        window: as of `listen`.
        segment: where it is cut, each utterance to be heard by itself; None: nowhere.

    Raises:
        AudioError: when the recording cannot be used.
        UserError: when the detector is not installed.
    """
    if segment:
        return [_spoken(checkpoint, decoder, recording, segment)]
    if recording.at_once:
        with named(recording.name):
            return decoder(whole(checkpoint, *recording.blocks))
    words = list(listen(checkpoint, decoder, recording.blocks, recording.name, window))
    return [Hypothesis(" ".join(word.text for word in words), float("nan"), words)]


def _spoken(checkpoint: Checkpoint, decoder: Decoder, recording: Recording, settings: SpeechSettings) -> Hypothesis:
    """Memory holds an utterance, a block, and what `track` keeps. Where nobody speaks there are no words."""
    rate = checkpoint.features.sample_rate
    spans = speech(track(recording.at(RATE), Silero() if settings.detector == "silero" else None), settings)
    words: list[Word] = []
    with named(recording.name):
        waveforms = slices(recording.at(rate), (span.at(rate) for span in spans))
        for span, waveform in zip(spans, waveforms, strict=True):
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
