"""One shard's work: audio → network input → the teacher's answers → a soft-target shard."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torchaudio.functional import forced_align

from asr_kd.config import SELECTION, LabelSettings
from asr_kd.errors import UserError
from asr_kd.files import Place
from asr_kd.labeling.load import Loaded, hear_shard, select
from asr_kd.models.acoustic import Checkpoint, infer
from asr_kd.progress import Progress
from asr_kd.shards.index import ShardInfo
from asr_kd.shards.stream import batches_by_length
from asr_kd.targets import codec
from asr_kd.targets.posteriors import SparsePosteriors
from asr_kd.targets.prior import fit_prior, gain, leftover, prior_of, to_text
from asr_kd.targets.store import CodecDescription, Selection, Statistics, TargetMetadata, write_target_shard

A = TypeVar("A")
B = TypeVar("B")

#: batches of the teacher's answers that wait to be encoded, at most
QUEUED = 2


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


def ahead(function: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
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


def load_shard(
    settings: LabelSettings, teacher: Checkpoint, transcripts: dict[str, str] | None, info: ShardInfo
) -> Loaded:
    """Decode a shard's audio and compute its features, in this thread."""
    return select(settings, teacher.units, transcripts, hear_shard(settings, teacher.features, info))


def label_shard(
    settings: LabelSettings, teacher: Checkpoint, loaded: Loaded, path: Place, progress: Progress, behind: Executor
) -> Future[TargetMetadata]:
    """Run the teacher over a shard; what it says is encoded, and the shard published, by `behind`, in this order.

    Args:
        behind: of one worker.

    Returns:
        the metadata, as soon as the shard is published.
    """
    waiting: list[tuple[list[int], Future[list[Encoded]]]] = []
    for batch in batches_by_length([len(item) for item in loaded.features], settings.batch_frames):
        outputs = infer(teacher, [loaded.features[index] for index in batch])
        waiting.append((batch, behind.submit(encode_batch, settings, loaded, batch, outputs)))
        progress.advance(len(batch), sum(loaded.seconds[index] for index in batch))
        if len(waiting) > QUEUED:  # dense outputs are large: a slow encoder must not pile them up
            waiting[-1 - QUEUED][1].result()
    progress.advance(len(loaded.quarantined))
    return behind.submit(_publish, settings, teacher, loaded, waiting, path)


def _publish(
    settings: LabelSettings,
    teacher: Checkpoint,
    loaded: Loaded,
    batches: list[tuple[list[int], Future[list[Encoded]]]],
    path: Place,
) -> TargetMetadata:
    encoded: dict[int, Encoded] = {}
    for batch, results in batches:
        encoded.update(zip(batch, results.result(), strict=True))
    utterances = [encoded[index] for index in range(len(loaded.keys))]
    # in the shard's order, so that no bit depends on how the work was cut into batches
    lefts = [item.leftover for item in utterances if item.leftover is not None]
    total = functools.reduce(np.add, lefts) if lefts else None
    codes = None if total is None else fit_prior(total)
    metadata = TargetMetadata(
        codec=CodecDescription(version=codec.VERSION, levels=codec.LEVELS),
        selection=selection_of(settings),
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


def selection_of(settings: LabelSettings) -> Selection:
    decisive = {name: getattr(settings, name) for name, modes in SELECTION.items() if settings.mode in modes}
    return Selection(mode=settings.mode, **decisive)


def encode_batch(settings: LabelSettings, loaded: Loaded, batch: list[int], outputs: list[np.ndarray]) -> list[Encoded]:
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
