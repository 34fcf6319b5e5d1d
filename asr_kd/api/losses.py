"""`asr_kd.losses`: what a student can learn from soft targets, for networks and training loops of your own.

The first four take the student's logits, float [batch, frames, units], padded at the end, the number of frames of each utterance, int [batch],
and the `SoftTarget` of each, of `asr_kd.soft_targets`. They give a mean over the frames, in nat, with its gradient, wherever the logits are.

- `soft`: the teacher's distribution, frame by frame (cross-entropy);
- `divergence`: the same by another divergence;
- `spikes`: each spike of a CTC teacher as one event, whenever the student says it;
- `sequences`: transcripts that are drawn from what the teacher says (CTC).

The others compare hidden states, row by row, float [samples, width]; which layers, and where the samples come from, is up to you:

- `hint`, `cosine`: of the same width, [samples]; put a linear layer behind the student's;
- `similarity`: how samples lie to each other, of any widths, one number.

What else `asr_kd.distillation` has may change from version to version; these stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from asr_kd.api.soft_targets import SoftTarget
from asr_kd.config.load import build
from asr_kd.distillation import divergence as divergences
from asr_kd.distillation.batch import Part
from asr_kd.distillation.ctc import ctc_loss
from asr_kd.distillation.features import cosine, hint
from asr_kd.distillation.kind_settings import DivergenceSettings, SequenceSettings
from asr_kd.distillation.relation_losses import similarity
from asr_kd.distillation.response import soft_cross_entropy
from asr_kd.distillation.sequences import draw_sequences
from asr_kd.distillation.settings import MissingMass
from asr_kd.distillation.spikes import Spikes, find_spikes, reach, spike_cross_entropy
from asr_kd.errors import UserError

__all__ = ["cosine", "divergence", "hint", "sequences", "similarity", "soft", "spikes"]


class _Frames:
    """The frames of a batch, utterance after utterance, without padding: the student's logits and the soft targets.

    `padded` are the logits as they came, float32 at least; `units`, `probs` and `tail` are those of `soft_cross_entropy`, on the device of the logits; `on_cpu` the first two in host memory.
    """

    def __init__(self, logits: Tensor, lengths: Tensor, targets: Sequence[SoftTarget]) -> None:
        self.lengths = torch.as_tensor(lengths).long().cpu()
        _check(logits, self.lengths.tolist(), targets)
        inside = torch.arange(logits.shape[1]) < self.lengths[:, None]
        if logits.dtype != torch.float64:  # half as many bits, as of autocast, are too few
            logits = logits.float()
        self.padded, self.logits = logits, logits[inside.to(logits.device)]
        k = max(int(one.posteriors.counts.max()) for one in targets)
        units, probs = zip(*(one.posteriors.padded(k) for one in targets), strict=True)
        self.on_cpu = torch.from_numpy(np.concatenate(units)), torch.from_numpy(np.concatenate(probs))
        self.units, self.probs = (rows.to(logits.device) for rows in self.on_cpu)
        self.tail = torch.from_numpy(np.concatenate([one.tail for one in targets])).to(logits.device)
        self.targets = targets

    def soft(self, missing_mass: MissingMass) -> Tensor:
        """The cross-entropy of each frame."""
        if missing_mass not in get_args(MissingMass):
            raise UserError(f"missing_mass: {missing_mass!r} is unknown; use {', '.join(get_args(MissingMass))}")
        priors = which = None
        if missing_mass == "prior":
            shared: dict[int, np.ndarray] = {}
            for one in self.targets:
                if one.prior is None:
                    raise UserError(f"{one.key}: its shard has no prior; use missing_mass='ghost'")
                shared[id(one.prior)] = one.prior
            priors = torch.from_numpy(np.stack(list(shared.values()))).to(self.logits.device, torch.float32)
            rows = torch.tensor([list(shared).index(id(one.prior)) for one in self.targets])
            which = rows.repeat_interleave(self.lengths).to(self.logits.device)
        return soft_cross_entropy(self.logits, self.units, self.probs, self.tail, missing_mass, priors, which)


def _check(logits: Tensor, lengths: list[int], targets: Sequence[SoftTarget]) -> None:
    if isinstance(targets, SoftTarget) or not all(isinstance(one, SoftTarget) for one in targets):
        raise UserError(
            "targets: must be a list of soft targets, one of each utterance; take them from asr_kd.soft_targets"
        )
    if logits.ndim != 3 or not targets or not len(logits) == len(lengths) == len(targets):
        raise UserError(
            f"logits of shape {list(logits.shape)}, {len(lengths)} lengths and {len(targets)} soft targets do not fit; give logits [batch, "
            "frames, units], and a length and a soft target of each utterance"
        )
    for frames, target in zip(lengths, targets, strict=True):
        if frames != target.frames or frames > logits.shape[1]:
            raise UserError(
                f"{target.key}: its soft target has {target.frames} frames of {target.frame_ms} ms, the student {frames} of at most "
                f"{logits.shape[1]}; for another frame period give target.resampled(frame_ms, frames)"
            )
        if target.num_units != logits.shape[2]:
            raise UserError(
                f"{target.key}: its soft target is over {target.num_units} units, the logits over {logits.shape[2]}; give the student the "
                "teacher's units"
            )


def soft(
    logits: Tensor, lengths: Tensor, targets: Sequence[SoftTarget], *, missing_mass: MissingMass = "ghost"
) -> Tensor:
    """The cross-entropy of the student's softmax against the soft targets, frame by frame.

    Args:
        logits: float [batch, frames, units].
        lengths: int [batch], frames of each utterance.
        targets: of each utterance, of as many frames.
        missing_mass: what is made of the mass of units that were not kept: `ghost` (they count as one class), `prior`, `uniform` or
            `renormalise`, see `soft_cross_entropy`.

    Returns:
        a number, the mean over the frames, in nat.

    Raises:
        UserError: when frames or units of logits and targets differ, or a prior is asked for that a shard does not have.
    """
    return _Frames(logits, lengths, targets).soft(missing_mass).mean()


def divergence(logits: Tensor, lengths: Tensor, targets: Sequence[SoftTarget], kind: str, **settings: Any) -> Tensor:
    """A divergence of the student's distributions from the teacher's, frame by frame; units that were not kept count as one class.

    Args:
        logits: float [batch, frames, units].
        lengths: int [batch], frames of each utterance.
        targets: of each utterance, of as many frames.
        kind: `forward`, `reverse`, `jensen`, `skewed`, `skewed_reverse`, `variation`, `decoupled` or `pearson`; see
            `distillation.divergence`, also for which of them a student can begin with.
        settings: `alpha`, `beta` and `teacher_share`, numbers, as of `divergence` in the settings of `asr-kd train`.

    Returns:
        a number, the mean over the frames.

    Raises:
        UserError: as of `soft`, and when a setting does not fit the kind.
    """
    asked = build(DivergenceSettings, {"kind": kind, **settings}, "asr_kd.losses.divergence")
    frames = _Frames(logits, lengths, targets)
    return divergences.losses(frames.logits, frames.units, frames.probs, frames.tail, asked).mean()


def spikes(
    logits: Tensor, lengths: Tensor, targets: Sequence[SoftTarget], *, missing_mass: MissingMass = "ghost"
) -> Tensor:
    """Each spike of a CTC teacher as one event that the student may say somewhat sooner or later, and all other frames as of `soft`.

    Args:
        logits: float [batch, frames, units].
        lengths: int [batch], frames of each utterance.
        targets: of each utterance, of as many frames; all of the same frame period.
        missing_mass: as of `soft`.

    Returns:
        a number, the sum over spikes and other frames by the number of all frames, in nat.

    Raises:
        UserError: as of `soft`.
    """
    frames = _Frames(logits, lengths, targets)
    found = find_spikes(*frames.on_cpu, frames.lengths, *reach(targets[0].frame_ms))
    outside = found.outside(len(frames.on_cpu[0])).to(logits.device)
    moved = Spikes(*found.edges.to(logits.device))
    events = spike_cross_entropy(frames.logits, frames.units, frames.probs, moved)
    return (frames.soft(missing_mass)[outside].sum() + events.sum()) / len(outside)


def sequences(
    logits: Tensor, lengths: Tensor, targets: Sequence[SoftTarget], rng: np.random.Generator, **settings: Any
) -> Tensor:
    """The CTC loss of transcripts that are drawn from what the teacher says: at no moment in particular, and anew in each call.

    Args:
        logits: float [batch, frames, units].
        lengths: int [batch], frames of each utterance.
        targets: of each utterance, of as many frames.
        rng: decides the draws.
        settings: `draws` and `temperature`, as of `sequences` in the settings of `asr-kd train`.

    Returns:
        a number, the mean over the draws by the number of frames, in nat.

    Raises:
        UserError: as of `soft`.
    """
    asked = build(SequenceSettings, settings, "asr_kd.losses.sequences")
    if asked.best:
        raise UserError("asr_kd.losses.sequences: best is of n-best lists, not of soft targets; set draws")
    frames = _Frames(logits, lengths, targets)
    ids, sizes = draw_sequences(*frames.on_cpu, frames.lengths, asked, rng)
    log_probs = frames.padded.log_softmax(-1).repeat(asked.draws, 1, 1)
    drawn = Part(ids.to(logits.device), sizes)
    return ctc_loss(log_probs, frames.lengths.repeat(asked.draws), drawn) / (asked.draws * len(frames.tail))
