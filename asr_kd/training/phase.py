"""A phase of a run, step by step, from the run's present position."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict
from itertools import chain, repeat
from pathlib import Path

import torch
from torch import Tensor, nn

from asr_kd.ending import Status, Stopped
from asr_kd.errors import UserError
from asr_kd.progress import Progress
from asr_kd.training.averaging import remove_others
from asr_kd.training.batches import Lane, PhaseStream
from asr_kd.training.checkpoints import save_state
from asr_kd.training.codistillation import hear, share
from asr_kd.training.distributed import make_exchange
from asr_kd.training.distributed.exchange import Meeting
from asr_kd.training.distributed.ranks import Ranks, gather, total
from asr_kd.training.feed import ready_batches
from asr_kd.training.metrics import Metrics
from asr_kd.training.scoring import score
from asr_kd.training.settings import PhaseSettings, TrainSettings
from asr_kd.training.step import Learner, follow, step
from asr_kd.units import Units

#: seconds between checks that the run's folder still exists and belongs to this job
CHECK_SECONDS = 1.0


def begin_phase(learner: Learner, stream: PhaseStream, saved: dict[str, Tensor] | None) -> None:
    """Freeze the weights that the phase does not train, and set up the exchange (from its `saved` state) for the others."""
    where = f"{learner.settings.output}: phases.{stream.phase}.frozen"
    _freeze(learner.pupil.student, stream.plan, where)
    if not any(weight.requires_grad for weight in learner.pupil.parameters()):
        raise UserError(f"{where}: names all weights, and nothing is left to train; leave some out")
    traffic = learner.exchange.traffic
    learner.exchange = make_exchange(learner.pupil, learner.optimizer, learner.settings.distributed, learner.ranks)
    learner.exchange.traffic = traffic
    if saved:
        learner.exchange.load_state_dict(saved)


def _freeze(model: nn.Module, plan: PhaseSettings, where: str) -> None:
    """Freeze the weights whose names begin as `plan.frozen` says, and no others."""
    names = [name for name, _ in model.named_parameters()]
    for prefix in plan.frozen:
        if not any(name.startswith(prefix) for name in names):
            known = ", ".join(sorted({name.partition(".")[0] for name in names}))
            raise UserError(f"{where}: no weight begins with {prefix}; the network has {known}")
    for name, weight in model.named_parameters():
        weight.requires_grad_(not name.startswith(tuple(plan.frozen)))


def _learning_rate(plan: PhaseSettings, done: float) -> float:
    """Linear warm-up, then a cosine from the peak to its final share; `done` is the share of the phase's audio."""
    if done < plan.warmup:
        return plan.learning_rate * max(done / plan.warmup, 0.01)
    after = min(1.0, (done - plan.warmup) / max(1 - plan.warmup, 1e-9))
    return plan.learning_rate * (plan.final_rate + (1 - plan.final_rate) * (1 + math.cos(math.pi * after)) / 2)


def run_phase(
    learner: Learner, stream: PhaseStream, units: Units, metrics: Metrics, run: Path, stop_asked: Callable[[], int]
) -> None:
    """One phase, step by step, from the run's present position.

    Args:
        stop_asked: the signal that asked the run to stop; 0 if none did.

    Raises:
        UserError: when the loss is not finite, or too much of the data is unusable.
        Stopped: when the run was asked to stop; its state is saved.
    """
    settings, plan, ranks, position = learner.settings, stream.plan, learner.ranks, learner.position
    exchange, lanes = learner.exchange, position.lanes[stream.phase]
    title = f"train {run.name}, phase {stream.phase + 1} of {len(settings.phases)}"
    if settings.cycles > 1:
        title += f", cycle {position.cycle + 1} of {settings.cycles}"
    ready = ready_batches(stream, lanes, position.cycle, position.turn, ranks.rank, ranks.world)
    # the batch of each turn, and whether this process's stream has ended; it goes on without batches for the others
    turns = chain(((batch, False) for batch in ready), repeat((None, True)))
    carry = plan.chunks.frames if plan.chunks and plan.chunks.carry else None
    met = Meeting()
    heard, alone = 0.0, 0  # seconds of audio and steps since the last meeting
    with Progress(title, round(stream.seconds), "s of audio", ranks.first) as progress, closing(ready):
        progress.resume(round(position.phase_seconds))
        began = checked = time.monotonic()
        for batch, ended in turns:
            # before the meeting, which counts; several processes wait together, those whose stream has ended with the others
            if (batch or ranks.world > 1) and not hear(learner, plan, units, stop_asked, ended):
                raise _stopped(learner, metrics, run, stop_asked())
            done = (position.phase_seconds + heard * ranks.world) / max(stream.seconds, 1)
            rate = _learning_rate(plan, done)
            heard += batch.seconds if batch else 0.0
            if exchange.meets:
                met = exchange.meet(batch.frames if batch else 0, heard, not ended, bool(stop_asked()))
                if not met.going:
                    break
            position.turn = (position.turn + ranks.world) % settings.lanes
            if exchange.averages and not met.frames:  # the lanes of this turn have ended, others have not
                continue
            rate *= settings.cycle_decay**position.cycle
            loss = step(learner, batch, stream.lessons, rate, met.frames, carry, done)
            if batch:
                lanes[batch.lane] = batch.after
            position.step += 1
            alone += 1
            if batch and not math.isfinite(loss):  # before another run can hear of it
                raise UserError(
                    f"{settings.output}: the loss became {loss} at step {position.step - 1}; lower phases.{stream.phase}.learning_rate"
                )
            if not exchange.settled:
                continue
            follow(learner, alone)
            share(learner, units, run)
            position.audio_seconds += met.seconds
            position.phase_seconds += met.seconds
            heard, alone = 0.0, 0
            began, before = time.monotonic(), began
            if batch:
                said: dict[str, float] = {"bytes_sent": exchange.traffic.wire} if ranks.world > 1 else {}
                if len(stream.sources) > 1:
                    said["source"] = batch.source
                if watch := learner.watches.get(batch.source):
                    said["answers_left_out"] = round(watch.left_out)
                if chosen := stream.sources[batch.source].chosen:
                    said["utterances_left_out"] = chosen.left_out
                said |= {name: round(value.item(), 4) for name, value in learner.notes.items()}
                metrics.add(
                    position.step, phase=stream.phase, cycle=position.cycle, done=round(position.phase_seconds / max(stream.seconds, 1), 4),
                    audio_hours=round(position.audio_seconds / 3600, 4), loss=loss, learning_rate=rate,
                    gradient_norm=float(f"{float(learner.gradient_norm):.4g}"),
                    frames_per_second=round(met.seconds * 1000 / settings.features.frame_ms / max(began - before, 1e-9)),
                    padding=round(1 - batch.frames / batch.features.shape[:2].numel(), 4), **said,
                )  # fmt: skip
            progress.advance(round(met.seconds), met.seconds, f"loss {loss:.3f}")
            if began - checked > CHECK_SECONDS:
                learner.check()
                checked = began
            if position.step // settings.evaluate_every > position.scored // settings.evaluate_every:
                score(learner, units, metrics, run)
                save(learner, metrics, run)
                began = time.monotonic()
            if met.stop or (ranks.world == 1 and stop_asked()):  # a single process need not agree with others first
                raise _stopped(learner, metrics, run, stop_asked())
        exchange.settle()
        if alone:
            follow(learner, alone)
        position.audio_seconds += met.seconds
        position.phase_seconds += met.seconds
    _account(settings, ranks, stream, lanes)


def _stopped(learner: Learner, metrics: Metrics, run: Path, asked: int) -> Stopped:
    """Save the state, and say so; `asked` is the signal, 0 if another process of the run was asked."""
    save(learner, metrics, run)
    return Stopped(
        f"{learner.settings.output}: stopped at step {learner.position.step:,} as asked; the same command goes on from there",
        asked or Status.TERMINATED,
    )


def _account(settings: TrainSettings, ranks: Ranks, stream: PhaseStream, lanes: Sequence[Lane]) -> None:
    """Report the unusable utterances of a phase's sources; fail above `max_bad_share`, a sum over all processes."""
    for index, source in enumerate(stream.sources):
        own = range(ranks.rank, settings.lanes, ranks.world)
        cursors = [source.met.ends.get(lane, lanes[lane].cursors[index]) for lane in own]
        counts = torch.tensor([[one.seen, one.unused, one.incomplete] for one in cursors], dtype=torch.float64).sum(0)
        seen, unused, incomplete = map(int, total(counts, ranks).tolist())
        for bad in source.bad(seen, unused, incomplete):
            bad.refuse(source.plan.name, "fix the data")
            if bad.count and ranks.first:
                what = f"{bad.count} of {seen} utterances cannot be {bad.done} {bad.example}"
                print(f"{source.plan.name}: {what}", file=sys.stderr)


def save(learner: Learner, metrics: Metrics, run: Path) -> None:
    """Save the state to resume from, after the metrics up to it are on disk."""
    learner.check()
    metrics.flush()
    position, ranks = learner.position, learner.ranks
    for phase, lanes in enumerate(position.lanes):  # each process knows only its own lanes
        own = {str(lane): asdict(lanes[lane]) for lane in range(ranks.rank, len(lanes), ranks.world)}
        for said in gather(own, ranks):
            for lane, value in said.items():
                position.lanes[phase][int(lane)] = Lane.from_json(value)
    save_state(run, learner)
    if ranks.first:
        remove_others(run, position.kept)
