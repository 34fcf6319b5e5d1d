"""`asr_kd.load`: a model that transcribes recordings, hears them as they come, and gives its posteriors."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

import numpy as np
import torch

from asr_kd.audio.waveform import Arriving
from asr_kd.config.load import build
from asr_kd.decoding.decoder import Decoder, make_decoder
from asr_kd.decoding.listening import Listener, StreamingNetwork, check_streams
from asr_kd.decoding.pseudo_labels import Transcriber, transcriber_of
from asr_kd.decoding.recordings import Recording, fetched, hypotheses, log_probs_of, of_array, of_file
from asr_kd.decoding.settings import TranscribeSettings
from asr_kd.decoding.whisper import RATE
from asr_kd.decoding.words import Hypothesis, Word
from asr_kd.errors import AudioError, UserError
from asr_kd.models.acoustic import Checkpoint, pick_device
from asr_kd.models.teachers import load_teacher
from asr_kd.units import Units

#: what a recording is called that has no name
ARRAY, STREAM = "the array", "the stream"

Path = str | os.PathLike[str]
Samples = np.ndarray | torch.Tensor | Sequence[float]


class Hearing(TypedDict, total=False):
    """Settings of `load`: those of `asr-kd transcribe` with the same names and defaults, see `asr-kd transcribe --help`."""

    decoder: str
    beam: int
    nbest: int
    lm: Path | None
    lexicon: Path | None
    lm_weight: float
    word_bonus: float
    window_seconds: float
    segment: dict[str, Any] | None
    precision: str
    device: str
    whisper: dict[str, Any]


@dataclass(frozen=True)
class Transcript:
    """What was said in a recording.

    Attributes:
        words: of the text, with their times and confidences; none from a model that writes text without times.
        alternatives: the best hypotheses with their scores, the text's own first: as many as `nbest` asks for, one of a long recording, none
            from a model that writes text.
    """

    text: str
    words: list[Word]
    alternatives: list[Hypothesis]

    def __repr__(self) -> str:
        return f"Transcript({self.text!r}, {len(self.words)} words)"

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Posteriors:
    """How likely each unit is in each frame of a recording.

    Attributes:
        log_probs: float32 [frames, units], natural logarithm; of each frame the probabilities add up to 1.
        frame_ms: period of a frame in milliseconds.
        offset_ms: start of the first frame in the audio, in milliseconds.
        units: names and spelling of the units; unit 0 is the blank.
    """

    log_probs: np.ndarray
    frame_ms: int
    offset_ms: int
    units: Units

    @property
    def seconds(self) -> np.ndarray:
        """Start of each frame in the audio, float64 [frames]."""
        return (self.offset_ms + self.frame_ms * np.arange(len(self.log_probs))) / 1000

    def __repr__(self) -> str:
        frames, units = self.log_probs.shape
        return f"Posteriors({frames} frames of {self.frame_ms} ms, {units} units)"


class Stream:
    """A recording that is heard as it comes, made by `Recogniser.stream`.

    >>> stream = asr_kd.load("student").stream(rate=16000)
    >>> pieces = np.array_split(np.random.default_rng(0).normal(0, 0.1, 32000), 20)
    >>> known = [word.text for piece in pieces for word in stream.push(piece)]
    >>> known += [word.text for word in stream.finish()]
    >>> " ".join(known) == stream.text
    True
    """

    def __init__(self, checkpoint: Checkpoint, decoder: Decoder, rate: int) -> None:
        self._listener = Listener(StreamingNetwork(checkpoint), decoder, STREAM)
        self._arriving = Arriving(checkpoint.features.sample_rate, STREAM)
        self._rate, self._known, self._ended = rate, list[Word](), False

    def push(self, samples: Samples) -> list[Word]:
        """Hear the next samples; returns the words that nothing to come can change, those alone that are new.

        Args:
            samples: of any number: floats of full scale 1, or int16; [samples], or [samples, channels].

        Raises:
            AudioError: when they cannot be sound.
            UserError: after `finish`.
        """
        if self._ended:
            raise UserError(f"{STREAM}: has ended; begin another with stream()")
        return self._heard(self._listener.push(self._arriving.push(_copy(samples), self._rate)))

    def finish(self) -> list[Word]:
        """End the recording; returns the words that `push` has not returned. AudioError when it is shorter than one frame."""
        if self._ended:
            return []
        self._ended = True
        words = self._listener.push(self._arriving.finish())
        return self._heard(words + self._listener.finish())

    @property
    def rest(self) -> list[Word]:
        """Words after those returned, as of now: what comes may change them."""
        return [] if self._ended else self._listener.rest()

    @property
    def text(self) -> str:
        """All words so far, `rest` among them."""
        return " ".join(word.text for word in [*self._known, *self.rest])

    def _heard(self, words: list[Word]) -> list[Word]:
        self._known += words
        return words

    def __repr__(self) -> str:
        return f"Stream({self.text!r}, {'ended' if self._ended else f'at {self._rate} Hz'})"


class Recogniser:
    """A model that hears; made by `load`.

    >>> asr = asr_kd.load("student")
    >>> asr
    Recogniser('student', lstm, 8000 Hz, frames of 30 ms, streams 15 ms behind)
    >>> asr.units.size, asr.units.piece(0)
    (10, '∅')

    Attributes:
        name: the checkpoint.
        sample_rate: of what it hears, in Hz; other rates are converted.
    """

    def __init__(self, settings: TranscribeSettings) -> None:
        self.name, self._settings = settings.checkpoint, settings
        self._transcriber: Transcriber | None = transcriber_of(settings)
        if self._transcriber is None:
            with torch.random.fork_rng(
                devices=[]
            ):  # first weights are drawn before those of the checkpoint take their place
                self._checkpoint = load_teacher(self.name, pick_device(settings.device), settings.precision)
            self._decoder = make_decoder(settings, self._checkpoint)
        self.sample_rate: int = RATE if self._transcriber else self._checkpoint.features.sample_rate

    def transcribe(self, sound: Path | Samples, rate: int | None = None) -> Transcript:
        """The text of a recording: the same as of `asr-kd transcribe`.

        >>> asr = asr_kd.load("student")
        >>> heard = asr.transcribe("talk.wav")
        >>> samples, rate = soundfile.read("talk.wav")
        >>> asr.transcribe(samples, rate).text == heard.text == str(heard)
        True
        >>> asr.transcribe(samples)
        Traceback (most recent call last):
        ...
        asr_kd.errors.UserError: the array: needs its rate in Hz, such as rate=16000

        Args:
            sound: an audio file, or its URL; or samples, floats of full scale 1 or integers of their own, [samples] or [samples, channels].
            rate: of the samples, in Hz; a file says its own.

        Raises:
            AudioError: when the recording cannot be used.
            UserError: when there is no such file, or an array has no rate.
        """
        with self._recording(sound, rate) as recording:
            if self._transcriber:
                return Transcript(self._transcriber(recording.blocks, recording.name)["text"], [], [])
            window, segment = self._settings.window_seconds, self._settings.segment
            found = hypotheses(self._checkpoint, self._decoder, recording, window, segment)
        return Transcript(found[0].text, found[0].words, found)

    def posteriors(self, sound: Path | Samples, rate: int | None = None) -> Posteriors:
        """The posteriors of which the text of a recording is made.

        >>> asr_kd.load("student").posteriors("talk.wav")
        Posteriors(66 frames of 30 ms, 10 units)

        Args:
            sound: as of `transcribe`.
            rate: as of `transcribe`.

        Raises:
            AudioError: when the recording cannot be used.
            UserError: as of `transcribe`, when the model writes text and has none, and when recordings are cut (`segment`).
        """
        checkpoint = self.checkpoint
        if self._settings.segment:
            raise UserError("segment: posteriors are of a recording as a whole; load the model without it")
        with self._recording(sound, rate) as recording:
            log_probs = log_probs_of(checkpoint, recording, self._settings.window_seconds)
        return Posteriors(log_probs, checkpoint.frame_ms, checkpoint.offset_ms, checkpoint.units)

    def stream(self, rate: int | None = None) -> Stream:
        """A recording that is heard as it comes, uncut, at `rate` Hz; None takes `sample_rate`. A UserError when the model needs whole utterances."""
        if self._transcriber:
            raise UserError(f"{self.name}: hears whole utterances, and cannot stream; use transcribe")
        check_streams(self._checkpoint, self.name, "a stream")
        return Stream(self._checkpoint, self._decoder, self.sample_rate if rate is None else rate)

    @property
    def checkpoint(self) -> Checkpoint:
        """The network with all that belongs to it; a UserError where the model writes text and is no CTC network."""
        if self._transcriber:
            raise UserError(f"{self.name}: writes text, and has no posteriors and no units; use transcribe")
        return self._checkpoint

    @property
    def units(self) -> Units:
        """What the network tells apart: text ⇄ ids. A UserError as of `checkpoint`."""
        return self.checkpoint.units

    @property
    def frame_ms(self) -> int:
        """Period of a frame in milliseconds. A UserError as of `checkpoint`."""
        return self.checkpoint.frame_ms

    @property
    def streams(self) -> bool:
        """Whether it can hear a recording as it comes."""
        return self._transcriber is None and self._checkpoint.model.streams

    @contextmanager
    def _recording(self, sound: Path | Samples, rate: int | None) -> Iterator[Recording]:
        # a model that writes text cuts what it hears into pieces itself, and reads files block by block
        window = 0.0 if self._transcriber else self._settings.window_seconds
        if isinstance(sound, str | os.PathLike):
            name = os.fspath(sound)
            if rate is not None:
                raise UserError(f"rate: {name} is a file, which says its own; leave it out")
            with fetched(name) as path:
                yield of_file(path, name, self.sample_rate, window)
        elif rate is None:
            raise UserError(f"{ARRAY}: needs its rate in Hz, such as rate=16000")
        else:
            yield of_array(_copy(sound), rate, ARRAY, self.sample_rate, window)

    def __repr__(self) -> str:
        if self._transcriber:
            return f"Recogniser({self.name!r}, writes text, {self.sample_rate} Hz)"
        kind = self._checkpoint.settings.kind
        ahead = self._checkpoint.lookahead_ms
        how = f"streams {ahead} ms behind" if self.streams else "hears whole utterances"
        return f"Recogniser({self.name!r}, {kind}, {self.sample_rate} Hz, frames of {self.frame_ms} ms, {how})"


def load(checkpoint: Path, **settings: Unpack[Hearing]) -> Recogniser:
    """A model that hears.

    >>> asr_kd.load("student", decoder="beam", nbest=4).transcribe("talk.wav").alternatives[0].score < 0
    True
    >>> asr_kd.load("student", decodr="beam")
    Traceback (most recent call last):
    ...
    asr_kd.errors.UserError: asr_kd.load: unknown key decodr; did you mean decoder?

    Args:
        checkpoint: folder or URL of a checkpoint or a run; or a model from outside: a folder, `hf:owner/name@revision` or
            `torchaudio:BUNDLE` of a CTC model, or of Whisper or Moonshine, which writes text and has no posteriors.
        settings: of `asr-kd transcribe`, with the same names and defaults: `decoder`, `beam`, `nbest`, `lm`, `lexicon`, `lm_weight`,
            `word_bonus`, `window_seconds`, `segment`, `precision`, `device`, `whisper`.

    Raises:
        UserError: when there is no such model, it cannot be run here, or a setting does not fit it.
    """
    for name in settings.keys() & TranscribeSettings.model_fields.keys() - Hearing.__annotations__.keys():
        raise UserError(f"asr_kd.load: {name} is a setting of the command asr-kd transcribe alone; leave it out")
    values = {name: os.fspath(one) if isinstance(one, os.PathLike) else one for name, one in settings.items()}
    return Recogniser(build(TranscribeSettings, {"checkpoint": os.fspath(checkpoint), **values}, "asr_kd.load"))


def _copy(samples: Samples) -> np.ndarray:
    """An array of its own, which nobody changes later."""
    if isinstance(samples, torch.Tensor):
        samples = (samples.float() if samples.is_floating_point() else samples).detach().cpu().numpy()
    try:
        return np.array(samples)
    except ValueError:  # lists of several lengths
        raise AudioError(
            f"{ARRAY}: must be [samples] or [samples, channels], with as many channels everywhere"
        ) from None
