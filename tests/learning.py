"""What tests of losses share."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from asr_kd.distillation.batch import Batch
from asr_kd.distillation.knowledge import Lesson, Pupil, Seen, Task, lesson_of
from asr_kd.training.distributed.exchange import Exchange
from asr_kd.training.distributed.ranks import Ranks
from asr_kd.training.settings import TrainSettings
from asr_kd.training.step import Learner, batch_loss
from asr_kd.units import Units


def lessons(settings: TrainSettings, units: Units | None = None) -> list[Lesson]:
    """What is learned of each source of the first phase."""
    task = Task(units, settings.features, settings.model, settings.missing_mass)
    return [lesson_of(source, task) for source in settings.phases[0].sources]


def loss_of(logits: Tensor, batch: Batch, settings: TrainSettings, units: Units | None = None) -> Tensor:
    """The loss of a batch of the first phase, a mean over its learned frames."""
    frame = torch.arange(logits.shape[1])[None, :]
    learned = (frame >= batch.first[:, None]) & (frame < batch.last[:, None])
    seen = Seen(logits, batch.lengths, learned, batch.parts, {}, {})
    return batch_loss(seen, lessons(settings, units)[batch.source], batch.frames, {})


def prepared(batch: Batch, settings: TrainSettings) -> Batch:
    """A batch that was made by hand, with what the kinds of the first source add."""
    for one in lessons(settings)[0].kinds:
        one.prepare([], batch, np.random.default_rng(0))
    return batch


def learner_of(settings: TrainSettings | None, model: nn.Module, rate: float = 0.0) -> Learner:
    """A learner by plain gradient descent."""
    pupil = Pupil(model)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(pupil.parameters(), lr=rate)
    return Learner(settings, pupil, optimizer, Exchange(pupil, Ranks()))  # type: ignore[arg-type]
