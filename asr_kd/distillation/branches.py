"""One network with branches that teach each other through their mixture: ONE (Lan et al. 2018, arXiv 1806.04606).

The student's lower layers carry further branches, each an upper layer of its kind and an output. A gate on the shared layers mixes the
logits of all, frame by frame; each branch and the mixture learn what the source teaches, and each branch learns from the mixture.
The checkpoint is the student, branch 0, at its usual size: the other branches and the gate are left behind.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from asr_kd.config.schedule import value_at
from asr_kd.distillation.knowledge import Seen, Task
from asr_kd.distillation.mutual import Together
from asr_kd.distillation.response import divergence_from
from asr_kd.distillation.settings import Asked
from asr_kd.errors import UserError
from asr_kd.models.acoustic import build_model
from asr_kd.models.network import AcousticModel, Outputs


class Branches(Together):
    """`branches`: see above."""

    def __init__(self, asked: Asked, task: Task) -> None:
        super().__init__(asked, task)
        if task.model.layers < 2:
            raise UserError(f"{self.name}: share the layers below the student's last; give model.layers 2 or more")
        if task.model.conditioned:
            raise UserError(
                f"{self.name}: cannot share layers of a network that is conditioned; leave out model.conditioned"
            )
        self.taps = (f"layer.{task.model.layers - 1}",)

    def beside(self) -> nn.Module:
        """The other branches, and the gate."""
        assert self.task.units is not None
        upper = self.task.model.model_copy(update={"layers": 1, "delay_frames": 0})
        (tap,), units = self.taps, self.task.units.size
        width = self.task.model.taps[tap]
        others = [build_model(upper, width, units) for _ in range(self.settings.count - 1)]
        return Upper(tap, others, nn.Linear(width, self.settings.count), upper.dropout)

    def loss(self, seen: Seen) -> Tensor:
        """See `Knowledge`."""
        said = {name: values.float() for name, values in seen.beside.items()}
        gate = said.pop("gate").softmax(-1)
        branches = [seen.logits, *said.values()]
        mixture = mixed(gate, branches)
        loss = sum((self.taught_loss(seen, logits) for logits in (*said.values(), mixture)), seen.logits.new_zeros(()))
        temperature = self.settings.temperature
        answer = mixture[seen.learned]
        each = torch.stack([divergence_from(answer, branch[seen.learned], temperature) for branch in branches])
        return loss + value_at(self.share, seen.done) * each.sum()


class Upper(nn.Module):
    """The branches beside the student, and the gate that weighs all.

    They hear the student's lower layers as aligned with its output, so that a student with a delay has heard as far ahead as it has.

    Args:
        tap: the highest layer that is shared.
        branches: networks of one layer on it.
        gate: from it to a number for each branch, the student's first.
        dropout: on what each branch hears of it.
    """

    def __init__(self, tap: str, branches: Sequence[AcousticModel], gate: nn.Linear, dropout: float) -> None:
        super().__init__()
        self.tap, self.branches, self.gate, self.dropout = tap, nn.ModuleList(branches), gate, nn.Dropout(dropout)

    def forward(self, outputs: Outputs, features: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        """The gate [batch, frames, branches] before its softmax, and by number, from 1, the logits [batch, frames, units] of the branches."""
        shared = outputs.hidden[self.tap]
        logits = [branch(self.dropout(shared), lengths).logits for branch in self.branches]
        return {"gate": self.gate(shared)} | {f"branch.{number}": one for number, one in enumerate(logits, 1)}


def mixed(gate: Tensor, branches: Sequence[Tensor]) -> Tensor:
    """Logits [..., units] of the branches, weighed by the gate [..., branches]."""
    return sum((gate[..., at, None] * logits for at, logits in enumerate(branches)), torch.zeros_like(branches[0]))
