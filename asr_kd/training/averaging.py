"""The mean of several checkpoints of one run (the last ones, or the best), tried at its end."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from torch.optim.swa_utils import AveragedModel

from asr_kd.config import AverageSettings
from asr_kd.models.acoustic import load_checkpoint

#: in a run's folder: a checkpoint for each step that the mean is of
SCORED = "scored"


@dataclass(frozen=True)
class Scored:
    """A step after which the weights were scored on the development set."""

    step: int
    wer: float
    loss: float


def chosen(wanted: AverageSettings, scored: Sequence[Scored]) -> list[Scored]:
    """Those that the mean is of so far, in the order of their steps: the last ones, or the best by WER, then by loss."""
    if wanted.last:
        best = sorted(scored, key=lambda one: -one.step)
    else:
        best = sorted(scored, key=lambda one: (one.wer, one.loss, one.step))
    return sorted(best[: wanted.last or wanted.best], key=lambda one: one.step)


def folder_of(run: Path, one: Scored) -> Path:
    """Where its checkpoint lies."""
    return run / SCORED / str(one.step)


def remove_others(run: Path, kept: Sequence[Scored]) -> None:
    """Remove the checkpoints that the mean is not of; only once the state says so, from which a stopped run goes on."""
    for folder in set((run / SCORED).glob("*")) - {folder_of(run, one) for one in kept}:
        shutil.rmtree(folder)


def mean_of(folders: Sequence[Path]) -> nn.Module:
    """The network whose weights are the mean of those of several checkpoints, which are read one after the other.

    Running statistics (of a batch norm) are averaged too.

    Raises:
        UserError: when one is gone or damaged.
    """
    mean = AveragedModel(load_checkpoint(folders[0]).model, use_buffers=True)
    for folder in folders:
        mean.update_parameters(load_checkpoint(folder).model)
    return mean.module
