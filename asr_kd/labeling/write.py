"""Soft-target shards from a teacher of one's own: whatever gives log-probabilities, in Python."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from asr_kd.audio.features import version_of
from asr_kd.audio.settings import FeatureSettings
from asr_kd.config.load import build
from asr_kd.errors import UserError
from asr_kd.files import Place, claim_folder, clear_torn, place, write_whole
from asr_kd.labeling.job import QUARANTINE, missing
from asr_kd.labeling.load import Answer, Encoded, encode
from asr_kd.labeling.settings import LabelSettings
from asr_kd.labeling.shard import statistics_of
from asr_kd.progress import Progress
from asr_kd.shards.index import ShardInfo, ShardList
from asr_kd.shards.leases import Leases
from asr_kd.shards.quarantine import Quarantine
from asr_kd.shards.tarset import Sample, read_checked, read_index
from asr_kd.targets import codec
from asr_kd.targets.posteriors import MAX_KEPT, SparsePosteriors
from asr_kd.targets.prior import fit_prior, to_text
from asr_kd.targets.reduced import reduced
from asr_kd.targets.store import TargetMetadata, check_answers, read_metadata, write_target_shard
from asr_kd.units import Units

#: what a teacher answers of an utterance: log-probabilities float [frames, units] (numpy, or torch on any device), or why there are none
Said = Any
#: the utterances of a shard → key and answer of each, in any order
Teacher = Callable[[list[Sample]], Iterable[tuple[str, Said]]]


def write_targets(
    audio: Place | str | Sequence[str],
    output: Place | str,
    answers: Teacher,
    *,
    teacher: str,
    units: Units,
    frame_ms: int,
    offset_ms: int = 0,
    k: int | None = None,
    mass: float | None = None,
    floor: float | None = None,
    features: FeatureSettings | None = None,
    max_bad_share: float = 0.01,
) -> None:
    """Write a soft-target shard for every shard of a set of audio, as `asr-kd label` does, with the answers of any teacher.

    Killed at any moment and called again, it goes on with the shards that are not there; several processes that call it share them.
    Every utterance must be answered: what `answers` gives as text instead of an array is its reason, and the utterance is quarantined.

    Args:
        audio: a folder or URL of audio shards, or several.
        output: folder or URL of the soft targets.
        answers: called with the utterances of a shard (`asr_kd.audio.decode.decode` gives their sound); gives key and answer of each.
        teacher: a mark of whatever decides the answers, such as a hash of the weights; learners refuse to mix marks.
        units: the vocabulary: column 0 is the blank, column p + 1 the sentencepiece piece p.
        frame_ms: period of the frames in milliseconds.
        offset_ms: start of the first frame in the audio.
        k: units kept a frame at most; None: as `label`, like `mass` and `floor`.
        mass: enough units are kept for this mass.
        floor: units less probable than this are not kept, the best one excepted.
        features: what the teacher's input is like, for the picture of `inspect` alone.
        max_bad_share: share of the utterances that may be quarantined.

    Raises:
        UserError: naming shard and key, when an answer is missing, there twice, of no utterance or no distribution over the units, or
            too many are quarantined; or when the output belongs to other answers.
    """
    began, infos, features = time.time(), read_index(audio), features or FeatureSettings()
    total, output, default = infos.samples, place(output), LabelSettings.model_fields
    if not total:
        raise UserError(f"{audio}: holds no utterances; prepare the audio shards again")
    if not teacher.strip() or not teacher.isprintable():
        raise UserError(f"teacher: {teacher!r} marks no teacher; give a text such as a hash of its weights")
    k = default["k"].default if k is None else k
    mass = default["mass"].default if mass is None else mass
    floor = default["floor"].default if floor is None else floor
    if not (1 <= k <= MAX_KEPT and 0 < mass <= 1 and 0 <= floor < 1):
        raise UserError(
            f"k {k}, mass {mass}, floor {floor}: k is 1 to {MAX_KEPT}, mass above 0 to 1, floor from 0 to below 1"
        )
    about = build(TargetMetadata, {
        "codec": {"version": codec.VERSION, "levels": codec.LEVELS},
        "selection": {"mode": "mass", "k": k, "mass": float(mass), "floor": float(floor), "temperature": 1.0}, "teacher": teacher,
        "units_hash": units.hash, "num_units": units.size, "frame_ms": frame_ms, "offset_ms": offset_ms,
        "features": features.model_dump(), "frontend": version_of(features),
        "audio_sha256": "", "quarantined": {}, "statistics": statistics_of([], 0.0, None, None).model_dump(),  # of each shard
    }, "write_targets")  # fmt: skip
    claim = {
        **about.model_dump(
            mode="json", include={"codec", "selection", "teacher", "units_hash", "frame_ms", "offset_ms"}
        ),
        "audio": infos.hash,
    }
    claim_folder(output, "label", claim, ".tar", {infos.hash: str(audio)})
    left = missing(infos, output)

    def published(info: ShardInfo) -> bool:
        there = (output / info.name).exists()
        if there:  # another process made it meanwhile
            progress.advance(info.samples)
        return there

    def work(free: Iterator[ShardInfo]) -> Iterator[ShardInfo]:
        for info in free:
            samples = list(read_checked(audio, info))
            write_target_shard(output / info.name, *_answered(info, samples, answers, about))
            progress.advance(info.samples, info.seconds)
            yield info

    def not_done(some: ShardList) -> ShardList:
        left = missing(some, output)
        progress.advance(total - left.samples - progress.done)  # done by others in the meantime
        return left

    with Progress("label", total, "utterances") as progress, Leases(output / ".leases") as leases:
        progress.resume(total - left.samples)
        leases.share(left, lambda info: info.name, published, not_done, work)
    clear_torn(output, began)
    bad, hours = Quarantine(total, max_bad_share, "labelled"), 0.0
    with write_whole(output / QUARANTINE, "w", make_folder=False) as file:
        for info in infos:
            metadata = read_metadata(output / info.name)
            check_answers(output / info.name, metadata, info.at(audio), info.sha256)
            hours += metadata.statistics.audio_seconds / 3600
            for key, reason in metadata.quarantined.items():
                file.write(json.dumps({"key": key, "shard": info.name, "reason": reason}, ensure_ascii=False) + "\n")
                bad.add(key, reason)
    print(
        f"{output}: {total:,} utterances in = {total - bad.count:,} labelled + {bad.count:,} quarantined, {hours:.3f} audio hours"
    )
    bad.refuse(str(audio), f"see {output / QUARANTINE}")


def _answered(
    info: ShardInfo, samples: list[Sample], answers: Teacher, about: TargetMetadata
) -> tuple[TargetMetadata, list[tuple[str, bytes]]]:
    """Metadata and soft targets of a shard."""
    found: dict[str, tuple[Answer, Encoded]] = {}
    quarantined: dict[str, str] = {}
    keys = {sample.key for sample in samples}
    for key, said in answers(samples) if samples else ():
        if key not in keys or key in found or key in quarantined:
            what = "answered twice" if key in keys else f"no utterance of {info.name}"
            raise UserError(f"{info.name}: {key!a} is {what}; answer each utterance of a shard once")
        if isinstance(said, str):
            quarantined[key] = said
            continue
        try:
            answer = _kept(said, about)
        except UserError as error:
            raise UserError(f"{info.name}: {key}: {error}") from None
        found[key] = answer, encode(answer, None)
    if lost := [sample.key for sample in samples if sample.key not in found and sample.key not in quarantined]:
        raise UserError(
            f"{info.name}: {len(lost)} utterances have no answer (first: {lost[0]}); give one, or as text why there is none"
        )
    # in the shard's order, so that the same answers give the same bytes
    order = [sample for sample in samples if sample.key in found]
    utterances = [found[sample.key] for sample in order]
    lefts = [answer.full.leftover for answer, _ in utterances if answer.full is not None]
    total = functools.reduce(np.add, lefts) if lefts else None
    codes = None if total is None else fit_prior(total)
    seconds = sum(float(sample.fields.get("seconds", 0.0)) for sample in order)
    metadata = about.model_copy(
        update={
            "audio_sha256": info.sha256,
            "quarantined": {sample.key: quarantined[sample.key] for sample in samples if sample.key in quarantined},
            "tail_prior": None if codes is None else to_text(codes),
            "statistics": statistics_of(utterances, seconds, total, codes),
        }
    )
    targets = [(sample.key, item.data) for sample, (_, item) in zip(order, utterances, strict=True)]
    return metadata, targets


def _kept(said: Said, about: TargetMetadata) -> Answer:
    import torch

    log_probs = torch.as_tensor(said).float()
    if log_probs.ndim != 2 or not len(log_probs) or log_probs.shape[1] != about.num_units:
        raise UserError(
            f"an answer of shape {tuple(log_probs.shape)}; give [frames, {about.num_units}], a column a unit"
        )
    selection = about.selection
    assert selection.k is not None and selection.mass is not None and selection.floor is not None
    kept = SparsePosteriors.from_dense(log_probs, selection.k, selection.mass, selection.floor)
    return Answer(kept, kept.units[kept.starts], reduced(kept, log_probs))
