"""What a student can learn: the contract of a kind of knowledge. Each kind is a file of this room, and a field of a source's settings."""

from __future__ import annotations

import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from asr_kd.audio.settings import FeatureSettings
from asr_kd.distillation.batch import Batch, Example, Part
from asr_kd.distillation.settings import MissingMass, SourceSettings
from asr_kd.models.network import AcousticModel, Outputs
from asr_kd.models.settings import ModelSettings
from asr_kd.units import Units


@dataclass(frozen=True)
class Task:
    """What is trained, for kinds that must know.

    Attributes:
        units: of the student; None where nothing is spelled, as when a step is timed.
        missing_mass: see `soft_cross_entropy`.
        blank_weight: weight in a soft loss of frames whose best target is the blank.
    """

    units: Units | None
    features: FeatureSettings
    model: ModelSettings
    missing_mass: MissingMass
    blank_weight: float


class Seen(NamedTuple):
    """What the network, and what is trained beside it, make of a batch.

    Attributes:
        logits: float32 [batch, frames, units].
        lengths: int64 [batch].
        learned: bool [batch, frames], the frames that are learned.
        parts: those of the batch, rows for the learned frames in the order of `learned`.
        hidden: of each tap, [batch, frames, width].
        beside: what this kind's module beside the student said.
    """

    logits: Tensor
    lengths: Tensor
    learned: Tensor
    parts: dict[str, Part]
    hidden: dict[str, Tensor]
    beside: dict[str, Tensor]

    @property
    def rows(self) -> Tensor:
        """Logits of the learned frames, [learned frames, units]."""
        return self.logits[self.learned]


class Knowledge:
    """A kind of knowledge: what it adds to a batch, what it trains beside the student, and its loss.

    What it needs of an utterance (text, targets, n-best lists; the whole of it) say its settings: `KnowledgeSettings.needs`.

    Attributes:
        name: as the settings call it.
        taps: hidden states of the student that its loss, or its module beside the student, looks at.
    """

    taps: Sequence[str] = ()

    def __init__(self, name: str, settings: Any, task: Task) -> None:
        self.name, self.settings, self.task = name, settings, task

    def prepare(self, examples: Sequence[Example], batch: Batch, rng: np.random.Generator) -> None:
        """Add parts to a batch, in the loader: behind every change of the features, on the CPU; `rng` is the batch's own."""

    def beside(self) -> nn.Module | None:
        """What is trained beside the student, if anything: maps `Outputs`, features and lengths to named tensors."""
        return None

    def loss(self, seen: Seen) -> Tensor:
        """A sum over the learned frames (or the utterances), which the trainer divides by the number of learned frames."""
        raise NotImplementedError


@dataclass(frozen=True)
class Weighed:
    """A kind that a source asks for, and the weight of its loss."""

    weight: float
    kind: Knowledge


def knowledge_of(source: SourceSettings, task: Task) -> list[Weighed]:
    """The kinds that a source asks for, in the order in which their losses are added."""
    made = []
    for asked in source.knowledge():
        kind = pkgutil.resolve_name(asked.settings.make)
        made.append(Weighed(asked.weight, kind(asked.name, asked.settings, task)))
    return made


class Pupil(nn.Module):
    """Everything that is trained, as one module: the student, and what stands beside it.

    It is what processes exchange, the optimiser steps, the moving average follows and the state holds. A checkpoint is of the
    student alone.

    Attributes:
        beside: by name of the kind, which all sources that ask for it share.
        taps: what any kind wants to see of the student.
    """

    def __init__(self, student: AcousticModel, kinds: Sequence[Knowledge] = ()) -> None:
        super().__init__()
        self.student = student
        self.beside = nn.ModuleDict()
        self.taps = sorted({tap for kind in kinds for tap in kind.taps})
        for kind in kinds:
            if kind.name not in self.beside and (module := kind.beside()) is not None:
                self.beside[kind.name] = module

    def forward(self, features: Tensor, lengths: Tensor) -> tuple[Outputs, dict[str, dict[str, Tensor]]]:
        """What the student says, and what stands beside it says of that, for every batch alike, whatever is learned of it.

        So every weight has a part in what comes out, as processes that exchange gradients expect.
        """
        outputs = self.student(features, lengths, self.taps)
        return outputs, {name: module(outputs, features, lengths) for name, module in self.beside.items()}
