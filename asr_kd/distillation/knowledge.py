"""What a student can learn: the interface of a kind of knowledge. A kind is a file in this folder and a field of `SourceSettings`."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from asr_kd.audio.settings import FeatureSettings
from asr_kd.distillation.batch import Batch, Example, Part
from asr_kd.distillation.settings import ANSWERED, Asked, MissingMass, SourceSettings
from asr_kd.errors import UserError
from asr_kd.models.network import AcousticModel, Outputs
from asr_kd.models.settings import ModelSettings
from asr_kd.units import Units

#: name of the kind whose module makes features, and of these among what it puts out
GENERATED, MADE = "generated", "features"


@dataclass(frozen=True)
class Task:
    """What is trained, for the kinds that need to know.

    Attributes:
        units: vocabulary of the student; None when a step is only timed.
        missing_mass: see `soft_cross_entropy`.
        taught: hidden states of who answers in this source, with their widths.
        source: what is learned from, and how.
    """

    units: Units | None
    features: FeatureSettings
    model: ModelSettings
    missing_mass: MissingMass
    taught: Mapping[str, int] = field(default_factory=dict)
    source: SourceSettings | None = None


class Seen(NamedTuple):
    """A batch, and the outputs of the network and of the modules trained beside it.

    Attributes:
        logits: float32 [batch, frames, units].
        lengths: int64 [batch].
        learned: bool [batch, frames], the frames that are learned.
        parts: parts of the batch, rows for the learned frames in the order of `learned`.
        hidden: for each tap, [batch, frames, width].
        beside: outputs of this kind's module beside the student.
        done: share of the phase's audio that was heard.
        note: takes the name and the value of what a kind measures beside its loss, for the metrics of the step.
    """

    logits: Tensor
    lengths: Tensor
    learned: Tensor
    parts: dict[str, Part]
    hidden: dict[str, Tensor]
    beside: dict[str, Tensor]
    done: float = 0.0
    note: Callable[[str, Tensor], None] = lambda name, value: None

    @property
    def rows(self) -> Tensor:
        """Logits of the learned frames, [learned frames, units]."""
        return self.logits[self.learned]

    @property
    def utterances(self) -> Tensor:
        """int64 [learned frames], the utterance of each learned frame."""
        return self.learned.nonzero()[:, 0]


class Knowledge:
    """A kind of knowledge: what it adds to a batch, what it trains beside the student, and its loss.

    What it needs of an utterance (text, targets, n-best lists; all frames at once) is in `KnowledgeSettings.needs`.

    Attributes:
        name: its name in the settings.
        weight: of its loss.
        taps: hidden states of the student that its loss, or its module beside the student, uses.
        taught: hidden states of who answers that it uses; they come as parts, `hidden.` and the name, a row per learned frame.
            Of stored codes also `codes.` and the name, which is the name of their part.
        alone: whether it learns something too where nobody answers.
    """

    taps: Sequence[str] = ()
    taught: Sequence[str] = ()
    alone: bool = False

    def __init__(self, asked: Asked, task: Task) -> None:
        self.name, self.weight, self.task = asked.name, asked.weight, task
        self.settings: Any = asked.settings
        self.needs = asked.needs

    def prepare(self, examples: Sequence[Example], batch: Batch, rng: np.random.Generator) -> None:
        """Add parts to a batch, on the CPU, after all changes of the features; `rng` is the batch's own.

        It runs in the loader, or where a kind learns from what is answered in the step, there, without the examples.
        """

    def join(self, others: Sequence[Knowledge]) -> None:
        """Know the other kinds of the source, once all are there; a UserError when it cannot go with one of them."""

    def beside(self) -> nn.Module | None:
        """The module to train beside the student, if any: it maps `Outputs`, features and lengths to named tensors."""
        return None

    def loss(self, seen: Seen) -> Tensor:
        """The loss, a sum over learned frames (or utterances); the trainer divides it by the number of learned frames."""
        raise NotImplementedError


@dataclass(frozen=True)
class Lesson:
    """What is learned from a source.

    Attributes:
        source: its settings.
        kinds: of knowledge, in the order in which their losses are added.
    """

    source: SourceSettings
    kinds: Sequence[Knowledge]

    @property
    def taught(self) -> list[str]:
        """Hidden states of who answers that any kind uses."""
        return sorted({tap for kind in self.kinds for tap in kind.taught})

    @property
    def answered(self) -> list[Knowledge]:
        """The kinds that learn from what somebody answers in the step."""
        return [kind for kind in self.kinds if kind.needs & ANSWERED] if self.source.teacher else []

    @property
    def unanswered(self) -> Lesson:
        """The lesson when nobody answers in the step."""
        return replace(self, kinds=[kind for kind in self.kinds if kind.alone or kind not in self.answered])


def lesson_of(source: SourceSettings, task: Task) -> Lesson:
    """The kinds of knowledge of a source.

    Raises:
        UserError: when a kind asks for hidden states that the student or who answers does not have, or cannot go with another.
    """
    task = replace(task, source=source)
    kinds = [pkgutil.resolve_name(asked.settings.make)(asked, task) for asked in source.knowledge()]
    for kind in kinds:
        kind.join([other for other in kinds if other is not kind])
        for whose, asked, there in (
            ("the network", kind.taps, task.model.taps),
            ("the teacher", kind.taught, task.taught),
        ):
            if missing := next((tap for tap in asked if tap not in there), None):
                raise UserError(
                    f"{source.name}: {kind.name}: {whose} has no {missing}; it has {', '.join(there) or 'none'}"
                )
    return Lesson(source, kinds)


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

    @property
    def clipped(self) -> list[nn.Module]:
        """What has its gradients clipped by itself: the student, each module beside it, and of a list of modules, each."""
        besides = [list(one) if isinstance(one, nn.ModuleList) else [one] for one in self.beside.values()]
        return [self.student, *(module for modules in besides for module in modules)]

    def forward(
        self, features: Tensor, lengths: Tensor, drawn: bool = False
    ) -> tuple[Outputs, dict[str, dict[str, Tensor]]]:
        """Outputs of the student, and by kind those of the modules beside it.

        All modules run on every batch, whatever is learned from it: DDP expects every weight to be used.

        Args:
            features: float32 [batch, frames, inputs].
            lengths: int64 [batch].
            drawn: whether they are noise, of which the generator makes what the others hear.
        """
        made = {GENERATED: self.beside[GENERATED].make(features)} if drawn else {}  # type: ignore[operator]
        heard = made[GENERATED]["heard"] if drawn else features
        outputs = self.student(heard, lengths, self.taps)
        others = {name: module for name, module in self.beside.items() if name not in made}
        return outputs, made | {name: module(outputs, heard, lengths) for name, module in others.items()}
