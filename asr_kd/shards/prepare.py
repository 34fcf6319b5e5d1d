"""A manifest of audio → audio shards with an index, every utterance accounted for."""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from asr_kd.audio.decode import encode, read_audio
from asr_kd.config import PrepareSettings
from asr_kd.errors import AudioError, UserError
from asr_kd.files import (
    Place,
    claim_folder,
    clear_errors,
    clear_torn,
    place,
    read_json,
    sha256_file,
    write_json,
    write_whole,
)
from asr_kd.progress import Progress
from asr_kd.shards.manifest import Utterance, read_manifest
from asr_kd.shards.tarset import INDEX, Sample, ShardInfo, shard_name, write_index, write_shard

RECORDS = ".records"  # beside the shards: what each group of utterances became
MAX_BYTES = (
    1 << 30
)  # of an audio file, which is read whole: a minute of 32 channels of 24 bits at 96 kHz has half of it


def prepare(settings: PrepareSettings) -> None:
    """Write the audio of a manifest as shards of `samples_per_shard` utterances, and print the account.

    Every file is decoded once. Its bytes are kept when it is mono, of the wanted rate and found whole by every reader (not joined, its
    header right); else it becomes FLAC with 16 bits. What cannot be decoded is left out of its shard and listed with its reason in `quarantine.jsonl`. Killed at any moment and
    started again, it goes on with the first shard that is not there, and ends in the same bytes. A shard that is there is not
    made again, even when its audio files have changed since: remove the folder for that.

    Raises:
        UserError: when the manifest is wrong, the output belongs to other settings, or more than `max_bad_share` was
            quarantined; then no index is written.
    """
    began = time.time()
    total = sum(1 for _ in read_manifest(settings.manifest))  # all of it is checked before anything is written
    claim = settings.model_dump(exclude={"manifest", "output", "max_bad_share"})
    claim_folder(settings.output, "prepare", {**claim, "manifest": sha256_file(settings.manifest)})
    output = place(settings.output)
    infos: list[ShardInfo] = []
    quarantined, first = 0, ""
    with (
        Progress("prepare", total, "utterances") as progress,
        write_whole(output / "quarantine.jsonl", "w", make_folder=False) as listing,
    ):
        for group in _groups(settings, output, progress):
            if group["shard"]:
                infos.append(ShardInfo(**group["shard"]))
            for line in group["quarantined"]:
                first = first or f"{line['key']}: {line['reason']}"
                quarantined += 1
                listing.write(json.dumps(line, ensure_ascii=False) + "\n")
    for folder in (output, output / RECORDS):
        clear_torn(folder, began)
    written = sum(info.samples for info in infos)
    hours = sum(info.seconds for info in infos) / 3600
    print(
        f"{output}: {total:,} utterances in = {written:,} written + {quarantined:,} quarantined\n"
        f"{hours:.3f} audio hours in {len(infos):,} shards"
    )
    if quarantined > settings.max_bad_share * total or not written:
        (output / INDEX).unlink(missing_ok=True)
        raise UserError(
            f"{settings.manifest}: {quarantined} of {total} utterances cannot be used, more than max_bad_share "
            f"{settings.max_bad_share} (first: {first}); see {output / 'quarantine.jsonl'}, mend the audio and remove {output}, "
            "or raise max_bad_share"
        )
    write_index(output, infos)


def _groups(settings: PrepareSettings, output: Place, progress: Progress) -> Iterator[dict[str, Any]]:
    """What each group of utterances became: {"shard": ShardInfo or null, "quarantined": [{"key", "reason"}]}."""
    utterances = read_manifest(settings.manifest)
    for number in itertools.count():
        group = list(itertools.islice(utterances, settings.samples_per_shard))
        if not group:
            return
        path = output / shard_name(number)
        record = output / RECORDS / f"{path.stem}.json"
        if record.exists():
            value = read_json(record, "record of a shard")
            shard = value["shard"]
            if shard is None or (path.is_file() and path.stat().st_size == shard["bytes"]):
                progress.resume(len(group))
                yield value
                continue
        quarantined: list[dict[str, str]] = []
        # a whole shard that is bad is no shard; its number stays free
        samples = _samples(settings, group, quarantined, progress)
        start = next(samples, None)
        info = write_shard(path, itertools.chain([start], samples)) if start else None
        value = {"shard": dataclasses.asdict(info) if info else None, "quarantined": quarantined}
        with clear_errors(record):
            record.parent.mkdir(exist_ok=True)
        write_json(record, value, make_folder=False)
        yield value


def _samples(
    settings: PrepareSettings, group: list[Utterance], quarantined: list[dict[str, str]], progress: Progress
) -> Iterator[Sample]:
    for utterance in group:
        seconds = 0.0
        try:
            sample = _sample(settings, utterance)
            seconds = sample.fields["seconds"]
            yield sample
        except AudioError as error:
            quarantined.append({"key": utterance.key, "reason": str(error)})
        progress.advance(1, seconds)


def _sample(settings: PrepareSettings, utterance: Utterance) -> Sample:
    name = str(utterance.audio)
    try:
        if not utterance.audio.exists():
            raise AudioError(f"{name}: no such audio file; check `audio` in the manifest")
        if not utterance.audio.is_file():  # reading a pipe might never end
            raise AudioError(f"{name}: is a folder, a pipe or a device; check `audio` in the manifest")
        if (size := utterance.audio.stat().st_size) > MAX_BYTES:
            raise AudioError(f"{name}: has {size} bytes, more than one utterance may have ({MAX_BYTES}); cut it")
        data = utterance.audio.read_bytes()
    except OSError as error:
        raise AudioError(
            f"{name}: cannot be read ({error.strerror or error}); check the file and its permissions"
        ) from None
    audio = read_audio(data, name, settings.sample_rate, settings.max_seconds)
    extension = audio.extension
    if audio.source_channels > 1 or audio.source_rate != audio.rate or not audio.plain:
        extension, data = "flac", to_flac(audio.waveform, audio.rate)
    fields: dict[str, Any] = {"seconds": round(len(audio.waveform) / audio.rate, 6)}
    if utterance.text is not None and not settings.drop_text:
        fields["text"] = utterance.text
    return Sample(utterance.key, data, extension, {**utterance.fields, **fields})


def to_flac(waveform: np.ndarray, rate: int) -> bytes:
    """A waveform [samples] as FLAC with 16 bits; one that goes beyond full scale is turned down, not clipped."""
    peak = max(float(np.abs(waveform).max()), 1.0)
    samples = np.clip(np.rint(waveform.astype(np.float64) / peak * 32768), -32768, 32767).astype(np.int16)
    return encode(samples, rate, "FLAC", "PCM_16")
