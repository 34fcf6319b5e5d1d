"""Response knowledge of a CTC teacher without its timing: each spike is one event, and the student chooses the frame.

A CTC teacher leaves the blank for a frame or two, at an arbitrary moment. Learning frame by frame, a student learns that
moment along with the unit, and spreads a spike that it cannot place over several frames, all below the blank. Here the
teacher's spike becomes one distribution over the unit that it emits, or none, and the student's answer is the same
distribution over a wider stretch of frames, summed over all alignments within it. With one-hot targets this is CTC on the
teacher's 1-best, held near its spikes; soft ones also tell how sure the teacher was, and the alternatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from asr_kd.distillation.batch import Batch, Example, Part
from asr_kd.distillation.knowledge import Seen
from asr_kd.distillation.response import Soft
from asr_kd.distillation.timing import SPEECH
from asr_kd.units import Units

#: how far the student may move a spike: from this long before it on, to this long after its start where no other comes first
BEFORE_MS, AFTER_MS = 150, 210
#: log-probability of the impossible; finite, so that its gradient is 0 and not NaN
NEVER = -1e4


class SoftSpikes(Soft):
    """`spikes`: each spike as one event; frames outside the stretches in which the student may answer, one by one."""

    def prepare(self, examples: Sequence[Example], batch: Batch, rng: np.random.Generator) -> None:
        """See `Knowledge`."""
        spikes = stretches(batch, self.task.features.frame_ms)
        batch.parts["spikes.outside"] = Part(spikes.outside(len(batch.parts["soft.units"].values)))
        batch.parts["spikes.edges"] = Part(spikes.edges, whole=True)

    def loss(self, seen: Seen) -> Tensor:
        """See `Knowledge`."""
        rows, spikes = seen.rows, Spikes(*seen.parts["spikes.edges"].values)
        outside = self.of_frames(seen, rows)[seen.parts["spikes.outside"].values].sum()
        targets = seen.parts["soft.units"].values, seen.parts["soft.probs"].values
        return outside + spike_cross_entropy(rows, *targets, spikes).sum()


@dataclass(frozen=True)
class Spikes:
    """The spikes of a batch, in order; int64 [spikes] each, frames counted over the whole batch, ends exclusive.

    The teacher emits between `start` and `end`, and the student may emit between `first` and `last`. The student's stretches
    do not overlap, and two of them touch only where the teacher's spikes do: otherwise a frame between separates equal units.
    """

    start: Tensor
    end: Tensor
    first: Tensor
    last: Tensor

    @property
    def edges(self) -> Tensor:
        """int64 [4, spikes], as one tensor."""
        return torch.stack([self.start, self.end, self.first, self.last])

    def outside(self, frames: int) -> Tensor:
        """Bool [frames]: which frames belong to no stretch of the student."""
        steps = torch.zeros(frames + 1, dtype=torch.int64)
        steps.index_add_(0, self.first, torch.ones_like(self.first))
        steps.index_add_(0, self.last, -torch.ones_like(self.last))
        return steps.cumsum(0)[:frames] == 0


def stretches(batch: Batch, frame_ms: int) -> Spikes:
    """The spikes in the soft targets of a batch on the CPU, and where a student may answer them."""
    units, probs = batch.parts["soft.units"].values, batch.parts["soft.probs"].values
    return find_spikes(units, probs, batch.last - batch.first, *reach(frame_ms))


def reach(frame_ms: int) -> tuple[int, int]:
    """How many frames before a spike, and from its start on, a student may answer it."""
    return round(BEFORE_MS / frame_ms), round(AFTER_MS / frame_ms)


def find_spikes(units: Tensor, probs: Tensor, lengths: Tensor, before: int, after: int) -> Spikes:
    """Find where the targets leave the blank, and where the student may answer.

    Args:
        units: int64 [frames, k], kept unit ids, utterance after utterance, the best first.
        probs: float [frames, k], their probabilities, 0 where there is none.
        lengths: int64 [utterances], number of frames of each.
        before: frames before a spike from which on the student may answer.
        after: frames after a spike's start within which it may.
    """
    begins = np.concatenate([[0], np.cumsum(lengths.numpy())])
    speech = torch.where(units != Units.blank, probs, 0.0)
    unit = units.gather(1, speech.argmax(1, keepdim=True))[:, 0].numpy()
    mass = speech.sum(1).numpy()

    on = mass >= SPEECH
    starting = on & ~np.append(False, on[:-1])
    starting[begins[:-1]] = on[begins[:-1]]
    # a spike that has more than half its mass on one unit, then on another, is two spikes
    sure = np.flatnonzero(mass > 0.5)
    spike = np.cumsum(starting)
    starting[sure[1:][(spike[sure[1:]] == spike[sure[:-1]]) & (unit[sure[1:]] != unit[sure[:-1]])]] = True
    starts = np.flatnonzero(starting)
    ends = np.flatnonzero(on & ~np.append((on & ~starting)[1:], False)) + 1

    following = np.searchsorted(begins, starts, side="right")  # the utterance after the spike's
    same = following[1:] == following[:-1]  # whether a spike and the next are in one utterance
    apart = (starts[1:] > ends[:-1]).astype(np.int64)
    latest = begins[following]
    latest[:-1][same] = (starts[1:] - apart)[same]
    lasts = np.minimum(np.maximum(ends, starts + after), latest)
    earliest = begins[following - 1]
    earliest[1:][same] = (lasts[:-1] + apart)[same]
    firsts = np.maximum(starts - before, earliest)
    return Spikes(*(torch.from_numpy(edge.astype(np.int64)) for edge in (starts, ends, firsts, lasts)))


def spike_cross_entropy(logits: Tensor, units: Tensor, probs: Tensor, spikes: Spikes) -> Tensor:
    """Cross-entropy of each spike: -Σ q log p, with q the teacher's distribution there, and p the student's.

    Both are P(nothing) and P(exactly this unit, once) over their stretch of frames, summed over all CTC paths. q covers the
    units kept in the spike, normalised. p comes from the student's full softmax: its mass on other units, or on two units in
    a row, is not in the sum and so is pushed down.

    Args:
        logits: float [frames, units] of the student.
        units: int64 [frames, k], as of `find_spikes`, on the device of the logits.
        probs: float [frames, k], as of `find_spikes`, on the device of the logits.
        spikes: of the same targets.

    Returns:
        float [spikes], of the logits' type.
    """
    if not len(spikes.start):
        return logits.new_zeros(0)
    start, end, first, last = spikes.start, spikes.end, spikes.first, spikes.last
    with torch.no_grad():
        inside, at = frames_of(start, end)
        spoken = torch.where(inside[..., None], probs.to(logits.dtype)[at], 0.0)  # [spikes, frames of a spike, k]
        total = logits.new_zeros(len(start), logits.shape[1])
        total.scatter_add_(1, units[at].flatten(1), spoken.flatten(1))
        total[:, Units.blank] = 0.0
        mass, kept = total.topk(min(units.shape[1], logits.shape[1] - 1), dim=1)  # [spikes, kept]
        same = units[at][..., None] == kept[:, None, None, :]
        chosen = torch.where(same, spoken[..., None], 0.0).sum(2)
        blank = torch.where(units[at] == Units.blank, spoken, 0.0).sum(2)
        emitted = torch.where(
            torch.nn.functional.pad(mass > 0, (1, 0), value=True), _emission(_log(blank), _log(chosen), inside), NEVER
        )
        target = emitted.softmax(1)
    log_probs = logits - logits.logsumexp(1, keepdim=True)
    inside, at = frames_of(first, last)
    answer = _emission(log_probs[at, Units.blank], log_probs[at[..., None], kept[:, None, :]], inside)
    return -(target * answer).sum(1)


def _log(probs: Tensor) -> Tensor:
    return probs.log().clamp_min(NEVER)


def frames_of(first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """For stretches [first, last): bool [stretches, longest], whether a position is inside, and int64, its frame."""
    steps = torch.arange(int((last - first).max()), device=first.device)
    inside = steps < (last - first)[:, None]
    return inside, torch.where(inside, first[:, None] + steps, first[:, None])


def _emission(blank: Tensor, unit: Tensor, inside: Tensor) -> Tensor:
    """Log-probability that a stretch emits nothing, and that it emits one unit once; a forward pass of CTC for each.

    Args:
        blank: float [stretches, frames], log-probability of the blank.
        unit: float [stretches, frames, kept], of each unit.
        inside: bool [stretches, frames], which frames count.

    Returns:
        float [stretches, 1 + kept]: first for nothing, then for each unit.
    """
    nothing = torch.zeros_like(blank[:, 0])
    during = after = torch.full_like(unit[:, 0], NEVER)  # on the unit, or past it
    for frame in range(blank.shape[1]):
        here = inside[:, frame, None]
        on = torch.logaddexp(during, nothing[:, None]) + unit[:, frame]
        past = torch.logaddexp(during, after) + blank[:, frame, None]
        during, after = torch.where(here, on, during), torch.where(here, past, after)
        nothing = torch.where(inside[:, frame], nothing + blank[:, frame], nothing)
    return torch.cat([nothing[:, None], torch.logaddexp(during, after)], 1)
