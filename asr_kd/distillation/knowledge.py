"""What a student can learn: the interface of a kind of knowledge. A kind is a file in this folder and a field of `SourceSettings`."""

from __future__ import annotations

import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from asr_kd.audio.settings import FeatureSettings
from asr_kd.distillation.batch import Batch, Example, Part
from asr_kd.distillation.settings import Asked, MissingMass, SourceSettings
from asr_kd.models.network import AcousticModel, Outputs
from asr_kd.models.settings import ModelSettings
from asr_kd.units import Units


@dataclass(frozen=True)
class Task:
    """What is trained, for the kinds that need to know.

    Attributes:
        units: vocabulary of the student; None when a step is only timed.
        missing_mass: see `soft_cross_entropy`.
    """

    units: Units | None
    features: FeatureSettings
    model: ModelSettings
    missing_mass: MissingMass


class Seen(NamedTuple):
    """A batch, and the outputs of the network and of the modules trained beside it.

    Attributes:
        logits: float32 [batch, frames, units].
        lengths: int64 [batch].
        learned: bool [batch, frames], the frames that are learned.
        parts: parts of the batch, rows for the learned frames in the order of `learned`.
        hidden: for each tap, [batch, frames, width].
        beside: outputs of this kind's module beside the student.
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

    What it needs of an utterance (text, targets, n-best lists; all frames at once) is in `KnowledgeSettings.needs`.

    Attributes:
        name: its name in the settings.
        weight: of its loss.
        taps: hidden states of the student that its loss, or its module beside the student, uses.
    """

    taps: Sequence[str] = ()

    def __init__(self, asked: Asked, task: Task) -> None:
        self.name, self.weight, self.task = asked.name, asked.weight, task
        self.settings: Any = asked.settings

    def prepare(self, examples: Sequence[Example], batch: Batch, rng: np.random.Generator) -> None:
        """Add parts to a batch, in the loader, on the CPU, after all changes of the features; `rng` is the batch's own."""

    def beside(self) -> nn.Module | None:
        """The module to train beside the student, if any: it maps `Outputs`, features and lengths to named tensors."""
        return None

    def loss(self, seen: Seen) -> Tensor:
        """The loss, a sum over learned frames (or utterances); the trainer divides it by the number of learned frames."""
        raise NotImplementedError


def knowledge_of(source: SourceSettings, task: Task) -> list[Knowledge]:
    """The kinds of knowledge of a source, in the order in which their losses are added."""
    return [pkgutil.resolve_name(asked.settings.make)(asked, task) for asked in source.knowledge()]


class Pupil(nn.Module):
    """Everything that is trained, as one module: the student and the modules beside it.

    Processes exchange it, the optimiser updates it, the moving average follows it and the training state holds it. A
    checkpoint holds only the student.

    Attributes:
        beside: modules beside the student by kind; sources with the same kind share them.
        taps: hidden states of the student that any kind uses.
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
        """Outputs of the student, and by kind those of the modules beside it.

        All modules run on every batch, whatever is learned from it: DDP expects every weight to be used.
        """
        outputs = self.student(features, lengths, self.taps)
        return outputs, {name: module(outputs, features, lengths) for name, module in self.beside.items()}
