"""A manifest of audio → audio shards with an index, every utterance accounted for."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from asr_kd.audio.decode import encode, read_audio
from asr_kd.audio.recording import Recording
from asr_kd.ending import stop_if_asked
from asr_kd.errors import AudioError
from asr_kd.files import (
    Place,
    claim_folder,
    clear_errors,
    clear_torn,
    local_copy,
    place,
    read_json,
    sha256_file,
    write_json,
    write_whole,
)
from asr_kd.progress import Progress
from asr_kd.shards.leases import sole_writer
from asr_kd.shards.manifest import BOUNDS, Span, Utterance, read_manifest
from asr_kd.shards.quarantine import Quarantine
from asr_kd.shards.settings import PrepareSettings
from asr_kd.shards.tarset import INDEX, Sample, ShardInfo, shard_name, write_index, write_shard
from asr_kd.text import NORMALIZERS

IN_MEMORY = 1 << 20  # bytes of segments that are held in memory; more of them lie in a temporary file
RECORDS = ".records"  # beside the shards: what each group of utterances became
# of an audio file, which is read whole: a minute of 32 channels of 24 bits at 96 kHz has half of it
MAX_BYTES = 1 << 30


def prepare(settings: PrepareSettings) -> None:
    """Write the audio of a manifest as shards of `samples_per_shard` utterances, and print the account.

    Every file is decoded once; a recording of which the manifest names segments, once for each shard at most, and segment by segment. Its bytes are kept when it is mono, of the wanted rate and found whole by every reader (not joined, its
    header right); else it becomes FLAC with 16 bits. What cannot be decoded is left out of its shard and listed with its reason in `quarantine.jsonl`. Killed at any moment and
    started again, it goes on with the first shard that is not there, and ends in the same bytes. A shard that is there is not
    made again, even when its audio files have changed since: remove the folder for that.

    Raises:
        UserError: when the manifest is wrong, the output belongs to other settings, or more than `max_bad_share` was
            quarantined; then no index is written.
    """
    began = time.time()
    total = sum(1 for _ in read_manifest(settings.manifest))  # all of it is checked before anything is written
    claim = settings.model_dump(exclude={"manifest", "output", "max_bad_share", "normalizer"})
    if settings.normalizer != "none":  # texts as they stand are claimed as they were before there was a choice
        claim["normalizer"] = NORMALIZERS[settings.normalizer].name
    claim_folder(settings.output, "prepare", {**claim, "manifest": sha256_file(settings.manifest)})
    output, bad = place(settings.output), Quarantine(total, settings.max_bad_share)
    infos: list[ShardInfo] = []
    with sole_writer(output) as check:
        with (
            Progress("prepare", total, "utterances") as progress,
            contextlib.closing(_Preparation(settings, progress)) as preparation,
            write_whole(output / "quarantine.jsonl", "w", make_folder=False) as listing,
        ):
            for group in preparation.groups(check):
                if group["shard"]:
                    infos.append(ShardInfo(**group["shard"]))
                for line in group["quarantined"]:
                    bad.add(line["key"], line["reason"])
                    listing.write(json.dumps(line, ensure_ascii=False) + "\n")
        for folder in (output, output / RECORDS):
            clear_torn(folder, began)
        written = sum(info.samples for info in infos)
        hours = sum(info.seconds for info in infos) / 3600
        print(
            f"{output}: {total:,} utterances in = {written:,} written + {bad.count:,} quarantined\n"
            f"{hours:.3f} audio hours in {len(infos):,} shards"
        )
        if bad.too_many or not written:
            (output / INDEX).unlink(missing_ok=True)
        bad.refuse(settings.manifest, f"see {output / 'quarantine.jsonl'}, fix the audio and remove {output}")
        write_index(output, infos)


class _Preparation:
    """Groups of utterances → shards. One recording is open at a time, kept for the segments of it that follow."""

    def __init__(self, settings: PrepareSettings, progress: Progress) -> None:
        self._settings, self._progress = settings, progress
        self._stack = contextlib.ExitStack()
        self._audio: Place | None = None
        self._found: Recording | AudioError

    def close(self) -> None:
        self._stack.close()

    def groups(self, check: Callable[[], None]) -> Iterator[dict[str, Any]]:
        """What each group of utterances became: {"shard": ShardInfo or null, "quarantined": [{"key", "reason"}]}."""
        output, utterances = place(self._settings.output), read_manifest(self._settings.manifest)
        groups = iter(lambda: list(itertools.islice(utterances, self._settings.samples_per_shard)), [])
        for number, group in enumerate(groups):
            path = output / shard_name(number)
            record = output / RECORDS / f"{path.stem}.json"
            if record.exists():
                value = read_json(record, "record of a shard")
                shard = value["shard"]
                if shard is None or (path.is_file() and path.stat().st_size == shard["bytes"]):
                    self._progress.resume(len(group))
                    yield value
                    continue
            check()
            quarantined: list[dict[str, str]] = []
            # a whole shard that is bad is no shard; its number stays free
            samples = self._samples(group, quarantined)
            start = next(samples, None)
            info = write_shard(path, itertools.chain([start], samples)) if start else None
            value = {"shard": dataclasses.asdict(info) if info else None, "quarantined": quarantined}
            with clear_errors(record):
                record.parent.mkdir(exist_ok=True)
            write_json(record, value, make_folder=False)
            yield value

    def _samples(self, group: list[Utterance], quarantined: list[dict[str, str]]) -> Iterator[Sample]:
        """The samples of a group, and the reasons why others have none."""
        segments: dict[str, list[Utterance]] = {}  # by their recordings
        for utterance in group:
            if utterance.span != Span():
                segments.setdefault(str(utterance.audio), []).append(utterance)
        # by key; the audio lies in the spool, from a place on
        cut: dict[str, tuple[Sample, int, int] | AudioError] = {}
        with clear_errors(Path(tempfile.gettempdir()) / "segments"), tempfile.SpooledTemporaryFile(IN_MEMORY) as spool:
            for utterance in group:
                stop_if_asked()
                seconds = 0.0
                try:
                    if utterance.span != Span():
                        # all segments of a recording at once, in the order of time: one pass over it
                        for one in sorted(segments.pop(str(utterance.audio), []), key=lambda one: one.span.start):
                            cut[one.key] = self._cut(one, spool)
                        found = cut.pop(utterance.key)
                        if isinstance(found, AudioError):
                            raise found
                        sample, at, size = found
                        spool.seek(at)
                        sample = dataclasses.replace(sample, audio=spool.read(size))
                    else:
                        sample = self._whole(utterance, utterance.audio)
                    seconds = sample.fields["seconds"]
                    yield sample
                except AudioError as error:
                    quarantined.append({"key": utterance.key, "reason": str(error)})
                self._progress.advance(1, seconds)

    def _recording(self, audio: Place) -> Recording:
        """A recording, opened unless it is; AudioError when it cannot be read."""
        if self._audio != audio:
            self._stack.close()
            self._audio = audio
            try:
                with _readable(audio):
                    _check_file(audio)
                    self._found = Recording(self._stack.enter_context(local_copy(audio)), str(audio))
            except AudioError as error:
                self._found = error
        if isinstance(self._found, AudioError):
            raise self._found
        return self._found

    def _cut(self, utterance: Utterance, spool: IO[bytes]) -> tuple[Sample, int, int] | AudioError:
        """A segment, its audio at the end of the spool, or why there is none; the whole file where the bounds are its ends."""
        try:
            with _readable(utterance.audio):
                recording = self._recording(utterance.audio)
                start, end = recording.bounds(utterance.span.start, utterance.span.end)
                if start == 0.0 and end >= recording.seconds - recording.slack:
                    sample = self._whole(utterance, recording.path)
                else:
                    sample = self._segment(utterance, recording, start, end)
        except AudioError as error:
            return error
        spool.seek(0, io.SEEK_END)
        spool.write(sample.audio)
        return dataclasses.replace(sample, audio=b""), spool.tell() - len(sample.audio), len(sample.audio)

    def _segment(self, utterance: Utterance, recording: Recording, start: float, end: float) -> Sample:
        most = self._settings.max_seconds
        if end - start > most:
            raise AudioError(
                f"{utterance.audio}: the segment from {start:g} to {end:g} s is longer than max_seconds {most:g}; cut it or raise max_seconds"
            )
        waveform, rate = recording.cut(start, end, self._settings.sample_rate)
        _check_channel(utterance, recording.channels)
        known = {name: value for name, value in utterance.fields.items() if name not in BOUNDS}
        known |= {"source_start": round(start, 6), "source_end": round(end, 6)}
        utterance = dataclasses.replace(utterance, fields=known)
        return self._described(utterance, to_flac(waveform, rate), "flac", len(waveform) / rate)

    def _whole(self, utterance: Utterance, audio_file: Place) -> Sample:
        """An utterance that is a whole file, which may be a local copy."""
        name = str(utterance.audio)
        with _readable(utterance.audio):
            _check_file(audio_file)
            if (size := audio_file.stat().st_size) > MAX_BYTES:
                raise AudioError(f"{name}: has {size} bytes, more than one utterance may have ({MAX_BYTES}); cut it")
            data = audio_file.read_bytes()
        audio = read_audio(data, name, self._settings.sample_rate, self._settings.max_seconds)
        _check_channel(utterance, audio.source_channels)
        extension = audio.extension
        if audio.source_channels > 1 or audio.source_rate != audio.rate or not audio.plain:
            extension, data = "flac", to_flac(audio.waveform, audio.rate)
        return self._described(utterance, data, extension, len(audio.waveform) / audio.rate)

    def _described(self, utterance: Utterance, data: bytes, extension: str, seconds: float) -> Sample:
        fields: dict[str, Any] = {"seconds": round(seconds, 6)}
        if utterance.text is not None and not self._settings.drop_text:
            apply = NORMALIZERS[self._settings.normalizer].apply
            fields["text"] = utterance.text if self._settings.normalizer == "none" else apply(utterance.text)
        return Sample(utterance.key, data, extension, {**utterance.fields, **fields})


def _check_channel(utterance: Utterance, channels: int) -> None:
    """Refuse an utterance that is one channel of several, whose mean holds what others said."""
    channel = utterance.fields.get("channel")
    if channels > 1 and type(channel) is int:
        raise AudioError(
            f"{utterance.audio}: `channel` is {channel} of {channels}, and their mean is heard; write that channel to a file of its own, "
            f"such as the first one: ffmpeg -i all.wav -af 'pan=mono|c0=c0' one.wav"
        )


def _check_file(audio: Place) -> None:
    if not audio.exists():
        raise AudioError(f"{audio}: no such audio file; check `audio` in the manifest")
    if not audio.is_file():  # reading a pipe might never end
        raise AudioError(f"{audio}: is a folder, a pipe or a device; check `audio` in the manifest")


@contextlib.contextmanager
def _readable(audio: Place) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise AudioError(f"{audio}: cannot be read ({reason}); check the file and its permissions") from None


def to_flac(waveform: np.ndarray, rate: int) -> bytes:
    """A waveform [samples] as FLAC with 16 bits; one that goes beyond full scale is turned down, not clipped."""
    peak = max(float(np.abs(waveform).max()), 1.0)
    samples = np.clip(np.rint(waveform.astype(np.float64) / peak * 32768), -32768, 32767).astype(np.int16)
    return encode(samples, rate, "FLAC", "PCM_16")
