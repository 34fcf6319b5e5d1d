"""What mode hidden keeps of a teacher's hidden states; and the quantiser of their codes, which is trained before the first shard."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from asr_kd.distillation.hidden import of_spikes
from asr_kd.distillation.spikes import find_spikes
from asr_kd.errors import UserError
from asr_kd.files import place, write_whole
from asr_kd.labeling.load import HiddenAnswer, deferred, load
from asr_kd.labeling.settings import LabelSettings
from asr_kd.models.acoustic import Checkpoint, hidden_batches
from asr_kd.shards.index import ShardList
from asr_kd.shards.leases import Leases
from asr_kd.targets import codec
from asr_kd.targets.hidden import HiddenDescription, HiddenStates
from asr_kd.targets.posteriors import SparsePosteriors
from asr_kd.targets.quantiser import FILE, Quantiser, fit, read_quantiser, write_bytes
from asr_kd.targets.settings import Keep
from asr_kd.units import Units

#: shards that the frames for the quantiser are taken from, at most
SHARDS = 8
#: folder of the lease of who trains the quantiser
TRAINING = ".quantiser"


def kept_hidden(
    settings: LabelSettings, states: dict[str, Tensor], kept: SparsePosteriors, quantiser: Quantiser | None
) -> HiddenAnswer:
    """What is kept of an utterance's hidden states.

    Args:
        settings: of the job.
        states: of each tap float32 [frames, width], on the network's device; only what is kept leaves it.
        kept: of the utterance's posteriors.
        quantiser: for codes.

    Raises:
        UserError: when they do not fit float16, or are not numbers.
    """
    taps, sums = {}, {}
    rows_of, edges = hidden_rows(settings.keep, states, kept)
    for tap, rows in rows_of.items():
        if quantiser is None:
            stored = rows.half()
            got = stored.float()
        else:
            stored = quantiser.encode(tap, rows)
            got = torch.from_numpy(quantiser.decode(tap, stored.cpu().numpy())).to(rows.device)
        if not got.isfinite().all() or not rows.isfinite().all():
            raise UserError(f"the hidden states of {tap} are too large for float16, or no numbers; take another layer")
        taps[tap], sums[tap] = stored.cpu().numpy(), lost_of(rows, got)
    return HiddenAnswer(HiddenStates(settings.keep, kept.frames, taps, edges), sums)


def hidden_rows(
    keep: Keep, states: dict[str, Tensor], kept: SparsePosteriors
) -> tuple[dict[str, Tensor], np.ndarray | None]:
    """The rows of each tap that are kept, before they are rounded: of all frames, or of events, with their edges as of `HiddenStates`.

    Spikes are found in what a student will read of the posteriors `kept`.
    """
    if keep != "events":
        return states, None
    edges, mass = _spikes(codec.decode(codec.encode(kept)))
    return {
        tap: of_spikes(rows, *(one.to(rows.device) for one in (mass, *edges))) for tap, rows in states.items()
    }, edges.numpy()


def _spikes(stored: SparsePosteriors) -> tuple[Tensor, Tensor]:
    """The edges of the spikes of an utterance, int64 [2, spikes], and of each frame the mass that is no blank's, float32."""
    units, probs = (torch.from_numpy(rows) for rows in stored.padded(int(stored.counts.max())))
    spikes = find_spikes(units, probs, torch.tensor([stored.frames]), 0, 0)
    return torch.stack([spikes.start, spikes.end]), torch.where(units != Units.blank, probs, 0.0).sum(-1)


def lost_of(rows: Tensor, got: Tensor) -> np.ndarray:
    """See `HiddenAnswer.sums`: what a tap's rows, float32 [rows, width], lose where they are read as `got`."""
    exact = rows.double()
    error = (exact - got.double()).square().sum()
    sums: np.ndarray = torch.cat([torch.stack([error, exact.square().sum()]), exact.sum(0)]).cpu().numpy()
    return sums


def lost_share(sums: np.ndarray, rows: int) -> float:
    """The squared error as a share of the variance of so many rows; 0 where there is none."""
    variance = sums[1] - float(sums[2:] @ sums[2:]) / max(rows, 1)
    return float(sums[0] / variance) if variance > 0 else 0.0


def describe_hidden(
    settings: LabelSettings,
    teacher: Checkpoint,
    answers: Sequence[HiddenAnswer],
    size: int,
    quantiser: Quantiser | None,
) -> HiddenDescription:
    """What the metadata of a shard say of its hidden states.

    Args:
        settings: of the job.
        teacher: whose they are.
        answers: of all utterances, in the order of the shard.
        size: bytes of all members.
        quantiser: of codes.
    """
    frames = sum(one.states.frames for one in answers)
    rows = sum(len(one.states.taps[settings.taps[0]]) for one in answers)
    widths = {tap: teacher.model.taps[tap] for tap in settings.taps}
    none = {tap: np.zeros(2 + width) for tap, width in widths.items()}
    sums = {tap: functools.reduce(np.add, (one.sums[tap] for one in answers), none[tap]) for tap in widths}
    return HiddenDescription(
        keep=settings.keep, taps=widths, codebooks=settings.codebooks if settings.keep == "codes" else None,
        quantiser=quantiser.fingerprint if quantiser else None, rows=rows, bytes_per_frame=size / max(frames, 1),
        lost={tap: lost_share(one, rows) for tap, one in sums.items()},
    )  # fmt: skip


def hidden_claim(settings: LabelSettings) -> dict[str, Any]:
    """What a label job claims its folder for, of hidden states; empty where it keeps none."""
    if settings.mode != "hidden":
        return {}
    codes = {"codebooks": settings.codebooks, "quantiser_frames": settings.quantiser_frames}
    return {"hidden": {"taps": settings.taps, "keep": settings.keep} | (codes if settings.keep == "codes" else {})}


def check_taps(settings: LabelSettings, teacher: Checkpoint) -> None:
    """Refuse layers that the teacher does not have."""
    if missing := next((tap for tap in settings.taps if tap not in teacher.model.taps), None):
        raise UserError(f"taps: {settings.teacher} has no {missing}; it has {', '.join(teacher.model.taps)}")


def quantiser_of(settings: LabelSettings) -> Quantiser | None:
    """The quantiser of a job, which `make_quantiser` has written; None where it keeps no codes."""
    return read_quantiser(settings.output) if settings.keep == "codes" else None


def make_quantiser(settings: LabelSettings, teacher: Checkpoint, infos: ShardList) -> None:
    """Train the quantiser and write it into the output, unless it is there; of several processes one does, and the others wait.

    Args:
        settings: of the job.
        teacher: whose hidden states it codes.
        infos: the audio, of which a sample is heard that depends on the settings and the audio alone.
    """
    path = place(settings.output) / FILE
    if settings.keep != "codes" or path.exists():
        return

    def work(free: Iterator[str]) -> Iterator[str]:
        for name in free:
            rows = _sample(settings, teacher, infos)
            tables = {tap: fit(rows[tap], settings.codebooks) for tap in settings.taps}
            with write_whole(path, make_folder=False) as file:
                file.write(write_bytes(Quantiser(tables)))
            yield name

    with Leases(place(settings.output) / TRAINING) as leases:
        left = lambda names: [] if path.exists() else names  # noqa: E731
        leases.share([FILE], str, lambda _: path.exists(), left, work)


def _sample(settings: LabelSettings, teacher: Checkpoint, infos: ShardList) -> dict[str, np.ndarray]:
    """Hidden states float32 [frames, width] of utterances drawn from a few shards."""
    rng = np.random.default_rng(0)
    on_device = deferred(settings, teacher)
    drawn = np.sort(rng.choice(len(infos), min(SHARDS, len(infos)), replace=False))
    found: dict[str, list[np.ndarray]] = {tap: [] for tap in settings.taps}
    for number in drawn:
        items = load(settings, teacher.features, on_device, infos[int(number)])[1].items
        wanted, chosen = -(-settings.quantiser_frames // len(drawn)), []
        for index in rng.permutation(len(items)):
            if wanted <= 0:
                break
            chosen.append(items[index].features)
            wanted -= len(items[index].features)
        for _, batch in hidden_batches(teacher, chosen, settings.batch_frames, settings.taps):
            for _, states in batch:
                for tap in settings.taps:
                    found[tap].append(states[tap].cpu().numpy())
    if not any(map(len, found.values())):
        raise UserError(f"{settings.audio}: no utterance could be heard to train the quantiser on; see its audio")
    return {tap: np.concatenate(rows)[: settings.quantiser_frames] for tap, rows in found.items()}
