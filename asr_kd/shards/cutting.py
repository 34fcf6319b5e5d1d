"""A long recording of the manifest → the utterances that were said in it, with an account of what was left out."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from asr_kd.audio.decode import native_blocks, to_flac
from asr_kd.audio.recording import BLOCK, Recording
from asr_kd.audio.segments import Stretch, between, by_words, part, slices, speech
from asr_kd.audio.vad import RATE, Silero, Track, track
from asr_kd.audio.waveform import streamed
from asr_kd.ending import stop_if_asked
from asr_kd.errors import AudioError, UserError
from asr_kd.shards.manifest import BOUNDS, Utterance, check_key, shown
from asr_kd.shards.settings import PrepareSettings, SegmentSettings
from asr_kd.shards.tarset import Sample
from asr_kd.text import NORMALIZERS

#: the end of the key of an utterance that was cut from a recording: where it begins and ends, in hundredths of a second
CUT = re.compile(r"-\d{7,}-\d{7,}$")


class Word(Protocol):
    """When a word of a text is said: seconds, the log-probability (nat) of its alignment, and how many units it is spelt with."""

    @property
    def text(self) -> str: ...
    @property
    def start(self) -> float: ...
    @property
    def end(self) -> float: ...
    @property
    def score(self) -> float: ...
    @property
    def units(self) -> int: ...


class Aligner(Protocol):
    """Finds the words of a text in sound at `rate` Hz; `mark` tells it from others."""

    rate: int
    mark: str

    def align(self, blocks: Iterable[np.ndarray], text: str) -> Sequence[Word]:
        """The words in the order of time, in sound in blocks float32 [samples]; AudioError when it cannot."""


#: a checkpoint → its aligner, which is of a room above this one: whoever calls `prepare` hands it in
LoadAligner = Callable[[str], Aligner]


class SilentError(AudioError):
    """Nobody speaks in a recording."""


@dataclass
class Account:
    """What became of recordings that were cut.

    Attributes:
        recordings: how many were heard to their end.
        heard: seconds of them: those `written` as utterances, and those that are `left_out`.
        stretches: how many stretches were left out: pauses, beginnings, ends, and what is silent as a whole.
        misfits: pieces of recordings with text that were quarantined, because their text does not fit.
        misfit: seconds of them, which are heard too.
    """

    recordings: int = 0
    heard: float = 0.0
    written: float = 0.0
    left_out: float = 0.0
    stretches: int = 0
    misfits: int = 0
    misfit: float = 0.0

    def add(self, other: Account) -> None:
        """Add what became of others."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, round(getattr(self, field.name) + getattr(other, field.name), 6))

    def __str__(self) -> str:
        misfit = f" + {self.misfit / 3600:.3f} h quarantined in {self.misfits:,} pieces" if self.misfits else ""
        return (
            f"{self.recordings:,} recordings cut: {self.heard / 3600:.3f} h heard = {self.written / 3600:.3f} h written + "
            f"{self.left_out / 3600:.3f} h left out in {self.stretches:,} pauses{misfit}"
        )


def is_cut(utterance: Utterance, settings: PrepareSettings) -> bool:
    """Whether a line of the manifest becomes as many utterances as are said in it; one with text stays as it is."""
    return settings.segment is not None and (utterance.text is None or settings.drop_text)


def check_uncut(utterance: Utterance, settings: PrepareSettings) -> None:
    """Refuse the key of a line that stays as it is where another line's utterance might be given the same."""
    if settings.segment and CUT.search(utterance.key):
        raise AudioError("its key ends as keys of utterances do that are cut from recordings; give it another one")


def is_long(utterance: Utterance, recording: Recording, settings: PrepareSettings) -> bool:
    """Whether a line with text is cut by it. It raises AudioError as `Recording.bounds`."""
    start, end = recording.bounds(utterance.span.start, utterance.span.end)
    return settings.segment is not None and end - start > settings.segment.max_seconds


def cut_at_pauses(
    utterance: Utterance, recording: Recording, settings: PrepareSettings, account: Account
) -> Iterator[Sample]:
    """The utterances of a recording, in order.

    It is decoded twice: once for the detector, once for the sound. Memory holds a block and an utterance, and what `track` keeps.

    Args:
        utterance: the line of the manifest, of all of the recording or a part of it.
        recording: its audio.
        settings: with `segment`.
        account: what is written and left out is added to it, before the first utterance.

    Raises:
        SilentError: when nothing is said in it.
        AudioError: when it cannot be read; before the first utterance.
        UserError: when the file changes meanwhile.
    """
    source = _Source(utterance, recording)
    found = source.listen(settings)
    spans = speech(found, source.chosen(settings))
    keys = [source.key(span) for span in spans]
    account.add(_account(spans, found.samples))
    if not spans:
        raise _silent(source, found, settings)
    yield from source.samples([(key, span, None) for key, span in zip(keys, spans, strict=True)], settings)


def cut_by_text(
    utterance: Utterance,
    recording: Recording,
    settings: PrepareSettings,
    account: Account,
    misfits: list[tuple[str, str]],
    aligner: Aligner,
) -> Iterator[Sample]:
    """The utterances of a recording whose text is known, in order, each with its part of the text.

    The text is aligned with the sound, so that each word has its time; cuts lie between words (`by_words`).

    Args:
        utterance: as of `cut_at_pauses`, as `recording`, `settings` (with `segment`) and `account` are.
        aligner: of its text.
        misfits: key and reason of each piece that is left out, because its text does not fit, are added to it.

    Raises:
        AudioError: as `cut_at_pauses`; when the text cannot be aligned, nor cut, or no piece of it fits.
        UserError: when the checkpoint cannot be used, or the file changes meanwhile.
    """
    assert settings.segment is not None and utterance.text is not None
    source = _Source(utterance, recording)
    found = source.listen(settings)
    try:
        words = aligner.align(streamed(source.blocks(), aligner.rate, source.name), utterance.text)
    except AudioError as error:
        raise AudioError(f"{source.name}: its text cannot be aligned: {error}") from None
    times = [_within(word, found.samples) for word in words]
    pieces = by_words(found, times, settings.segment)
    if isinstance(pieces, Stretch):
        raise AudioError(
            f"{source.name}: from {source.start + pieces.start / RATE:.2f} to {source.start + pieces.end / RATE:.2f} s there is no place "
            f"between two words to cut it to segment.max_seconds {settings.segment.max_seconds:g}; its text may lack what is said there"
        )
    kept: list[tuple[str, Stretch, str | None]] = []
    bad: list[tuple[str, str]] = []
    seconds = 0.0
    for span, first, last in pieces:
        score = sum(word.score for word in words[first:last]) / max(1, sum(word.units for word in words[first:last]))
        key, text = source.key(span), " ".join(word.text for word in words[first:last])
        if score < settings.segment.min_score:
            reason = f"its text {shown(text)} does not fit: {score:.2f} nat a unit, below segment.min_score {settings.segment.min_score:g}"
            bad.append((key, f"{source.name}: {reason}"))
            seconds += span.samples / RATE
        else:
            kept.append((key, span, text))
    if not kept:
        raise AudioError(f"{bad[0][1]}, and so are all its {len(bad)} pieces")
    whole = _account([span for span, _, _ in pieces], found.samples)
    account.add(dataclasses.replace(whole, written=whole.written - seconds, misfits=len(bad), misfit=seconds))
    misfits += bad
    yield from source.samples(kept, settings)


def _within(word: Word, samples: int) -> Stretch:
    """Where a word lies, at RATE."""
    return Stretch(min(round(word.start * RATE), samples), min(round(word.end * RATE), samples))


@functools.cache
def loaded(load: LoadAligner, checkpoint: str) -> Aligner:
    """The aligner of a checkpoint, loaded once in a process."""
    return load(checkpoint)


class _Source:
    """The recording, or part of one, that a line of the manifest names; times count from `start` in seconds."""

    def __init__(self, utterance: Utterance, recording: Recording) -> None:
        self.utterance, self.recording, self.name = utterance, recording, recording.name
        self.start, end = recording.bounds(utterance.span.start, utterance.span.end)
        self._end = None if end >= recording.seconds - recording.slack else end
        self._channels = 0

    @staticmethod
    def chosen(settings: PrepareSettings) -> SegmentSettings:
        """The settings that say how it is cut."""
        assert settings.segment is not None
        return settings.segment

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Rate and samples [samples, channels]."""
        native = native_blocks(self.recording.path, self.name, BLOCK)
        for rate, samples in part(native, self.start, self._end):
            stop_if_asked()
            self._channels = max(self._channels, samples.shape[1])
            yield rate, samples

    def listen(self, settings: PrepareSettings) -> Track:
        """What the detector finds."""
        network = Silero() if self.chosen(settings).detector == "silero" else None
        found = track(streamed(self.blocks(), RATE, self.name), network)
        check_channel(self.utterance, self._channels)
        return found

    def key(self, span: Stretch) -> str:
        """Of the utterance in a span."""
        bounds = (round(100 * (self.start + edge / RATE)) for edge in (span.start, span.end))
        try:
            return check_key("-".join([self.utterance.key, *(f"{edge:07d}" for edge in bounds)]), self.name)
        except UserError as error:
            raise AudioError(str(error)) from None

    def samples(self, spans: list[tuple[str, Stretch, str | None]], settings: PrepareSettings) -> Iterator[Sample]:
        """The utterances in spans, each with its key and its text, if it is known."""
        rate = settings.sample_rate or self.recording.rate
        known = {name: value for name, value in self.utterance.fields.items() if name not in BOUNDS}
        try:
            waveforms = slices(streamed(self.blocks(), rate, self.name), (span.at(rate) for _, span, _ in spans))
            for (key, span, text), waveform in zip(spans, waveforms, strict=True):
                if not len(waveform):
                    raise AudioError(f"{self.name}: has no sound at {self.start + span.start / RATE:g} s")
                fields = {
                    "source_start": round(self.start + span.start / RATE, 6),
                    "source_end": round(self.start + span.end / RATE, 6),
                    "seconds": round(len(waveform) / rate, 6),
                }
                said = {} if text is None else {"text": normalized(text, settings)}
                yield Sample(key, to_flac(waveform, rate), "flac", {**known, **fields, **said})
        except (AudioError, OSError) as error:  # it could be read to its end just now
            why = f"{self.name}: {error.strerror or error}" if isinstance(error, OSError) else error
            raise UserError(f"{why}; the file changed while it was cut: start again when it is whole") from None


def normalized(text: str, settings: PrepareSettings) -> str:
    """A text as it is written."""
    return text if settings.normalizer == "none" else NORMALIZERS[settings.normalizer].apply(text)


def _silent(source: _Source, found: Track, settings: PrepareSettings) -> SilentError:
    chosen = source.chosen(settings)
    return SilentError(
        f"{source.name}: no speech was heard in its {found.samples / RATE:.1f} s (segment.detector {chosen.detector}, threshold "
        f"{chosen.threshold:g}); lower the threshold if there is some"
    )


def _account(spans: list[Stretch], samples: int) -> Account:
    rest = between(spans, samples)
    return Account(1, samples / RATE, _seconds(spans), _seconds(rest), len(rest))


def _seconds(spans: list[Stretch]) -> float:
    return sum(span.samples for span in spans) / RATE


def check_channel(utterance: Utterance, channels: int) -> None:
    """Refuse an utterance that is one channel of several, whose mean holds what others said."""
    channel = utterance.fields.get("channel")
    if channels > 1 and type(channel) is int:
        raise AudioError(
            f"{utterance.audio}: `channel` is {channel} of {channels}, and their mean is heard; write that channel to a file of its own, "
            f"such as the first one: ffmpeg -i all.wav -af 'pan=mono|c0=c0' one.wav"
        )
