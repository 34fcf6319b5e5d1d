"""Run a teacher over audio shards and write soft-target shards: restartable, with every utterance accounted for."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torchaudio.functional import forced_align

from asr_kd.audio.decode import decode as decode_audio
from asr_kd.audio.features import Frontend
from asr_kd.config import SELECTION, LabelSettings
from asr_kd.errors import AudioError, UserError
from asr_kd.files import claim_folder, sha256_file, write_json, write_whole
from asr_kd.labeling.leases import Leases
from asr_kd.models.acoustic import Checkpoint, infer, load_checkpoint, pick_device
from asr_kd.progress import Progress
from asr_kd.shards.manifest import read_transcripts
from asr_kd.shards.stream import batches_by_length
from asr_kd.shards.tarset import ShardInfo, check_shard, read_index, read_shard
from asr_kd.targets import codec
from asr_kd.targets.posteriors import SparsePosteriors
from asr_kd.targets.prior import fit_prior, gain, leftover, prior_of, to_text
from asr_kd.targets.store import (
    CodecDescription,
    Selection,
    Statistics,
    TargetMetadata,
    check_answers,
    read_metadata,
    write_target_shard,
)

A = TypeVar("A")
B = TypeVar("B")

#: seconds between looks at shards that other processes are working on
WAIT = 0.5


@dataclass
class Loaded:
    """A shard's utterances as network input, in its order, and those that cannot be labelled: key → reason."""

    info: ShardInfo
    keys: list[str] = field(default_factory=list)
    features: list[np.ndarray] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    ids: list[list[int]] = field(default_factory=list)
    quarantined: dict[str, str] = field(default_factory=dict)


@dataclass
class Encoded:
    """One utterance's soft target, and what it lost.

    Attributes:
        data: its bytes; kept: what they were made from.
        top1: bool [frames], whether the best unit is the teacher's; empty for an alignment.
        divergence: float64 [frames], in nat; leftover: float64 [2, units], as of `prior.leftover`. Only of mass and top_k.
    """

    data: bytes
    kept: SparsePosteriors
    top1: np.ndarray
    divergence: np.ndarray | None = None
    leftover: np.ndarray | None = None


def label(settings: LabelSettings) -> None:
    """Label every shard of `settings.audio` with the teacher's posteriors, or its alignment to the text.

    Writes into `settings.output` one soft-target shard for each audio shard, under the same name, and in the end
    `quarantine.jsonl`, `report.json` (what was labelled) and `timing.json` (how fast). Killed at any moment and started
    again, it goes on with the first shard that is not there, and ends in the same bytes (`timing.json` apart).
    Any number of processes with these settings share the work, from any machines that see the folder; each ends when
    everything is done.

    Raises:
        UserError: when the output belongs to other settings, or more than `max_bad_share` was quarantined.
    """
    began = time.time()
    device = pick_device(settings.device)
    torch.set_num_threads(settings.threads)
    infos = read_index(Path(settings.audio))
    total = sum(info.samples for info in infos)
    if not total:
        raise UserError(f"{settings.audio}: holds no utterances; prepare the audio shards again")
    teacher = load_checkpoint(settings.teacher, device)
    transcripts = read_transcripts(settings.transcripts) if settings.transcripts else None
    claim_folder(settings.output, "label", _claim(settings, teacher, infos))
    output = Path(settings.output)

    start = time.perf_counter()
    there = {entry.name for entry in os.scandir(output)}
    left = [info for info in infos if info.name not in there]
    finished = len(infos) - len(left)
    shards, frames, audio_seconds, bad = 0, 0, 0.0, 0
    example: tuple[str, str] | None = None
    with Progress("label", total, "utterances") as progress, Leases(output / ".leases") as leases:
        progress.advance(total - sum(info.samples for info in left))
        while left:
            before = shards
            free = (info for info in left if _take(leases, output, info))
            for loaded in _ahead(lambda info: _load(settings, teacher, transcripts, info), free):
                metadata = _label_shard(settings, teacher, loaded, output / loaded.info.name, progress)
                leases.give_back(loaded.info.name)
                shards += 1
                frames += metadata.statistics.frames
                audio_seconds += metadata.statistics.audio_seconds
                bad += len(metadata.quarantined)
                # no need to wait weeks for the end when it is lost already
                example = example or next(iter(metadata.quarantined.items()), None)
                _refuse_bad(settings, bad, total, example)
            left = [info for info in left if not (output / info.name).exists()]
            if left and shards == before:  # all that is left is in the hands of others
                time.sleep(WAIT)
        progress.advance(total - progress.done)  # what others did
    seconds = time.perf_counter() - start
    report = _account(settings, teacher, infos, total)
    if shards:
        timing = {
            "device": str(device),
            "threads": settings.threads,
            "shards": shards,
            "shards_done_before": finished,
            "seconds": seconds,
            "frames_per_second": frames / seconds,
            "audio_hours_per_hour": audio_seconds / seconds,
        }
        write_json(output / "timing.json", timing)
    for torn in output.glob(".*.tmp"):  # of runs that were killed
        if torn.stat().st_mtime < began:
            torn.unlink(missing_ok=True)
    kl = "" if report["mean_kl"] is None else f", mean KL {report['mean_kl']:.5f} nat"
    print(
        f"{output}: {total:,} utterances in = {report['labelled']:,} labelled + {report['quarantined']:,} quarantined\n"
        f"{report['audio_hours']:.3f} audio hours, {report['frames']:,} frames ({frames / seconds:,.0f} a second), "
        f"{report['bytes_per_frame']:.2f} bytes a frame, mass kept {report['mean_kept_mass']:.5f}{kl}"
    )


def _claim(settings: LabelSettings, teacher: Checkpoint, infos: list[ShardInfo]) -> dict[str, Any]:
    # what decides the output; where the inputs lie, and how the work is cut up for the machine, does not
    claim = {"max_seconds": settings.max_seconds, **_selection(settings).model_dump()}
    claim["teacher"] = teacher.fingerprint
    audio = hashlib.sha256()
    for info in infos:
        audio.update(f"{info.name} {info.sha256}\n".encode())
    claim["audio"] = audio.hexdigest()[:16]
    claim["transcripts"] = sha256_file(settings.transcripts) if settings.transcripts else None
    claim["codec"] = {"version": codec.VERSION, "levels": codec.LEVELS}
    return claim


def _finished(path: Path, settings: LabelSettings, teacher: Checkpoint, info: ShardInfo) -> TargetMetadata:
    metadata = read_metadata(path)
    check_answers(path, metadata, f"{settings.audio}/{info.name}", info.sha256)
    if metadata.teacher != teacher.fingerprint or metadata.selection != _selection(settings):
        raise UserError(f"{path}: was made by teacher {metadata.teacher} or with other settings; remove this file")
    return metadata


def _take(leases: Leases, output: Path, info: ShardInfo) -> bool:
    """Take a shard's lease, unless the shard is done or another process holds it."""
    if (output / info.name).exists() or not leases.take(info.name):
        return False
    if (output / info.name).exists():  # finished, and its lease given back, between the two looks
        leases.give_back(info.name)
        return False
    return True


def _refuse_bad(settings: LabelSettings, bad: int, total: int, example: tuple[str, str] | None) -> None:
    """Raise UserError when more than `max_bad_share` of all utterances is quarantined; `example` is a key and its reason."""
    if example and bad > settings.max_bad_share * total:
        raise UserError(
            f"{settings.audio}: {bad} of {total} utterances cannot be labelled, more than max_bad_share "
            f"{settings.max_bad_share} (first: {example[0]}: {example[1]}); mend the audio or raise max_bad_share"
        )


def _ahead(function: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
    """Results in order, each computed by a background thread while the caller is busy with the one before it."""
    with ThreadPoolExecutor(1) as pool:
        waiting: Future[B] | None = None
        for item in items:
            following = pool.submit(function, item)
            if waiting is not None:
                yield waiting.result()
            waiting = following
        if waiting is not None:
            yield waiting.result()


def _load(settings: LabelSettings, teacher: Checkpoint, transcripts: dict[str, str] | None, info: ShardInfo) -> Loaded:
    """Decode a shard's audio and compute its features."""
    check_shard(Path(settings.audio), info)
    frontend = Frontend(teacher.features)
    loaded = Loaded(info)
    for sample in read_shard(Path(settings.audio) / info.name):
        try:
            waveform, rate = decode_audio(sample.audio, sample.key, teacher.features.sample_rate, settings.max_seconds)
            features = frontend.compute(waveform)
        except AudioError as error:
            loaded.quarantined[sample.key] = str(error)
            continue
        ids: list[int] = []
        if settings.mode == "alignment":
            text = sample.fields.get("text") if transcripts is None else transcripts.get(sample.key)
            if not isinstance(text, str):
                loaded.quarantined[sample.key] = "no text to align to"
                continue
            ids = teacher.units.encode(text)
            needed = len(ids) + sum(a == b for a, b in itertools.pairwise(ids))
            if needed > len(features):
                reason = f"text too long: its {len(ids)} units do not fit into {len(features)} frames"
                loaded.quarantined[sample.key] = reason
                continue
        loaded.keys.append(sample.key)
        loaded.features.append(features)
        loaded.seconds.append(len(waveform) / rate)
        loaded.ids.append(ids)
    return loaded


def _label_shard(
    settings: LabelSettings, teacher: Checkpoint, loaded: Loaded, path: Path, progress: Progress
) -> TargetMetadata:
    """Label and publish one shard."""
    batches = batches_by_length([len(item) for item in loaded.features], settings.batch_frames)
    outputs = ((batch, infer(teacher, [loaded.features[index] for index in batch])) for batch in batches)
    encoded: dict[int, Encoded] = {}
    for batch, results in _ahead(lambda pair: (pair[0], _encode_batch(settings, loaded, *pair)), outputs):
        encoded.update(zip(batch, results, strict=True))
        progress.advance(len(batch), sum(loaded.seconds[index] for index in batch))
    progress.advance(len(loaded.quarantined))
    utterances = [encoded[index] for index in range(len(loaded.keys))]
    # in the shard's order, so that no bit depends on how the work was cut into batches
    lefts = [item.leftover for item in utterances if item.leftover is not None]
    total = functools.reduce(np.add, lefts) if lefts else None
    codes = None if total is None else fit_prior(total)
    metadata = TargetMetadata(
        codec=CodecDescription(version=codec.VERSION, levels=codec.LEVELS),
        selection=_selection(settings),
        teacher=teacher.fingerprint,
        units_hash=teacher.units.hash,
        num_units=teacher.units.size,
        frame_ms=teacher.frame_ms,
        features=teacher.features,
        audio_sha256=loaded.info.sha256,
        quarantined=loaded.quarantined,
        tail_prior=None if codes is None else to_text(codes),
        statistics=_statistics(utterances, sum(loaded.seconds), total, codes),
    )
    write_target_shard(path, metadata, zip(loaded.keys, (item.data for item in utterances), strict=True))
    return metadata


def _selection(settings: LabelSettings) -> Selection:
    decisive = {name: getattr(settings, name) for name, modes in SELECTION.items() if settings.mode in modes}
    return Selection(mode=settings.mode, **decisive)


def _encode_batch(
    settings: LabelSettings, loaded: Loaded, batch: list[int], outputs: list[np.ndarray]
) -> list[Encoded]:
    results = []
    for index, log_probs in zip(batch, outputs, strict=True):
        try:
            if settings.mode == "alignment":
                results.append(_encode_alignment(log_probs, loaded.ids[index], settings.hold_frames))
            else:
                results.append(_encode_posteriors(log_probs, settings, loaded.keys[index]))
        except UserError as error:
            raise UserError(f"{loaded.info.name}: {loaded.keys[index]}: {error}") from None
    return results


def _encode_posteriors(log_probs: np.ndarray, settings: LabelSettings, key: str) -> Encoded:
    if settings.temperature != 1:
        log_probs = torch.from_numpy(log_probs / np.float32(settings.temperature)).log_softmax(-1).numpy()
    best = log_probs.argmax(1)
    if settings.mode == "sampled":
        # of the key, not of the place: the same draws in any batch and any shard
        generator = np.random.Generator(np.random.Philox(key=[settings.seed, zlib.crc32(key.encode())]))
        kept = SparsePosteriors.sampled(log_probs, settings.draws, generator)
        return Encoded(codec.encode(kept, draws=settings.draws), kept, kept.units[kept.starts] == best)
    mass, floor = (settings.mass, settings.floor) if settings.mode == "mass" else (1.0, 0.0)
    kept = SparsePosteriors.from_dense(log_probs, settings.k, mass, floor)
    data = codec.encode(kept)
    # what is reported is what a reader will get
    decoded = codec.decode(data)
    top1 = decoded.units[decoded.starts] == best
    return Encoded(data, kept, top1, decoded.divergence(log_probs), leftover(kept, log_probs))


def _encode_alignment(log_probs: np.ndarray, ids: list[int], hold_frames: int) -> Encoded:
    path = np.zeros(len(log_probs), np.int64)
    if ids:
        aligned, _ = forced_align(torch.from_numpy(log_probs)[None], torch.tensor([ids], dtype=torch.int32), blank=0)
        path = aligned[0].numpy()
        path = hold(path, hold_frames)
    kept = SparsePosteriors.from_alignment(path, log_probs.shape[1])
    return Encoded(codec.encode(kept), kept, np.empty(0))


def hold(path: np.ndarray, frames: int) -> np.ndarray:
    """Let every unit of a CTC path last at least so many frames, where blanks follow it.

    CTC marks a unit for a frame or two; a network that learns such spikes frame by frame blurs them below the blank. One
    blank stays between equal units, so that the path still collapses to the same text.

    Args:
        path: int [frames], the unit of each frame, 0 for the blank.

    Returns:
        the longer path, same shape.
    """
    held = path.copy()
    starts = np.flatnonzero((path != 0) & (path != np.concatenate([[0], path[:-1]])))
    for start, following in zip(starts, [*starts, None][1:], strict=True):
        end = start + frames if following is None else min(start + frames, following - (path[following] == path[start]))
        stretch = held[start:end]
        stretch[stretch == 0] = path[start]
    return held


def _statistics(
    utterances: list[Encoded], seconds: float, total: np.ndarray | None, codes: np.ndarray | None
) -> Statistics:
    count = sum(item.kept.frames for item in utterances)
    frames = max(count, 1)
    divergence = np.concatenate([np.empty(0), *(item.divergence for item in utterances if item.divergence is not None)])
    top1 = np.concatenate([np.empty(0), *(item.top1 for item in utterances)])
    even = with_prior = None
    if total is not None and codes is not None:
        even = float(divergence.sum()) / frames
        with_prior = even - gain(total, prior_of(codes), (item.kept for item in utterances)) / frames
    return Statistics(
        utterances=len(utterances),
        frames=count,
        audio_seconds=round(seconds, 6),
        entries_per_frame=sum(len(item.kept.units) for item in utterances) / frames,
        bytes_per_frame=sum(len(item.data) for item in utterances) / frames,
        mean_kept_mass=1.0 - sum(float(item.kept.tail.sum(dtype=np.float64)) for item in utterances) / frames,
        mean_kl=even,
        mean_kl_prior=with_prior,
        worst_kl=float(divergence.max()) if len(divergence) else None,
        top1_kept=float(top1.sum()) / frames if len(top1) else None,
    )


def _account(settings: LabelSettings, teacher: Checkpoint, infos: list[ShardInfo], total: int) -> dict[str, Any]:
    """Reconcile what came out with what went in; write quarantine.jsonl and report.json."""
    output = Path(settings.output)
    sums: dict[str, float] = dict.fromkeys(("utterances", "frames", "audio_seconds"), 0)
    weighted: dict[str, float] = {}
    worst = 0.0
    quarantined = stored = 0
    first = None
    with write_whole(output / "quarantine.jsonl", "w") as file:
        for info in infos:
            metadata = _finished(output / info.name, settings, teacher, info)
            stored += (output / info.name).stat().st_size
            for key, reason in metadata.quarantined.items():
                file.write(json.dumps({"key": key, "shard": info.name, "reason": reason}, ensure_ascii=False) + "\n")
                first = first or (key, reason)
            quarantined += len(metadata.quarantined)
            if len(metadata.quarantined) + metadata.statistics.utterances != info.samples:
                raise UserError(
                    f"{output / info.name}: {metadata.statistics.utterances} labelled + {len(metadata.quarantined)} "
                    f"quarantined are not the {info.samples} utterances of its audio; prepare the audio shards again"
                )
            statistics = metadata.statistics.model_dump(exclude_none=True)
            worst = max(worst, statistics.pop("worst_kl", 0.0))
            for name in sums:
                sums[name] += statistics.pop(name)
            for name, value in statistics.items():
                weighted[name] = weighted.get(name, 0.0) + value * metadata.statistics.frames
        _refuse_bad(settings, quarantined, total, first)  # raised inside: the file is not published
    if foreign := {path.name for path in output.glob("*.tar")} - {info.name for info in infos}:
        raise UserError(f"{output}: {min(foreign)} belongs to no audio shard; remove it")
    frames = max(sums["frames"], 1)
    report = {
        "shards": len(infos),
        "utterances": total,
        "labelled": sums["utterances"],
        "quarantined": quarantined,
        "audio_hours": sums["audio_seconds"] / 3600,
        "frames": sums["frames"],
        "entries_per_frame": weighted["entries_per_frame"] / frames,
        "bytes_per_frame": weighted["bytes_per_frame"] / frames,
        "stored_bytes_per_frame": stored / frames,
        "mean_kept_mass": weighted["mean_kept_mass"] / frames,
        **{
            name: weighted[name] / frames if name in weighted else None
            for name in ("mean_kl", "mean_kl_prior", "top1_kept")
        },
        "worst_kl": worst if "mean_kl" in weighted else None,
    }
    write_json(output / "report.json", report)
    return report
