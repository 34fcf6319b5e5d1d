"""A manifest of audio → audio shards with an index, every utterance accounted for."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import itertools
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from asr_kd.audio.decode import read_audio, to_flac, wav_as_flac
from asr_kd.audio.recording import Recording
from asr_kd.audio.vad import silero_mark
from asr_kd.ending import stop_if_asked
from asr_kd.errors import AudioError, UserError
from asr_kd.files import (
    Place,
    check_there,
    claim_folder,
    clear_errors,
    clear_torn,
    local_copy,
    place,
    write_json,
)
from asr_kd.objects import ObjectPath
from asr_kd.progress import Progress
from asr_kd.shards.cutting import (
    Account,
    Aligner,
    LoadAligner,
    SilentError,
    check_channel,
    check_uncut,
    cut_at_pauses,
    cut_by_text,
    is_cut,
    is_long,
    loaded,
    normalized,
)
from asr_kd.shards.leases import SHARED, Leases, check_unowned, clear_leases
from asr_kd.shards.manifest import BOUNDS, Span, Utterance
from asr_kd.shards.pool import Crew, Pool, Processes, Work
from asr_kd.shards.ranges import Plan, Source, make_plan, remove_plan
from asr_kd.shards.records import RECORDS, finished, is_done, missing, publish, read_record, record_of, remove_index
from asr_kd.shards.settings import TIMING, PrepareSettings
from asr_kd.shards.tarset import Sample, shard_name, shard_stem, write_shard
from asr_kd.temporary import room_for
from asr_kd.text import NORMALIZERS

IN_MEMORY = 1 << 20  # bytes of segments that are held in memory; more of them lie in a temporary file
#: ranges that a worker has at a time: one that it makes, and the next one
IN_FLIGHT = 2
# of an audio file, which is read whole: a minute of 32 channels of 24 bits at 96 kHz has half of it
MAX_BYTES = 1 << 30


def prepare(settings: PrepareSettings, load: LoadAligner | None = None) -> None:
    """Write the audio of a manifest as shards of `samples_per_shard` utterances, and print the account.

    Every file is decoded once; a recording of which the manifest names segments, once for each shard at most, and segment by segment. Its bytes are kept when it is mono, of the wanted rate and found whole by every reader (not joined, its
    header right); else it becomes FLAC with 16 bits. What cannot be decoded is left out of its shard and listed with its reason in `quarantine.jsonl`. Killed at any moment and
    started again, it goes on with the shards that are not there, and ends in the same bytes. A shard that is there is not
    made again, even when its audio files have changed since: remove the folder for that. The manifest is read and checked once. Any number of processes
    with these settings share the shards, on all machines that share the folder; each ends when everything is done.

    Args:
        settings: of the job.
        load: makes the aligner of `segment.aligner` of its name (`asr_kd.decoding.prepare.prepare` hands in that of checkpoints); a
            function that worker processes can import.

    Raises:
        UserError: when the manifest is wrong, the output belongs to other settings, or more than `max_bad_share` was
            quarantined; then no index is written.
    """
    began = time.time()
    if settings.engine == "ray":
        import asr_kd.shards.ray_crew  # noqa: F401  # a missing Ray is told before anything is written
    output = place(settings.output)
    manifest = place(settings.manifest)
    _check_apart(manifest, output)
    if isinstance(output, ObjectPath):
        output.check_writable()
    source = Source.found(manifest, output)
    aligner = _aligner_of(settings, load)
    claim = _claim(settings, source, aligner and aligner())
    claiming = functools.partial(claim_folder, output, "prepare", claim, named={source.hash: settings.manifest})
    check = functools.partial(claiming, take=False)
    check()
    check_unowned(output)
    if outcome := finished(output):
        outcome.tell(settings)
    else:
        plan = make_plan(source, output, claim, settings.lines_per_shard, check)
        claiming()
        _make_all(settings, plan, aligner)
        publish(settings, plan)
    remove_plan(output)
    clear_leases(output)
    for folder in (output, output / RECORDS):
        clear_torn(folder, began)


def _check_apart(manifest: Place, output: Place) -> None:
    """Refuse an output in a folder that is the manifest, and would be another one as soon as something is written."""
    if isinstance(manifest, Path) and isinstance(output, Path) and manifest.is_dir():
        folder, within = manifest.resolve(), output.resolve()
        if folder in (within, *within.parents):
            raise UserError(f"output: {output} lies in {manifest}, which is the manifest; name a folder outside of it")


def _aligner_of(settings: PrepareSettings, load: LoadAligner | None) -> Callable[[], Aligner] | None:
    """What gives the aligner of a job, in any of its processes; None without one."""
    if not settings.segment or not settings.segment.aligner:
        return None
    if load is None:
        raise UserError(
            "segment.aligner: nothing was given that can load it; call asr_kd.decoding.prepare.prepare, which can load checkpoints"
        )
    return functools.partial(loaded, load, settings.segment.aligner)


def _claim(settings: PrepareSettings, source: Source, aligner: Aligner | None) -> dict[str, Any]:
    """Everything that the output depends on; not where anything is, nor how the work is split."""
    claim = settings.model_dump(exclude={"manifest", "output", "max_bad_share", "normalizer", *settings.sharing})
    if settings.normalizer != "none":  # texts as they stand are claimed as they were before there was a choice
        claim["normalizer"] = NORMALIZERS[settings.normalizer].name
    if settings.segment and settings.segment.detector == "silero":
        claim["segment"]["silero"] = silero_mark()
    if aligner:
        claim["segment"]["aligner"] = aligner.mark
    return {**claim, "manifest": source.hash}


def _make_all(settings: PrepareSettings, plan: Plan, aligner: Callable[[], Aligner] | None) -> None:
    """Have all ranges made that are not, together with all other processes that do the same."""
    output, start = place(settings.output), time.perf_counter()
    check_there(output)
    with clear_errors(output / RECORDS / "any"):
        (output / RECORDS).mkdir(exist_ok=True)
    left = missing(output, plan.ranges)
    if not left:
        return
    remove_index(output)
    before, made, seconds = len(plan.ranges) - len(left), 0, 0.0

    def published(number: int) -> bool:
        if there := is_done(output, number):  # and was not when this process last looked: another one made it
            progress.advance(plan.count(number))
        return there

    def not_done(some: Sequence[int]) -> list[int]:
        left = missing(output, some)
        progress.advance(plan.total - sum(map(plan.count, left)) - progress.done)  # done by others in the meantime
        return left

    with (
        Progress("prepare", plan.total, "utterances") as progress,
        Leases(output / SHARED) as leases,
        contextlib.closing(
            _pool(settings, plan, progress, len(left), aligner)
            or _Preparation(settings, plan, progress, aligner=aligner)
        ) as team,
    ):

        def work(free: Iterator[int]) -> Iterator[int]:
            nonlocal made, seconds
            for number, length in team.run(free):
                if isinstance(team, Pool):  # who works here counts utterance by utterance
                    progress.advance(plan.count(number), length)
                yield number
                made += 1
                seconds += length

        progress.resume(plan.total - sum(map(plan.count, left)))
        leases.share(left, shard_name, published, not_done, work)
    if made:
        took = time.perf_counter() - start
        timing = {
            "workers": team.worked / took if isinstance(team, Pool) else 1.0, "shards": made, "shards_done_before": before, "seconds": took,
            "audio_hours_per_hour": seconds / took,
        }  # fmt: skip
        write_json(output / TIMING, timing, make_folder=False)


def _pool(
    settings: PrepareSettings, plan: Plan, progress: Progress, left: int, aligner: Callable[[], Aligner] | None
) -> Pool[int] | None:
    """The workers that the settings ask for, no more than ranges are left; None: this process."""
    least, room = min(settings.workers, left), "a core"
    most: int | None = least
    if settings.engine == "ray":
        from asr_kd.shards.ray_crew import RayCrew

        least, most, room = min(settings.min_workers, left), settings.max_workers, f"{settings.worker_cpus} CPUs"
        crew: Crew = RayCrew(settings, _Preparation, (settings, plan, None, os.getcwd(), aligner))
    elif settings.workers > 1:
        crew = Processes(functools.partial(_Preparation, settings, plan, aligner=aligner))
    else:
        return None
    output = place(settings.output)
    work: Work[int] = Work(
        "prepare", shard_stem, (output, output / RECORDS),
        deadly=lambda number, deaths: (
            f"{output / shard_name(number)}: {deaths} workers died over this shard, most likely for lack of memory; use fewer workers, or "
            f"look at the audio of utterances {number * plan.size + 1} to {number * plan.size + plan.count(number)} of {settings.manifest}"
        ),
        unable=lambda deaths: (
            f"{output}: {deaths} workers died as they started, for lack of memory or in a script that does not call prepare "
            "under if __name__ == '__main__'; use fewer workers, or change the script"
        ),
        room=room,
    )  # fmt: skip
    return Pool(crew, work, progress, least, most, IN_FLIGHT)


class _Preparation:
    """Ranges of utterances → shards. One recording is open at a time, kept for the segments of it that follow.

    Args:
        settings: of the job.
        plan: of its ranges.
        progress: counts utterances; None: nobody does.
        folder: that relative paths count from, where it is another than that of this process.
        aligner: gives the aligner of recordings with text; None: they stay as they are.
    """

    def __init__(
        self,
        settings: PrepareSettings,
        plan: Plan,
        progress: Progress | None = None,
        folder: str | None = None,
        aligner: Callable[[], Aligner] | None = None,
    ) -> None:
        self._settings, self._plan, self._folder, self._aligner = settings, plan, folder, aligner
        self._progress = progress or Progress("prepare", None, "", show=False)  # the driver counts whole ranges
        self._stack = contextlib.ExitStack()
        self._audio: Place | None = None
        self._found: Recording | AudioError

    def close(self) -> None:
        self._stack.close()

    def load(self) -> str:
        """As of `pool.Worker`; returns the machine's name."""
        if self._folder:
            try:
                os.chdir(self._folder)
            except OSError as error:
                raise UserError(
                    f"{self._folder}: cannot be entered on {socket.gethostname()}, where a worker was started ({error.strerror}); run the "
                    "command in a folder that all machines have"
                ) from None
        return socket.gethostname()

    def run(self, free: Iterable[int]) -> Iterator[tuple[int, float]]:
        """Make ranges; yields each with its seconds of audio when it is published."""
        for number in free:
            yield number, self._make(number)

    def do(self, number: int) -> float:
        """Make a range as a worker, which is killed when it has nothing more to do: no copy of a recording is left to it."""
        try:
            return self._make(number)
        finally:
            self._stack.close()
            self._audio = None

    def _make(self, number: int) -> float:
        """Make a range unless it is there, its shard and then its record; returns its seconds of audio.

        A record is {"shard": ShardInfo or null, "quarantined": [{"key", "reason"}]}, and with `segment` {"segments": Account}.
        """
        output = place(self._settings.output)
        path = record_of(output, number)
        if is_done(output, number):  # by a worker that died before it could say so
            shard = read_record(path)["shard"]
            return shard["seconds"] if shard else 0.0
        quarantined: list[dict[str, Any]] = []
        account = Account()
        # a whole shard that is bad is no shard; its number stays free
        samples = self._samples(self._plan.read(number), quarantined, account)
        start = next(samples, None)
        info = write_shard(output / shard_name(number), itertools.chain([start], samples)) if start else None
        value = {"shard": dataclasses.asdict(info) if info else None, "quarantined": quarantined}
        if self._settings.segment:
            value["segments"] = dataclasses.asdict(account)
        with clear_errors(path):
            path.parent.mkdir(exist_ok=True)
        write_json(path, value, make_folder=False)
        return info.seconds if info else 0.0

    def _samples(self, group: list[Utterance], quarantined: list[dict[str, Any]], account: Account) -> Iterator[Sample]:
        """The samples of a group, the reasons why others have none, and an account of those that were cut at pauses."""
        segments: dict[str, list[Utterance]] = {}  # by their recordings
        for utterance in group:
            if utterance.span != Span() and not is_cut(utterance, self._settings):
                segments.setdefault(str(utterance.audio), []).append(utterance)
        # by key; the audio lies in the spool, from a place on
        cut: dict[str, tuple[Sample, int, int] | AudioError] = {}
        with room_for("segments of recordings"), tempfile.SpooledTemporaryFile(IN_MEMORY) as spool:
            for utterance in group:
                stop_if_asked()
                seconds = 0.0
                try:
                    if is_cut(utterance, self._settings):
                        found = self._at_pauses(utterance, account)
                    elif self._is_long(utterance):
                        found = self._by_text(utterance, account, quarantined)
                    else:
                        found = iter([self._one(utterance, segments, cut, spool)])
                    for sample in found:
                        seconds += sample.fields["seconds"]
                        yield sample
                except AudioError as error:
                    silent = {"silent": True} if isinstance(error, SilentError) else {}
                    quarantined.append({"key": utterance.key, "reason": str(error), **silent})
                self._progress.advance(1, seconds)

    def _at_pauses(self, utterance: Utterance, account: Account) -> Iterator[Sample]:
        """The utterances of a recording, which is cut at its pauses."""
        with _readable(utterance.audio):
            yield from cut_at_pauses(utterance, self._recording(utterance.audio), self._settings, account)

    def _is_long(self, utterance: Utterance) -> bool:
        """Whether an utterance with text is to be cut by it."""
        if self._aligner is None:
            return False
        with _readable(utterance.audio):
            return is_long(utterance, self._recording(utterance.audio), self._settings)

    def _by_text(self, utterance: Utterance, account: Account, quarantined: list[dict[str, Any]]) -> Iterator[Sample]:
        """The utterances of a recording with text, and the pieces whose text does not fit."""
        assert self._aligner is not None
        misfits: list[tuple[str, str]] = []
        with _readable(utterance.audio):
            recording = self._recording(utterance.audio)
            yield from cut_by_text(utterance, recording, self._settings, account, misfits, self._aligner())
        quarantined += [{"key": key, "reason": reason, "piece": True} for key, reason in misfits]

    def _one(
        self,
        utterance: Utterance,
        segments: dict[str, list[Utterance]],
        cut: dict[str, tuple[Sample, int, int] | AudioError],
        spool: IO[bytes],
    ) -> Sample:
        """The sample of a line that is an utterance: a whole file, or a segment."""
        check_uncut(utterance, self._settings)
        if utterance.span == Span():
            return self._whole(utterance, utterance.audio)
        # all segments of a recording at once, in the order of time: one pass over it
        for one in sorted(segments.pop(str(utterance.audio), []), key=lambda one: one.span.start):
            cut[one.key] = self._cut(one, spool)
        found = cut.pop(utterance.key)
        if isinstance(found, AudioError):
            raise found
        sample, at, size = found
        spool.seek(at)
        return dataclasses.replace(sample, audio=spool.read(size))

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
        check_channel(utterance, recording.channels)
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
        check_channel(utterance, audio.source_channels)
        extension = audio.extension
        if audio.source_channels > 1 or audio.source_rate != audio.rate or not audio.plain:
            extension, data = "flac", to_flac(audio.waveform, audio.rate)
        elif extension == "wav" and self._settings.audio_format == "flac" and (same := wav_as_flac(data)):
            extension, data = "flac", same
        return self._described(utterance, data, extension, len(audio.waveform) / audio.rate)

    def _described(self, utterance: Utterance, data: bytes, extension: str, seconds: float) -> Sample:
        fields: dict[str, Any] = {"seconds": round(seconds, 6)}
        if utterance.text is not None and not self._settings.drop_text:
            fields["text"] = normalized(utterance.text, self._settings)
        return Sample(utterance.key, data, extension, {**utterance.fields, **fields})


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
        reason = error.strerror or ("it is not there" if isinstance(error, FileNotFoundError) else error)
        raise AudioError(f"{audio}: cannot be read ({reason}); check the file and its permissions") from None
