"""Who answers in the step what the student is to learn: a checkpoint (online), or the run's own moving average.

Stored answers come with the batch, from the loader; these are made of its clean features. All fill the same parts, so a loss does not
know who has answered. A peer, which is trained too, stands beside the student: `Knowledge.beside`.
"""

from __future__ import annotations

from typing import cast

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


def answer(network: nn.Module, batch: Batch) -> dict[str, Part]:
    """What a network makes of the clean features of a batch: soft targets with all units; draws no random numbers."""
    assert batch.clean is not None
    with torch.no_grad():
        logits: Tensor = network.eval()(batch.clean, batch.lengths).logits
        probs, units = logits.float()[batch.learned].softmax(-1).sort(-1, descending=True)
    tail, whole = probs.new_zeros(len(probs)), probs.new_full((1, probs.shape[1]), 1 / probs.shape[1])
    soft = {"soft.units": Part(units), "soft.probs": Part(probs), "soft.tail": Part(tail)}
    return soft | {"soft.priors": Part(whole, whole=True)}


def answerers(online: dict[str, Checkpoint], average: AveragedModel | None) -> dict[str, nn.Module]:
    """The networks that can answer in the step, by name: checkpoints by folder, and the moving average, if there is one."""
    found: dict[str, nn.Module] = {folder: checkpoint.model for folder, checkpoint in online.items()}
    if average is not None:
        found[AVERAGE] = cast(Pupil, average.module).student
    return found


def check_same_input(
    name: str, checkpoint: Checkpoint, units: Units, features: FeatureSettings, otherwise: str = ""
) -> None:
    """Refuse a checkpoint that does not fit a run.

    Args:
        name: setting and folder of the checkpoint.
        units: of the run.
        features: of the run.
        otherwise: what else can be done about other features, for the message.

    Raises:
        UserError: when its units or its features are not those of the run.
    """
    if checkpoint.units.hash != units.hash:
        raise UserError(
            f"{name} has units {checkpoint.units.hash}, this run {units.hash}; take a checkpoint with the same units"
        )
    if checkpoint.features != features:
        raise UserError(f"{name} hears other features than this run; give the run its `features`{otherwise}")
