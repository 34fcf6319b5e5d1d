"""An audio shard and its soft targets, read side by side and compared: what tests of damage ask."""

from __future__ import annotations

from collections.abc import Iterator

from asr_kd.errors import UserError
from asr_kd.files import Place, sha256_file
from asr_kd.shards.tarset import Sample, read_shard
from asr_kd.targets.posteriors import SparsePosteriors
from asr_kd.targets.store import check_answers, read_target_shard


def join(
    audio: Place | str,
    targets: Place | str,
    *,
    audio_sha256: str | None = None,
    units_hash: str | None = None,
    num_units: int | None = None,
    frame_ms: int | None = None,
) -> Iterator[tuple[Sample, SparsePosteriors]]:
    """Read an audio shard and its soft targets in parallel; utterances that the teacher quarantined are skipped.

    Args:
        audio: the audio shard.
        targets: its soft-target shard.
        audio_sha256: hash of the audio shard, if known (from the index); else it is computed.
        units_hash: as of `read_target_shard`, like `num_units` and `frame_ms`.

    Raises:
        UserError: when the targets belong to another audio shard, do not fit the reader, or do not have its keys in order.
    """
    metadata, pairs = read_target_shard(targets, units_hash, num_units, frame_ms)
    check_answers(targets, metadata, audio, audio_sha256 or sha256_file(audio))
    for sample in read_shard(audio):
        if sample.key in metadata.quarantined:
            continue
        key, target = next(pairs, (None, None))
        if key is None or target is None:
            raise UserError(f"{targets}: ends before {sample.key} of {audio}; label this audio again")
        if key != sample.key:
            raise UserError(f"{targets}: {key} stands where {audio} has {sample.key}; label this audio again")
        yield sample, target
    extra = next(pairs, None)
    if extra is not None:
        raise UserError(f"{targets}: {extra[0]} is not in {audio}; label this audio again")
