"""Hidden states of student and teacher to compare: of frames, or of the spikes of a CTC teacher as events.

More than nine of ten frames of a CTC network are blank, and a teacher that hears the whole utterance places its spikes where a streaming
student cannot. An event is free of both: the teacher's states around one of its spikes, weighted by how little blank there is, and the student's
over the stretch in which it may answer that spike (`spikes.py`), weighted by its own probability of the teacher's unit. The student's
weights have no gradient: it is taught what to think when it speaks, not when to speak.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from asr_kd.distillation.batch import Batch, Example, Part
from asr_kd.distillation.knowledge import Knowledge, Seen
from asr_kd.distillation.spikes import frames_of, stretches
from asr_kd.units import Units

#: weight of an event's frames that any frame has, so that they add up to something
LEAST = 1e-6


class Pairs(NamedTuple):
    """What is compared, a row per sample; float32 whatever the network's precision.

    Attributes:
        student: float32 [samples, width], with gradient (float64 if the states are).
        teacher: float32 [samples, width of the teacher], without (float64 if the states are).
        utterance: int64 [samples], the utterance of the batch that each is from.
        unit: int64 [samples], the teacher's best unit: of a frame, or of a spike, the best that is no blank.
    """

    student: Tensor
    teacher: Tensor
    utterance: Tensor
    unit: Tensor


class Hidden(Knowledge):
    """Base of the kinds that compare hidden states; their settings are `HiddenSettings`."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self.taps, self.taught = (self.settings.student,), (self.settings.teacher,)

    @property
    def widths(self) -> tuple[int, int]:
        """Of the student's and the teacher's hidden state."""
        return self.task.model.taps[self.settings.student], self.task.taught[self.settings.teacher]

    def prepare(self, examples: Sequence[Example], batch: Batch, rng: np.random.Generator) -> None:
        """See `Knowledge`."""
        if self.settings.samples == "events" and "spikes.edges" not in batch.parts:
            batch.parts["spikes.edges"] = Part(stretches(batch, self.task.features.frame_ms).edges, whole=True)

    def pairs(self, seen: Seen) -> Pairs:
        """The samples of a batch, of all its learned frames or of all spikes of the teacher; there may be none."""
        student = exact(seen.hidden[self.settings.student][seen.learned])
        teacher = exact(seen.parts[f"hidden.{self.settings.teacher}"].values.detach())
        units, probs = (seen.parts[f"soft.{name}"].values for name in ("units", "probs"))
        if self.settings.samples == "frames":
            return Pairs(student, teacher, seen.utterances, units[:, 0])
        start, end, first, last = seen.parts["spikes.edges"].values
        if not len(start):
            return Pairs(student[:0], teacher[:0], seen.utterances[:0], units[:0, 0])
        with torch.no_grad():
            spoken = torch.where(units != Units.blank, probs.float(), 0.0)
            inside, at = frames_of(start, end)
            total = spoken.new_zeros(len(start), seen.logits.shape[-1])
            total.scatter_add_(1, units[at].flatten(1), (spoken[at] * inside[..., None]).flatten(1))
            unit = total.argmax(1)
            theirs = of_spikes(teacher, spoken.sum(-1), start, end)
            inside, at = frames_of(first, last)
            own = seen.rows.float().softmax(-1)[at, unit[:, None]]
            weights = _shares(own, inside)
        return Pairs((weights[..., None] * student[at]).sum(1), theirs, seen.utterances[start], unit)


def exact(states: Tensor) -> Tensor:
    """In float32, or float64 if they are."""
    return states.to(torch.promote_types(states.dtype, torch.float32))


def of_spikes(states: Tensor, mass: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """The teacher's state of each spike: the mean over its frames, weighted by how little blank there is.

    Args:
        states: float32 [frames, width].
        mass: float32 [frames], the teacher's probability of all units but the blank.
        start: int64 [spikes], the first frame of each.
        end: int64 [spikes], one past the last.

    Returns:
        float32 [spikes, width].
    """
    if not len(start):
        return states[:0]
    inside, at = frames_of(start, end)
    return (_shares(torch.where(inside, mass[at], 0.0), inside)[..., None] * states[at]).sum(1)


def _shares(weights: Tensor, inside: Tensor) -> Tensor:
    """Weights [stretches, longest] that add up to 1 over what is inside."""
    weights = torch.where(inside, weights + LEAST, 0.0)
    return weights / weights.sum(1, keepdim=True)
