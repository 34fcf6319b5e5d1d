"""Relation knowledge: not what a layer of the teacher says of a sample, but how samples lie to each other in it.

So the widths of student and teacher need not fit, and nothing is trained beside the student. Samples are events or frames of the whole batch
(`hidden.py`), or, for `gram`, `flow` and `attention`, the frames of an utterance. The losses are in `relation_losses.py`; each is a mean over pairs,
here times the number of learned frames. Pairs take memory for the square of the samples, so of many every second, third, … is compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from asr_kd.distillation import relation_losses
from asr_kd.distillation.hidden import Hidden
from asr_kd.distillation.knowledge import Seen
from asr_kd.distillation.spikes import frames_of
from asr_kd.errors import UserError
from asr_kd.units import Units

#: for each kind between samples of a batch, its loss, and how many samples are compared at most
BETWEEN_SAMPLES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], int]] = {
    "similarity": (relation_losses.similarity, 256),
    "distance": (relation_losses.distance, 256),
    "angle": (relation_losses.angle, 64),
    "probability": (relation_losses.probability, 256),
    "correlation": (relation_losses.correlation, 256),
}
#: frames of an utterance between which attention is compared, at most
ATTENDED = 256


class Relations(Hidden):
    """`relations`: how samples lie to each other, of one kind."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)
        asked = self.settings
        self.taps = tuple(filter(None, (asked.student, asked.student_to)))
        self.taught = tuple(filter(None, (asked.teacher, asked.teacher_to)))
        mine, theirs = self.task.model.taps, self.task.taught
        if not all(tap in mine for tap in self.taps) or not all(tap in theirs for tap in self.taught):
            return  # `lesson_of` says which is missing
        widths = [mine[tap] for tap in self.taps], [theirs[tap] for tap in self.taught]
        if asked.kind == "flow" and widths[0] != widths[1]:
            raise UserError(
                f"{self.name}: flow needs layers of the same width; the student's have {_said(widths[0])}, the teacher's "
                f"{_said(widths[1])}: take another kind, gram or similarity, or a student of the teacher's size"
            )
        if asked.kind == "attention" and any(width // 3 % asked.heads for width in widths[0] + widths[1]):
            sizes = widths[0][0] // 3, widths[1][0] // 3
            raise UserError(
                f"{self.name}: heads must divide the student's size {sizes[0]} and the teacher's {sizes[1]}, and {asked.heads} does not"
            )

    def loss(self, seen: Seen) -> Tensor:
        """See `Knowledge`."""
        kind = self.settings.kind
        if kind in BETWEEN_SAMPLES:
            found = self._between_samples(seen, *BETWEEN_SAMPLES[kind])
        elif kind == "classes":
            found = relation_losses.classes(*self._distributions(seen)) * len(seen.rows)
        else:
            found = self._over_time(seen)
        # all weights have a gradient, also those of layers above and where there is nothing to compare: DDP waits for it
        return found

    def _between_samples(self, seen: Seen, loss: Callable[[Tensor, Tensor], Tensor], most: int) -> Tensor:
        pairs = self.pairs(seen)
        every = math.ceil(len(pairs.student) / most) or 1
        student, teacher = pairs.student[::every], pairs.teacher.detach()[::every]
        if len(student) < 2:
            return student.sum() * 0.0
        if self.settings.centre:
            student, teacher = student - student.mean(0), teacher - teacher.mean(0)
        return loss(student, teacher) * len(seen.rows)

    def _distributions(self, seen: Seen) -> tuple[Tensor, Tensor, Tensor]:
        """Distributions over units of student and teacher [samples, units], and the teacher's unit; of events without the blank."""
        units, probs = (seen.parts[f"soft.{name}"].values for name in ("units", "probs"))
        own, probs = seen.rows.float().softmax(-1), probs.detach().float()
        theirs = torch.zeros_like(own).scatter_add(1, units, probs)
        if self.settings.samples == "frames":
            return own, _shares(theirs), units[:, 0]
        start, end, first, last = seen.parts["spikes.edges"].values
        if not len(start):
            return own[:0], theirs[:0], units[:0, 0]
        theirs = of_stretches(theirs, start, end)
        return of_stretches(own, first, last), theirs, theirs.argmax(1)

    def _over_time(self, seen: Seen) -> Tensor:
        """The loss of each utterance times its learned frames, of all together."""
        kind, frames = self.settings.kind, seen.learned.sum(1)
        kept = seen.learned
        if kind == "attention":
            place = kept.cumsum(1) - 1
            every = ((frames + ATTENDED - 1) // ATTENDED).clamp_min(1)
            kept = kept & (place % every[:, None] == 0)
        inside, mine = _packed([seen.hidden[tap].float()[kept] for tap in self.taps], kept)
        rows = kept[seen.learned]
        theirs = [seen.parts[f"hidden.{tap}"].values.detach().float()[rows] for tap in self.taught]
        theirs = _packed(theirs, kept)[1]
        if kind == "flow":
            losses = relation_losses.flow((mine[0], mine[1]), (theirs[0], theirs[1]), frames)
        elif kind == "attention":
            losses = relation_losses.attention(mine[0], theirs[0], inside, self.settings.heads)
        else:
            units, probs = (seen.parts[f"soft.{name}"].values for name in ("units", "probs"))
            blank = torch.where(units == Units.blank, probs.detach().float(), 0.0).sum(1, keepdim=True)
            weights = _packed([1 - blank], kept)[1][0][..., 0]
            losses = relation_losses.gram(mine[0], theirs[0], weights)
        return (losses * frames).sum()


def _said(widths: list[int]) -> str:
    return " and ".join(map(str, widths))


def _packed(rows: list[Tensor], kept: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Rows of the frames that are kept, bool [batch, frames], one after the other from each utterance's begin.

    Returns:
        bool [batch, most], which frames are there, and for each of `rows` [batch, most, width], 0 elsewhere.
    """
    sizes = kept.sum(1)
    inside = torch.arange(max(int(sizes.max()), 1), device=kept.device) < sizes[:, None]
    packed = []
    for one in rows:
        packed.append(one.new_zeros(*inside.shape, one.shape[1]))
        packed[-1][inside] = one
    return inside, packed


def of_stretches(rows: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """Distributions [stretches, units]: sums of rows [frames, units] over stretches of frames, without the blank."""
    inside, at = frames_of(first, last)
    stretch = torch.arange(len(first), device=rows.device)[:, None].expand_as(at)[inside]
    total = rows.new_zeros(len(first), rows.shape[1]).index_add(0, stretch, rows[at[inside]])
    speech = torch.arange(rows.shape[1], device=rows.device) != Units.blank
    return _shares(torch.where(speech, total, 0.0))


def _shares(rows: Tensor) -> Tensor:
    return rows / rows.sum(1, keepdim=True).clamp_min(1e-20)
