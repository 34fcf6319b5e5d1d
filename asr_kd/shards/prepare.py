"""The job `prepare`: manifest → audio shards and their index, bad audio quarantined with its reason."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile

from asr_kd.audio.decode import decode
from asr_kd.config import PrepareSettings
from asr_kd.errors import AudioError, UserError
from asr_kd.files import claim_folder, sha256_file, write_whole
from asr_kd.progress import Progress
from asr_kd.shards.manifest import Utterance, read_manifest
from asr_kd.shards.tarset import Sample, ShardInfo, shard_name, write_index, write_shard


def to_flac(waveform: np.ndarray, rate: int) -> bytes:
    """A mono waveform, float32 [samples] in [-1, 1], as 16-bit FLAC."""
    buffer = io.BytesIO()
    soundfile.write(buffer, np.clip(waveform, -1.0, 32767 / 32768), rate, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def prepare(settings: PrepareSettings) -> None:
    """Write the utterances of a manifest as audio shards of 16-bit FLAC.

    The index is written last. `quarantine.jsonl` lists what could not be used, with the reason.

    Raises:
        UserError: when the manifest is wrong, or more than `max_bad_share` of its audio.
    """
    total = sum(1 for _ in read_manifest(settings.manifest))  # the whole manifest is checked before anything is written
    folder = Path(settings.output)
    claim_folder(folder, "prepare", {**settings.model_dump(), "manifest_sha256": sha256_file(settings.manifest)})
    bad: list[tuple[str, str]] = []
    shards: list[ShardInfo] = []
    with Progress(f"prepare {folder.name}", total, "utterances") as progress:
        samples = _samples(settings, bad, progress)
        for number in itertools.count():
            first = next(samples, None)
            if first is None:
                break
            part = itertools.chain([first], itertools.islice(samples, settings.samples_per_shard - 1))
            shards.append(write_shard(folder / shard_name(number), part))
    with write_whole(folder / "quarantine.jsonl", "w") as file:
        file.writelines(json.dumps({"key": key, "reason": reason}, ensure_ascii=False) + "\n" for key, reason in bad)
    written = sum(shard.samples for shard in shards)
    print(f"{folder}: {total:,} utterances in = {written:,} written + {len(bad):,} quarantined; {sum(shard.seconds for shard in shards) / 3600:.2f} audio hours")
    if len(bad) > settings.max_bad_share * total:
        raise UserError(
            f"{settings.manifest}: {len(bad)} of {total} utterances are bad, more than max_bad_share {settings.max_bad_share:g} "
            f"(first: {bad[0][1]}); see {folder / 'quarantine.jsonl'}, mend them or raise max_bad_share"
        )
    write_index(folder, shards)


def _samples(settings: PrepareSettings, bad: list[tuple[str, str]], progress: Progress) -> Iterator[Sample]:
    for utterance in read_manifest(settings.manifest):
        try:
            sample = _sample(settings, utterance)
        except AudioError as error:
            bad.append((utterance.key, str(error)))
            progress.advance()
            continue
        progress.advance(1, sample.fields["seconds"])
        yield sample


def _sample(settings: PrepareSettings, utterance: Utterance) -> Sample:
    try:
        data = utterance.audio.read_bytes()
    except OSError as error:
        raise AudioError(f"{utterance.audio}: cannot be read ({error.strerror})") from None
    waveform, rate = decode(data, str(utterance.audio), settings.sample_rate, settings.max_seconds)
    fields = {name: value for name, value in utterance.fields.items() if not (settings.drop_text and name == "text")}
    return Sample(utterance.key, to_flac(waveform, rate), "flac", {**fields, "seconds": round(len(waveform) / rate, 4)})
