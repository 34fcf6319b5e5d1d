"""The mean of several checkpoints of one run (the last ones, or the best), scored when the run ends."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch.optim.swa_utils import AveragedModel

from asr_kd.models.acoustic import load_checkpoint
from asr_kd.models.network import AcousticModel
from asr_kd.training.settings import AverageSettings

#: in a run's folder: the checkpoints to average, each in a folder named after its step
SCORED = "scored"
#: which score picks the best checkpoint: the setting `choose`
Choice = Literal["wer", "loss", "both"]


@dataclass(frozen=True)
class Scored:
    """A step and the scores of its weights on the development set; deletions and insertions are those in the WER."""

    step: int
    wer: float
    loss: float
    deletions: int = 0
    insertions: int = 0

    def rank(self, choose: Choice) -> tuple[float, ...]:
        """Sort key: the lower, the better.

        `both` is the product of WER and loss, so that 10 % less of either counts the same. If the product is 0 for both
        steps, the WER decides, then the loss. Early in training the WER is 100 % and only the loss matters.
        """
        orders: dict[Choice, tuple[float, ...]] = {"wer": (self.wer, self.loss), "loss": (self.loss, self.wer)}
        return orders.get(choose, (self.wer * self.loss, self.wer, self.loss))


def chosen(wanted: AverageSettings, scored: Sequence[Scored], choose: Choice) -> list[Scored]:
    """The steps to average so far (the last ones, or the best), in the order in which they were taken."""
    first = sorted(scored, key=lambda one: (-one.step,) if wanted.last else (*one.rank(choose), one.step))
    return sorted(first[: wanted.last or wanted.best], key=lambda one: one.step)


def folder_of(run: Path, one: Scored) -> Path:
    """Folder of its checkpoint."""
    return run / SCORED / str(one.step)


def remove_others(run: Path, kept: Sequence[Scored]) -> None:
    """Remove the checkpoints that are no longer averaged; call it after the state is saved, or a resumed run would miss them."""
    for folder in set((run / SCORED).glob("*")) - {folder_of(run, one) for one in kept}:
        shutil.rmtree(folder)


def mean_of(folders: Sequence[Path]) -> AcousticModel:
    """A network with the mean weights of several checkpoints, loaded one at a time.

    Running statistics (of a batch norm) are averaged too.

    Raises:
        UserError: when a checkpoint is missing or damaged.
    """
    mean = AveragedModel(load_checkpoint(folders[0]).model, use_buffers=True)
    for folder in folders:
        mean.update_parameters(load_checkpoint(folder).model)
    student: Any = mean.module
    return student
