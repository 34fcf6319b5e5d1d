"""The mean of several checkpoints of one run (the last ones, or the best), tried at its end."""

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

#: in a run's folder: a checkpoint for each step that the mean is of
SCORED = "scored"
#: which score chooses: the setting `choose`
Choice = Literal["wer", "loss", "both"]


@dataclass(frozen=True)
class Scored:
    """A step after which the weights were scored on the development set; deletions and insertions of its WER."""

    step: int
    wer: float
    loss: float
    deletions: int = 0
    insertions: int = 0

    def rank(self, choose: Choice) -> tuple[float, ...]:
        """What is lower for the better one.

        By `both` it is the product, in which a tenth less of either counts the same. Where one of the two is 0, and so
        the product, the WER decides, then the loss: early on the WER is 100 % and the loss alone counts anyway.
        """
        match choose:
            case "wer":
                return self.wer, self.loss
            case "loss":
                return self.loss, self.wer
            case "both":
                return self.wer * self.loss, self.wer, self.loss


def chosen(wanted: AverageSettings, scored: Sequence[Scored], choose: Choice) -> list[Scored]:
    """Those that the mean is of so far, in the order of their steps: the last ones, or the best."""
    if wanted.last:
        best = sorted(scored, key=lambda one: -one.step)
    else:
        best = sorted(scored, key=lambda one: (one.rank(choose), one.step))
    return sorted(best[: wanted.last or wanted.best], key=lambda one: one.step)


def folder_of(run: Path, one: Scored) -> Path:
    """Where its checkpoint lies."""
    return run / SCORED / str(one.step)


def remove_others(run: Path, kept: Sequence[Scored]) -> None:
    """Remove the checkpoints that the mean is not of; only once the state says so, from which a stopped run goes on."""
    for folder in set((run / SCORED).glob("*")) - {folder_of(run, one) for one in kept}:
        shutil.rmtree(folder)


def mean_of(folders: Sequence[Path]) -> AcousticModel:
    """The network whose weights are the mean of those of several checkpoints, which are read one after the other.

    Running statistics (of a batch norm) are averaged too.

    Raises:
        UserError: when one is gone or damaged.
    """
    mean = AveragedModel(load_checkpoint(folders[0]).model, use_buffers=True)
    for folder in folders:
        mean.update_parameters(load_checkpoint(folder).model)
    student: Any = mean.module
    return student
