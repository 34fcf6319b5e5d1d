"""Who answers in the step what the student is to learn: a checkpoint (online), or the run's own moving average.

Stored answers come with the batch, from the loader; these are made of its clean features. All fill the same parts, so a loss does not
know who has answered. A peer, which is trained too, stands beside the student: `Knowledge.beside`.
"""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from asr_kd.audio.settings import FeatureSettings
from asr_kd.distillation.batch import Batch, Part
from asr_kd.distillation.knowledge import Pupil
from asr_kd.errors import UserError
from asr_kd.models.acoustic import Checkpoint
from asr_kd.units import Units

#: the name of the run's own moving average among the teachers
AVERAGE = "average"


class Answerer(Protocol):
    """Who answers in the step."""

    def answer(self, batch: Batch) -> dict[str, Part]:
        """The parts of a batch that its loader could not know; draws no random numbers, and has no gradient."""
        ...


class Network:
    """A network that hears the clean features of the batch, and says what it makes of them: soft targets with all units."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def answer(self, batch: Batch) -> dict[str, Part]:
        """See `Answerer`."""
        assert batch.clean is not None
        with torch.no_grad():
            logits: Tensor = self.network.eval()(batch.clean, batch.lengths).logits
            probs, units = logits.float()[batch.learned].softmax(-1).sort(-1, descending=True)
        whole = probs.new_full((1, probs.shape[1]), 1 / probs.shape[1])
        return {
            "soft.units": Part(units),
            "soft.probs": Part(probs),
            "soft.tail": Part(probs.new_zeros(len(probs))),
            "soft.priors": Part(whole, whole=True),
        }


def answerers(online: dict[str, Checkpoint], average: AveragedModel | None) -> dict[str, Answerer]:
    """Who can answer in the step, by name.

    Args:
        online: checkpoints by folder.
        average: moving average of what is trained, if there is one.
    """
    found: dict[str, Answerer] = {folder: Network(checkpoint.model) for folder, checkpoint in online.items()}
    if average is not None:
        found[AVERAGE] = Network(cast(Pupil, average.module).student)
    return found


def check_online(folder: str, checkpoint: Checkpoint, units: Units, features: FeatureSettings) -> None:
    """Refuse a checkpoint that cannot answer in the step.

    Args:
        folder: where it was loaded from.
        units: of the run; features: of the run.

    Raises:
        UserError: when its units or its features are not those of the run.
    """
    if checkpoint.units.hash != units.hash:
        raise UserError(
            f"teacher: {folder} has units {checkpoint.units.hash}, this run {units.hash}; take a teacher with the same units"
        )
    if checkpoint.features != features:
        raise UserError(
            f"teacher: {folder} hears other features than this run; give the run its `features`, or label the audio and learn "
            "the targets with resample=true"
        )
