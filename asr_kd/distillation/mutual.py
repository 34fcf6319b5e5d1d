"""Deep mutual learning: peers trained beside the student, and all learn from each other (Zhang et al. 2018, arXiv 1706.00384).

Each network learns what the source teaches, and the mean of KL(p of another ‖ its own p) over the others, frame by frame, whose answers have
no gradient. All take their steps at once, from the answers before it. The peers are left behind: a checkpoint is the student, and no peer,
even where one has come out better.

Where nothing but each other is learned, "all blank" is a fixed point, and spikes that two networks place at different moments are
averaged away: a source of the phase must teach something else, and one that fixes their moment (`ctc_within_targets`, soft targets) helps.

With `critic` each also learns to be taken for the next one, in a circle, as adversarial feature distillation does it with feature maps (AFD, Chung et al.
2020, arXiv 2002.01775). A critic for each (`critic.py`) tells what it says in the spikes of the next from what the next one says there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from asr_kd.config.schedule import value_at
from asr_kd.distillation.critic import Judge, of_peers, told_apart
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
        """The peers, and the critics, if there are any."""
        assert self.task.units is not None
        inputs, units, peers = self.task.features.dimension, self.task.units.size, self.settings.peers
        networks = [build_model(self.model, inputs, units) for _ in range(peers)]
        return Peers(
            networks, [Judge(units, f"critic.{of}") for of in range(peers + 1)] if self.settings.critic else []
        )

    def loss(self, seen: Seen) -> Tensor:
        """See `Knowledge`."""
        peers = [logits.float() for name, logits in seen.beside.items() if name.startswith("peer.")]
        loss = sum((self.taught_loss(seen, logits) for logits in peers), seen.logits.new_zeros(()))
        learners = [seen.rows, *(peer[seen.learned] for peer in peers)]
        loss = loss + value_at(self.share, seen.done) * mutual_loss(learners)
        return loss + self._taken_for_the_next(seen, learners) if self.settings.critic else loss

    def _taken_for_the_next(self, seen: Seen, learners: Sequence[Tensor]) -> Tensor:
        """The losses of the critics and, reversed, of those whom they judge; the means over samples count for each learned frame."""
        share, lengths = value_at(self.settings.critic, seen.done), seen.learned.sum(1)
        loss = seen.logits.new_zeros(())
        for number, own in enumerate(learners):
            other = learners[(number + 1) % len(learners)]
            samples = of_peers(own, other, lengths, self.task.features.frame_ms)
            told, right = told_apart(samples, seen.beside, share, f"critic.{number}")
            loss = loss + told * len(own)
            if len(samples.student):
                seen.note(f"{self.name}:critic.{number}:accuracy", right)
        return loss


class Peers(nn.ModuleList):
    """Networks that hear what the student hears, and behind them the critics of all, the student's first."""

    def __init__(self, networks: Sequence[AcousticModel], critics: Sequence[Judge] = ()) -> None:
        super().__init__([*networks, *critics])
        self.networks = len(networks)

    def forward(self, outputs: Outputs, features: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        """Logits [batch, frames, units] of the networks, by number, from 1; and the weights of the critics."""
        every = list(self)
        said = {f"peer.{at}": peer(features, lengths).logits for at, peer in enumerate(every[: self.networks], 1)}
        for critic in every[self.networks :]:
            said |= critic(outputs, features, lengths)
        return said


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
