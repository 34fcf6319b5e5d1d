"""What is trained, how far it is, and one update of it: forward, the losses of the batch's source, backward, optimiser."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from asr_kd.config.schedule import value_at
from asr_kd.distillation.answers import answer, prepare_answers
from asr_kd.distillation.batch import Batch
from asr_kd.distillation.guard import Watch
from asr_kd.distillation.knowledge import GENERATED, MADE, Lesson, Pupil, Seen
from asr_kd.models.network import detached, within
from asr_kd.training.averaging import Scored
from asr_kd.training.batches import Lane
from asr_kd.training.distributed.exchange import Exchange
from asr_kd.training.distributed.ranks import Ranks
from asr_kd.training.settings import TrainSettings
from asr_kd.units import Units


@dataclass
class Position:
    """Progress of a run.

    Attributes:
        cycle: cycle of the schedule, from 0.
        phase: phase of the cycle, from 0.
        turn: the lane whose batch is next.
        scored: the step that was scored last.
        world: number of processes that trained.
        audio_seconds: audio heard in the run.
        phase_seconds: audio heard in this phase of this cycle.
        phase_start: the step at which the phase began.
        start: scores before the first step.
        best: scores of the weights in `best/`.
        last: the latest scores.
        lowest: lowest CTC loss of all scores after the start.
        lanes: for each phase, the position of each lane.
        kept: steps whose checkpoints are kept to be averaged.
        heard: by name, the step and the fingerprint of what another run shared and this one learns from.
    """

    cycle: int = 0
    phase: int = 0
    turn: int = 0
    step: int = 0
    scored: int = 0
    world: int = 1
    audio_seconds: float = 0.0
    phase_seconds: float = 0.0
    phase_start: int = 0
    start: Scored | None = None
    best: Scored | None = None
    last: Scored | None = None
    lowest: float = float("inf")
    finished: bool = False
    lanes: list[list[Lane]] = field(default_factory=list)
    kept: list[Scored] = field(default_factory=list)
    heard: dict[str, list[Any]] = field(default_factory=dict)


@dataclass
class Learner:
    """What is trained, with everything that a step changes.

    Attributes:
        pupil: the student and the modules trained beside it.
        exchange: how processes synchronise.
        average: moving average of the weights, scored and kept in their place; None: the weights themselves are.
        taught_by: moving average with a decay of its own that answers as a teacher, if there is one.
        teachers: networks that answer in the step, by the names that sources have for them.
        notes: by name, what the last step's kinds of knowledge measured beside their losses.
        gradient_norm: of the student in the last update, before it was clipped.
        watches: by source, how much the run's own average speaks in this phase, where there is a guard.
        check: raises if the run's folder is gone or belongs to another job.
    """

    settings: TrainSettings
    pupil: Pupil
    optimizer: torch.optim.Optimizer
    exchange: Exchange
    average: AveragedModel | None = None
    taught_by: AveragedModel | None = None
    teachers: dict[str, nn.Module] = field(default_factory=dict)
    notes: dict[str, Tensor] = field(default_factory=dict)
    gradient_norm: Tensor | float = 0.0
    watches: dict[int, Watch] = field(default_factory=dict)
    check: Callable[[], None] = lambda: None
    position: Position = field(default_factory=Position)

    @property
    def ranks(self) -> Ranks:
        """This process, with the device of the weights, among those of the run."""
        return self.exchange.ranks


def make_optimizer(pupil: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """AdamW; its learning rate is set at every step."""
    return torch.optim.AdamW(pupil.parameters(), lr=1.0, betas=(0.9, 0.98), weight_decay=settings.weight_decay)


def step(
    learner: Learner,
    batch: Batch | None,
    lessons: Sequence[Lesson],
    rate: float,
    everyone: float = 0.0,
    carry: int | None = None,
    done: float = 0.0,
) -> float:
    """One update, or with carried chunks one update a chunk.

    Args:
        batch: None if this process has none; it still takes part in the collectives of the others.
        lessons: for each source of the phase, what is learned from it.
        rate: learning rate.
        everyone: learned frames of all processes together.
        carry: frames of a chunk, if the network's state is carried from chunk to chunk; None: utterances are whole.
        done: share of the phase's audio that was heard before.

    Returns:
        the loss, a mean over learned frames, nat.
    """
    learner.pupil.train()
    learner.notes.clear()
    for group in learner.optimizer.param_groups:
        group["lr"] = rate
    if carry and batch:
        return _carried_steps(learner, batch, carry, lessons[batch.source], done)
    exchange = learner.exchange
    share = exchange.begin_step(batch.frames if batch else 0, everyone)
    if batch is None and not exchange.averages:
        exchange.end_step()
        return 0.0
    loss = _nothing(learner) if batch is None else _loss(learner, batch, lessons[batch.source], done)
    _update(learner, loss * share)
    return loss.item()


def batch_loss(seen: Seen, lesson: Lesson, frames: int, besides: dict[str, dict[str, Tensor]]) -> Tensor:
    """The weighted sum of a source's losses, each a mean over the batch's learned frames.

    Args:
        seen: what the network makes of the batch.
        lesson: what is learned from the source.
        frames: learned frames of the batch.
        besides: outputs of the modules beside the student, by kind.
    """
    # a 0 that depends on all of the student: a layer above all that is learned gets gradients of 0, as DDP expects
    loss = seen.logits.sum() * 0.0
    for kind in lesson.kinds:
        own = seen._replace(beside=besides.get(kind.name, {}))
        loss = loss + value_at(kind.weight, seen.done) * kind.loss(own) / frames
    return loss


def _loss(learner: Learner, batch: Batch, lesson: Lesson, done: float) -> Tensor:
    frames, here = batch.frames, batch.to(learner.ranks.device)
    with _precision(learner):
        outputs, besides = learner.exchange.network(here.features, here.lengths, lesson.source.drawn)
    if lesson.source.drawn:
        here.clean = besides[GENERATED][MADE]
    here, lesson = _answered(learner, here, lesson, done)
    logits, note = outputs.logits.float(), learner.notes.__setitem__
    seen = Seen(logits, outputs.lengths, here.learned, here.parts, outputs.hidden, {}, done, note)
    loss = batch_loss(seen, lesson, frames, besides)
    return loss + _touched(besides) if besides else loss


def _answered(learner: Learner, here: Batch, lesson: Lesson, done: float) -> tuple[Batch, Lesson]:
    """A batch on the learner's device with the answers of its teachers, if any answer in the step; and what is learned of it."""
    source = lesson.source
    if not lesson.answered:
        return here, lesson
    if any(
        name not in learner.teachers for name in source.teachers
    ):  # the first cycle, or a run that has shared nothing yet
        return here, lesson.unanswered
    with _precision(learner):
        said = answer(learner.teachers, here, lesson, done)
    if source.guard:
        spoken = (said["soft.units"].values[:, 0] != Units.blank).double().mean().item()
        if not learner.watches.setdefault(here.source, Watch()).allows(spoken, source.guard):
            return here, lesson.unanswered
    here.parts |= said
    prepare_answers(here, lesson.answered)
    return here, lesson


def _touched(besides: dict[str, dict[str, Tensor]]) -> Tensor:
    """A 0 that depends on all outputs beside the student: modules that a source does not use get gradients of 0."""
    return sum(value.float().sum() for said in besides.values() for value in said.values()) * torch.tensor(0.0)


def _nothing(learner: Learner) -> Tensor:
    """A loss of 0 that depends on every weight: the others wait for this process's gradient."""
    # two frames: what normalises over a batch refuses a single one
    frames = torch.zeros(1, 2, learner.settings.features.dimension, device=learner.ranks.device)
    outputs, besides = learner.exchange.network(frames, torch.tensor([2]))
    nothing: Tensor = outputs.logits.float().sum() * 0.0
    return nothing + _touched(besides) if besides else nothing


def _carried_steps(learner: Learner, batch: Batch, frames: int, lesson: Lesson, done: float) -> float:
    """Truncated backpropagation through time: the utterances of a batch chunk by chunk, the network's state carried over."""
    network, device = learner.pupil.student, learner.ranks.device
    (here, lesson), total = _answered(learner, batch.to(device), lesson, done), batch.frames
    lengths, inside = here.lengths.to(device), within(here.features, here.lengths)
    features = nn.functional.pad(here.features * inside[..., None], (0, 0, 0, network.lookahead_frames or 0))
    starts = (lengths.cumsum(0) - lengths)[:, None]
    state, answered, heard = None, -network.delay, 0.0
    for begin in range(0, features.shape[1], frames):
        with _precision(learner):
            logits, state = network.stream(features[:, begin : begin + frames], state)
        state = detached(state)
        frame = torch.arange(answered, answered + logits.shape[1], device=device)
        answered += logits.shape[1]
        learned = (frame >= 0) & (frame < lengths[:, None])
        if not learned.any():
            continue
        rows = (starts + frame)[learned]
        seen = Seen(logits.float(), here.lengths, learned, here.of_rows(rows), {}, {}, done)
        loss = batch_loss(seen, lesson, len(rows), {})
        _update(learner, loss)
        heard += loss.item() * len(rows)
    return heard / total


def _precision(learner: Learner) -> Any:
    asked, kind = learner.settings.precision, learner.ranks.device.type
    half = asked == "bfloat16" or (asked == "auto" and kind == "cuda")
    return torch.autocast(kind, torch.bfloat16) if half else nullcontext()


def _update(learner: Learner, loss: Tensor) -> None:
    learner.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    learner.exchange.average_gradients()
    # clipped separately: a large gradient beside the student must not shrink the student's step
    for part in learner.pupil.clipped:
        if weights := list(part.parameters()):
            norm = nn.utils.clip_grad_norm_(weights, learner.settings.clip)
            if part is learner.pupil.student:
                learner.gradient_norm = norm
    learner.optimizer.step()
    learner.exchange.end_step()


def follow(learner: Learner, steps: int) -> None:
    """Update the moving averages with the common weights, `steps` steps after their last update."""
    settings = learner.settings
    for average, decay in ((learner.average, settings.ema_decay), (learner.taught_by, settings.teacher_decay)):
        if average and decay is not None:
            average.multi_avg_fn = get_ema_multi_avg_fn(decay**steps)
            with learner.exchange.global_weights():
                average.update_parameters(learner.pupil)
