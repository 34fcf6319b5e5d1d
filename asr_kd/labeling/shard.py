"""One shard's work: audio → network input → the teacher's answers → a soft-target shard."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torchaudio.functional import forced_align

from asr_kd.audio.features import version_of
from asr_kd.errors import UserError
from asr_kd.files import place
from asr_kd.labeling.hidden import describe_hidden, kept_hidden
from asr_kd.labeling.load import Answer, Encoded, Loaded, deferred, encode, load, select
from asr_kd.labeling.settings import SELECTION, LabelSettings
from asr_kd.models.acoustic import Checkpoint, hidden_batches
from asr_kd.progress import Progress
from asr_kd.shards.index import ShardInfo
from asr_kd.targets import codec
from asr_kd.targets.posteriors import SparsePosteriors
from asr_kd.targets.prior import fit_prior, gain, prior_of, to_text
from asr_kd.targets.quantiser import Quantiser
from asr_kd.targets.reduced import reduced
from asr_kd.targets.store import CodecDescription, Selection, Statistics, TargetMetadata, write_target_shard

A = TypeVar("A")
B = TypeVar("B")
#: a batch: what is kept of each utterance, and its bytes
Work = tuple[list[Answer], Iterable[Encoded]]
#: what the network makes of an utterance: log-probabilities float32 [frames, units], and hidden states by tap, [frames, width]
Said = tuple[Tensor, dict[str, Tensor]]

#: most batches of the teacher's answers that wait to be encoded
QUEUED = 2


def ahead(function: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
    """Results in order, each computed in a background thread while the caller works on the one before."""
    with ThreadPoolExecutor(1) as pool:
        yield from one_behind(pool.submit(function, item) for item in items)


def one_behind(futures: Iterable[Future[B]]) -> Iterator[B]:
    """Results in order; each is waited for when the following one is under way."""
    last: Future[B] | None = None
    for future in futures:
        if last is not None:
            yield last.result()
        last = future
    if last is not None:
        yield last.result()


def load_shard(
    settings: LabelSettings, teacher: Checkpoint, transcripts: dict[str, str] | None, info: ShardInfo
) -> Loaded:
    """What can be labelled of a shard, as the teacher's input, made in this thread.

    Args:
        settings: of the job.
        teacher: whose front end and units count.
        transcripts: key → text in place of the text in the shard, for an alignment.
        info: which shard.
    """
    return select(settings, teacher, transcripts, *load(settings, teacher.features, deferred(settings, teacher), info))


def label_shard(
    settings: LabelSettings,
    teacher: Checkpoint,
    loaded: Loaded,
    progress: Progress,
    behind: Executor,
    encoders: Executor | None = None,
    quantiser: Quantiser | None = None,
) -> Future[tuple[ShardInfo, TargetMetadata]]:
    """Run the teacher over a shard; `behind` reduces its answers to what is kept, encodes them and publishes the shard.

    Args:
        behind: an executor with one worker, so that its tasks run in order.
        encoders: processes that encode in its place.
        quantiser: of the codes of hidden states.

    Returns:
        a future of the shard and its metadata, done when it is published.
    """
    waiting: list[tuple[list[int], Future[Work]]] = []
    for batch, said in hidden_batches(teacher, loaded.features, settings.batch_frames, settings.taps):
        waiting.append((batch, behind.submit(_answer, settings, loaded, batch, said, encoders, quantiser)))
        progress.advance(len(batch), sum(loaded.items[index].seconds for index in batch))
        if len(waiting) > QUEUED:  # dense outputs are large: they must not pile up before a slow encoder
            waiting[-1 - QUEUED][1].result()
    progress.advance(len(loaded.quarantined))
    return behind.submit(_publish, settings, teacher, loaded, waiting, quantiser)


def _answer(
    settings: LabelSettings,
    loaded: Loaded,
    batch: list[int],
    said: list[Said],
    encoders: Executor | None,
    quantiser: Quantiser | None,
) -> Work:
    answers = answer_batch(settings, loaded, batch, said, quantiser)
    encoding = functools.partial(encode, draws=selection_of(settings).draws)
    if encoders is None:
        return answers, list(map(encoding, answers))
    return answers, encoders.map(encoding, answers, chunksize=len(answers))


def _publish(
    settings: LabelSettings,
    teacher: Checkpoint,
    loaded: Loaded,
    batches: list[tuple[list[int], Future[Work]]],
    quantiser: Quantiser | None,
) -> tuple[ShardInfo, TargetMetadata]:
    found: dict[int, tuple[Answer, Encoded]] = {}
    for batch, work in batches:
        found.update(zip(batch, zip(*work.result(), strict=True), strict=True))
    utterances = [found[index] for index in range(len(loaded.items))]
    # summed in the shard's order, so that no bit depends on the batches
    lefts = [answer.full.leftover for answer, _ in utterances if answer.full is not None]
    total = functools.reduce(np.add, lefts) if lefts else None
    codes = None if total is None else fit_prior(total)
    statistics = statistics_of(utterances, sum(item.seconds for item in loaded.items), total, codes)
    keys = [item.key for item in loaded.items]
    hidden = {key: item.hidden for key, (_, item) in zip(keys, utterances, strict=True) if item.hidden is not None}
    kept = [answer.hidden for answer, _ in utterances if answer.hidden is not None]
    size = sum(map(len, hidden.values()))
    described = describe_hidden(settings, teacher, kept, size, quantiser) if settings.taps else None
    metadata = TargetMetadata(
        codec=CodecDescription(version=codec.VERSION, levels=codec.LEVELS), selection=selection_of(settings),
        teacher=teacher.fingerprint, units_hash=teacher.units.hash, num_units=teacher.units.size,
        frame_ms=teacher.frame_ms, features=teacher.features, frontend=version_of(teacher.features), heard=teacher.features.heard, offset_ms=teacher.offset_ms,
        audio_sha256=loaded.info.sha256, quarantined=loaded.quarantined,
        tail_prior=None if codes is None else to_text(codes), statistics=statistics, hidden=described,
    )  # fmt: skip
    path = place(settings.output) / loaded.info.name
    targets = zip(keys, (item.data for _, item in utterances), strict=True)
    write_target_shard(path, metadata, targets, hidden if settings.taps else None)
    return loaded.info, metadata


def selection_of(settings: LabelSettings) -> Selection:
    """What is kept of the distribution; in mode hidden what mode mass keeps."""
    decisive = {name: getattr(settings, name) for name, modes in SELECTION.items() if settings.mode in modes}
    return Selection(mode="mass" if settings.mode == "hidden" else settings.mode, **decisive)


def answer_batch(
    settings: LabelSettings, loaded: Loaded, batch: list[int], said: list[Said], quantiser: Quantiser | None = None
) -> list[Answer]:
    """What is kept of the teacher's answers, found on their device; a UserError when they make no distribution, or no numbers.

    Args:
        settings: of the job.
        loaded: the utterances.
        batch: indices of the utterances in `loaded`.
        said: of each.
        quantiser: of the codes of hidden states.
    """
    answers = []
    for index, (log_probs, states) in zip(batch, said, strict=True):
        key = loaded.items[index].key
        try:
            if settings.mode == "alignment":
                answers.append(Answer(_align(log_probs.cpu(), loaded.ids[index], settings.hold_frames), np.empty(0)))
                continue
            if settings.mode == "occupancy":
                log_probs = occupancy(log_probs.cpu(), loaded.ids[index])
            answers.append(_keep(log_probs, settings, key))
            if settings.mode == "hidden":
                answers[-1].hidden = kept_hidden(settings, states, answers[-1].kept, quantiser)
        except UserError as error:
            raise UserError(f"{loaded.info.name}: {key}: {error}") from None
    return answers


def _keep(log_probs: Tensor, settings: LabelSettings, key: str) -> Answer:
    if settings.temperature != 1:
        log_probs = (log_probs / settings.temperature).log_softmax(-1)
    if settings.mode == "sampled":
        # seeded by the key: the same draws in any batch and any shard
        generator = np.random.Generator(np.random.Philox(key=[settings.seed, zlib.crc32(key.encode())]))
        kept = SparsePosteriors.sampled(log_probs, settings.draws, generator)
        return Answer(kept, log_probs.argmax(1).cpu().numpy())
    mass, floor = (1.0, 0.0) if settings.mode == "top_k" else (settings.mass, settings.floor)
    kept = SparsePosteriors.from_dense(log_probs, settings.k, mass, floor)
    return Answer(kept, kept.units[kept.starts], reduced(kept, log_probs))


def occupancy(log_probs: Tensor, ids: list[int]) -> Tensor:
    """Log-probability of each unit in each frame given the text: of all CTC paths of the text, the share that is there.

    With s the logits, p the distribution and P the probability of the text, it is p + ∂ log P / ∂s: a soft alignment, zero for all units
    that the text does not hold. A teacher that knows the text answers so, as the oracle teacher of Yoon et al. 2021 (arXiv 2111.03664).

    Args:
        log_probs: float32 [frames, units], normalised natural log-probabilities, in host memory.
        ids: unit ids of the text, short enough for the frames.

    Returns:
        float32 [frames, units], finite.
    """
    frames, units = log_probs.shape
    if ids:
        logits = log_probs.double().clone().requires_grad_()  # a copy: what was made in inference mode has no gradient
        with torch.enable_grad():
            loss = torch.nn.functional.ctc_loss(
                logits.log_softmax(-1)[:, None], torch.tensor([ids]), torch.tensor([frames]), torch.tensor([len(ids)]), 0, "sum"
            )  # fmt: skip
        shares = log_probs.double().softmax(-1) - torch.autograd.grad(loss, logits)[0]
    else:
        shares = torch.nn.functional.one_hot(
            torch.zeros(frames, dtype=torch.int64, device=log_probs.device), units
        ).double()
    shares = shares.clamp_min(1e-12)  # rounding; and a logarithm that is finite
    return (shares / shares.sum(-1, keepdim=True)).log().float()


def _align(log_probs: Tensor, ids: list[int], hold_frames: int) -> SparsePosteriors:
    path = np.zeros(len(log_probs), np.int64)
    if ids:
        aligned, _ = forced_align(log_probs[None], torch.tensor([ids], dtype=torch.int32), blank=0)
        path = hold(aligned[0].numpy(), hold_frames)
    return SparsePosteriors.from_alignment(path, log_probs.shape[1])


def hold(path: np.ndarray, frames: int) -> np.ndarray:
    """Extend every unit of a CTC path, int [frames] (0 the blank), to at least `frames` frames, as far as blanks follow it.

    CTC emits a unit for a frame or two; a network that learns such spikes frame by frame blurs them below the blank. One
    blank stays between equal units, so that the path still collapses to the same text.
    """
    held = path.copy()
    starts = np.flatnonzero((path != 0) & (path != np.concatenate([[0], path[:-1]])))
    for start, following in zip(starts, [*starts, None][1:], strict=True):
        end = start + frames if following is None else min(start + frames, following - (path[following] == path[start]))
        stretch = held[start:end]
        stretch[stretch == 0] = path[start]
    return held


def statistics_of(
    utterances: list[tuple[Answer, Encoded]], seconds: float, total: np.ndarray | None, codes: np.ndarray | None
) -> Statistics:
    """What a shard of these utterances holds and what it lost.

    Args:
        utterances: each as it was answered, and as it is stored.
        seconds: of their audio.
        total: sum of `Reduced.leftover` of all; None without full distributions.
        codes: of the tail prior that was fitted to it.
    """
    kept = [answer.kept for answer, _ in utterances]
    count = sum(one.frames for one in kept)
    frames = max(count, 1)
    top1 = np.concatenate([np.empty(0), *(item.top1 for _, item in utterances)])
    divergence = np.concatenate([np.empty(0), *(item.divergence for _, item in utterances)])
    even = with_prior = None
    if total is not None and codes is not None:
        even = float(divergence.sum()) / frames
        with_prior = even - gain(total, prior_of(codes), kept) / frames
    return Statistics(
        utterances=len(utterances), frames=count, audio_seconds=round(seconds, 6),
        entries_per_frame=sum(len(one.units) for one in kept) / frames,
        bytes_per_frame=sum(len(item.data) for _, item in utterances) / frames,
        mean_kept_mass=1.0 - sum(float(one.tail.sum(dtype=np.float64)) for one in kept) / frames,
        mean_kl=even, mean_kl_prior=with_prior, worst_kl=float(divergence.max()) if len(divergence) else None,
        top1_kept=float(top1.sum()) / frames if len(top1) else None,
    )  # fmt: skip
