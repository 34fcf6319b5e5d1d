"""A recording, a file or an array of any length → what a checkpoint makes of it: its hypotheses, or its log-probabilities."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from asr_kd.audio.decode import decode, read_blocks, seconds_of
from asr_kd.audio.parts import named
from asr_kd.audio.waveform import from_array
from asr_kd.decoding.decoder import Decoder, checked
from asr_kd.decoding.listening import listen, network_for, whole
from asr_kd.decoding.words import Hypothesis
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


def log_probs_of(checkpoint: Checkpoint, recording: Recording, window: float) -> np.ndarray:
    """The log-probabilities of which `hypotheses` are made, float32 [frames, units], nat; arguments and errors as there."""
    if recording.at_once:
        with named(recording.name):
            return checked(whole(checkpoint, *recording.blocks))
    network = network_for(checkpoint, window)
    heard = [network.push(block) for block in recording.blocks]
    with named(recording.name):
        return checked(np.concatenate([*heard, network.finish()]))
