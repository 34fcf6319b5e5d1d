"""Deep mutual learning: peers trained beside the student, and all learn from each other (Zhang et al. 2018, arXiv 1706.00384).

Each network learns what the source teaches, and the mean of KL(p of another ‖ its own p) over the others, frame by frame, whose answers have
no gradient. All take their steps at once, from the answers before it. The peers are left behind: a checkpoint is the student, and no peer,
even where one has come out better.

Where nothing but each other is learned, "all blank" is a fixed point, and spikes that two networks place at different moments are
averaged away: a source of the phase must teach something else, and one that fixes their moment (`ctc_within_targets`, soft targets) helps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from asr_kd.config.schedule import value_at
from asr_kd.distillation.knowledge import Knowledge, Seen, Task
from asr_kd.distillation.response import divergence_from
from asr_kd.distillation.settings import Asked
from asr_kd.errors import UserError
from asr_kd.models.acoustic import build_model
from asr_kd.models.network import AcousticModel, Outputs


class Together(Knowledge):
    """Base of the kinds that train further learners beside the student; their settings are `TogetherSettings`.

    Attributes:
        others: kinds of the source, which all learners learn.
        share: the weight of what they learn from each other; that of the whole loss is 1, as it has their losses of `others` too.
    """

    others: Sequence[Knowledge] = ()

    def __init__(self, asked: Asked, task: Task) -> None:
        super().__init__(asked, task)
        self.share, self.weight = asked.weight, 1.0

    def join(self, others: Sequence[Knowledge]) -> None:
        """See `Knowledge`."""
        for other in others:
            if other.taps or other.taught or type(other).beside is not Knowledge.beside:
                raise UserError(
                    f"{self.name}: cannot go with {other.name}, which looks into the student or trains a part beside it; leave out one"
                )
        self.others = others

    def taught_loss(self, seen: Seen, logits: Tensor) -> Tensor:
        """What the source teaches, for a learner with these logits [batch, frames, units]."""
        loss = logits.new_zeros(())
        for other in self.others:
            loss = loss + value_at(other.weight, seen.done) * other.loss(seen._replace(logits=logits))
        return loss


class Mutual(Together):
    """`mutual`: networks of equal or unequal size; the student is one of them."""

    def __init__(self, asked: Asked, task: Task) -> None:
        super().__init__(asked, task)
        try:
            self.model = (self.settings.model or task.model).in_frames(task.features)
        except ValueError as error:
            raise UserError(f"{self.name}.model: {error}") from None

    def beside(self) -> nn.Module:
        """The peers."""
        assert self.task.units is not None
        inputs, units = self.task.features.dimension, self.task.units.size
        return Peers([build_model(self.model, inputs, units) for _ in range(self.settings.peers)])

    def loss(self, seen: Seen) -> Tensor:
        """See `Knowledge`."""
        peers = [logits.float() for logits in seen.beside.values()]
        loss = sum((self.taught_loss(seen, logits) for logits in peers), seen.logits.new_zeros(()))
        return loss + value_at(self.share, seen.done) * mutual_loss(
            [seen.rows, *(peer[seen.learned] for peer in peers)]
        )


class Peers(nn.ModuleList):
    """Networks that hear what the student hears."""

    def __init__(self, networks: Sequence[AcousticModel]) -> None:
        super().__init__(networks)

    def forward(self, outputs: Outputs, features: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        """Their logits [batch, frames, units], by number, from 1."""
        return {f"peer.{number}": peer(features, lengths).logits for number, peer in enumerate(self, 1)}


def mutual_loss(learners: Sequence[Tensor]) -> Tensor:
    """What each learns from the others, the mean over them, summed over learners and frames.

    Args:
        learners: logits [frames, units] of two or more.
    """
    pairs = [
        divergence_from(other, own)
        for index, own in enumerate(learners)
        for number, other in enumerate(learners)
        if number != index
    ]
    return torch.stack(pairs).sum() / (len(learners) - 1)
