"""Job 2: one trainer for teachers and students. Read it from the top: `train` is the whole run."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from pathlib import Path

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from asr_kd.allocator import keep_freed_memory
from asr_kd.audio.blas import one_thread
from asr_kd.audio.features import versioned
from asr_kd.distillation.batch import Batch
from asr_kd.distillation.knowledge import Pupil
from asr_kd.ending import Status, Stopped, stop_requests
from asr_kd.errors import UserError
from asr_kd.files import claim_folder, local
from asr_kd.models.acoustic import Checkpoint, build_model, load_checkpoint, parameters, pick_device
from asr_kd.models.network import check_taps
from asr_kd.progress import Progress
from asr_kd.shards.leases import sole_writer
from asr_kd.training.accounts import account
from asr_kd.training.averaging import remove_others
from asr_kd.training.batches import Lane, PhaseStream
from asr_kd.training.checkpoints import STATE, load_state, save_state
from asr_kd.training.distributed import make_exchange
from asr_kd.training.distributed.exchange import Exchange, Meeting
from asr_kd.training.distributed.ranks import Ranks, gather, joined, total
from asr_kd.training.feed import ready_batches
from asr_kd.training.metrics import Metrics
from asr_kd.training.outcome import concluded, phase_lost
from asr_kd.training.provenance import provenance, start_from
from asr_kd.training.schedule import freeze, learning_rate
from asr_kd.training.scoring import restore_best, score, score_mean
from asr_kd.training.settings import TrainSettings
from asr_kd.training.step import Learner, follow, make_optimizer, step
from asr_kd.training.texts import check_texts
from asr_kd.units import Units, load_units

#: seconds between looks whether the run's folder is still there and this job's own
CHECK_SECONDS = 1.0


@one_thread()
def train(settings: TrainSettings) -> None:
    """Train an acoustic model through the phases of `settings`; run again after an interruption, it goes on.

    Writes into `settings.output`: `best/`, the checkpoint with the best score on the development set (`settings.choose`);
    `last/state.safetensors`, from which an interrupted run resumes; `scored/`, checkpoints to average (`settings.average`);
    `metrics.jsonl`; TensorBoard events. Started by `torchrun`, several processes train one network in it (`settings.distributed`).

    Raises:
        UserError: when settings, units, targets and audio do not fit each other, or too much of the data is unusable.
    """
    keep_freed_memory()
    torch.set_num_threads(settings.threads)
    with joined(pick_device(settings.device)) as ranks:
        _train(settings, ranks)


def _train(settings: TrainSettings, ranks: Ranks) -> None:
    run = local(settings.output, "output")
    if settings.lanes % ranks.world:
        raise UserError(
            f"lanes: {settings.lanes} is not a multiple of {ranks.world} processes; set lanes={ranks.world}"
        )
    if ranks.world > 1 and any(phase.chunks and phase.chunks.carry for phase in settings.phases):
        raise UserError("chunks.carry: takes another number of steps in each process; train in one, or leave carry out")
    units = load_units(settings.units)
    torch.manual_seed(settings.seed)
    init = load_checkpoint(settings.init) if settings.init else None
    streams = [PhaseStream(settings, phase, units) for phase in range(len(settings.phases))]
    for remark in check_texts(settings, units, [source for stream in streams for source in stream.sources]):
        _say(ranks, remark)
    claim = {**settings.model_dump(), "features": versioned(settings.features), **provenance(settings, units, init)}
    claim_folder(run, "train", claim)
    with sole_writer(run) if ranks.first else nullcontext(lambda: None) as check:  # the other ranks are of the same job
        _train_in(run, settings, ranks, units, init, streams, check)


def _train_in(
    run: Path,
    settings: TrainSettings,
    ranks: Ranks,
    units: Units,
    init: Checkpoint | None,
    streams: list[PhaseStream],
    check: Callable[[], None],
) -> None:
    """The run, in a folder that is this job's alone; `check` refuses to go on when it is not any more."""
    student = build_model(settings.model, settings.features.dimension, units.size).to(ranks.device)
    if init:
        start_from(init, student, settings, units)
    kinds = [one.kind for stream in streams for source in stream.knowledge for one in source]
    pupil = Pupil(student, kinds).to(ranks.device)
    check_taps(student, pupil.taps, str(run))
    optimizer = make_optimizer(pupil, settings)
    learner = Learner(settings, pupil, optimizer, Exchange(pupil, ranks), check=check, ranks=ranks)
    if settings.ema_decay:
        learner.average = AveragedModel(pupil)
    torch.manual_seed(settings.seed + ranks.rank)  # the same weights, but dropout of its own
    saved = None
    if (run / STATE).exists():
        learner.position, saved = load_state(run, ranks, pupil, optimizer, learner.average)
        if ranks.first:
            remove_others(run, learner.position.kept)
        if learner.position.finished:
            if ranks.first:
                print(concluded(learner.position, settings, again=True))
            return
        _say(ranks, f"{run}: resuming at step {learner.position.step:,}")
    position = learner.position
    metrics = Metrics(run, position.step if saved is not None else -1, settings.tensorboard, ranks.first)
    several = f", {ranks.world} processes" if ranks.world > 1 else ""
    _say(
        ranks,
        f"{run}: {settings.model.kind}, {parameters(student):,} parameters, {units.size} units, on {ranks.device}{several}",
    )
    with closing(metrics), stop_requests() as stop_asked:
        if (
            saved is None
        ):  # the curve's first point, and an unfit development set is found before the work, not after it
            position.lanes = [stream.start() for stream in streams]
            score(learner, units, metrics, run)
            _save(learner, metrics, run)
        while not position.finished:
            stream = streams[position.phase]
            _begin_phase(learner, stream, saved)
            saved = None
            _run_phase(learner, stream, units, metrics, run, stop_asked)
            if position.step != position.scored:
                score(learner, units, metrics, run)
            position.phase, position.turn, position.phase_seconds = position.phase + 1, 0, 0.0
            if position.phase == len(streams):
                position.phase, position.cycle = 0, position.cycle + 1
                position.finished = position.cycle == settings.cycles
                if position.finished and ranks.first and position.kept:
                    score_mean(learner, units, metrics, run)
            if ranks.first and (lost := phase_lost(position, settings, stream.phase)):
                print(f"{run}: {lost}")
            position.phase_start = position.step
            # The next phase goes on from the best weights, so that a phase can only help. They are in the saved state:
            # by the time it is read, `best` may be the next phase's.
            if not position.finished:
                total(torch.zeros(1), ranks)  # the first process has written them
                restore_best(learner, run)
                learner.exchange.restart()
                if learner.average:
                    learner.average.n_averaged.zero_()  # so that the next step's weights begin a new average
            _save(learner, metrics, run)
    if ranks.first:
        print(concluded(position, settings))


def _say(ranks: Ranks, text: str) -> None:
    if ranks.first:
        print(text, file=sys.stderr)


def _begin_phase(learner: Learner, stream: PhaseStream, saved: dict[str, Tensor] | None) -> None:
    """Freeze what the phase leaves alone, and let the processes exchange the rest."""
    freeze(learner.pupil.student, stream.plan, f"{learner.settings.output}: phases.{stream.phase}.frozen")
    traffic = learner.exchange.traffic
    learner.exchange = make_exchange(learner.pupil, learner.optimizer, learner.settings.distributed, learner.ranks)
    learner.exchange.traffic.add(traffic)
    if saved:
        learner.exchange.load_state_dict(saved)


def _run_phase(
    learner: Learner, stream: PhaseStream, units: Units, metrics: Metrics, run: Path, stop_asked: Callable[[], int]
) -> None:
    """One phase, step after step, from wherever the run stands."""
    settings, plan, ranks, position = learner.settings, stream.plan, learner.ranks, learner.position
    exchange, lanes = learner.exchange, position.lanes[stream.phase]
    title = f"train {run.name}, phase {stream.phase + 1} of {len(settings.phases)}"
    if settings.cycles > 1:
        title += f", cycle {position.cycle + 1} of {settings.cycles}"
    ready = ready_batches(stream, lanes, position.cycle, position.turn, ranks.rank, ranks.world)
    carry = plan.chunks.frames if plan.chunks and plan.chunks.carry else None
    met = Meeting()
    heard, alone = 0.0, 0  # audio and steps since the processes last met
    with Progress(title, round(stream.seconds), "s of audio", ranks.first) as progress, closing(ready):
        progress.resume(round(position.phase_seconds))
        began = checked = time.monotonic()
        for batch, ended in _turns(ready):
            rate = learning_rate(plan, (position.phase_seconds + heard * ranks.world) / max(stream.seconds, 1))
            heard += batch.seconds if batch else 0.0
            if exchange.meets:
                met = exchange.meet(batch.frames if batch else 0, heard, not ended, bool(stop_asked()))
                if not met.going:
                    break
            position.turn = (position.turn + ranks.world) % settings.lanes
            if exchange.averages and not met.frames:  # these lanes have come to their end, others have not
                continue
            rate *= settings.cycle_decay**position.cycle
            loss = step(learner, batch, stream.knowledge, rate, met.frames, carry)
            if batch:
                lanes[batch.lane] = batch.after
            position.step += 1
            alone += 1
            if not exchange.settled:
                continue
            follow(learner, alone)
            position.audio_seconds += met.seconds
            position.phase_seconds += met.seconds
            heard, alone = 0.0, 0
            if batch and not math.isfinite(loss):
                raise UserError(
                    f"{settings.output}: the loss became {loss} at step {position.step - 1}; lower phases.{stream.phase}.learning_rate"
                )
            began, before = time.monotonic(), began
            if batch:
                metrics.add(
                    position.step, phase=stream.phase, cycle=position.cycle, done=round(position.phase_seconds / max(stream.seconds, 1), 4),
                    audio_hours=round(position.audio_seconds / 3600, 4), loss=loss, learning_rate=rate,
                    frames_per_second=round(met.seconds * 1000 / settings.features.frame_ms / max(began - before, 1e-9)),
                    padding=round(1 - batch.frames / batch.features.shape[:2].numel(), 4), **_sent(exchange),
                )  # fmt: skip
            progress.advance(round(met.seconds), met.seconds, f"loss {loss:.3f}")
            if began - checked > CHECK_SECONDS:
                learner.check()
                checked = began
            if position.step // settings.evaluate_every > position.scored // settings.evaluate_every:
                score(learner, units, metrics, run)
                _save(learner, metrics, run)
                began = time.monotonic()
            if met.stop or (ranks.world == 1 and stop_asked()):  # alone, there is nobody to agree with first
                _save(learner, metrics, run)
                raise Stopped(
                    f"{settings.output}: stopped at step {position.step:,} as asked; the same command goes on from there",
                    stop_asked() or Status.TERMINATED,  # another process of the run was asked
                )
        exchange.settle()
        if alone:
            follow(learner, alone)
        position.audio_seconds += met.seconds
        position.phase_seconds += met.seconds
    account(settings, ranks, stream, lanes)


def _turns(ready: Iterator[Batch | None]) -> Iterator[tuple[Batch | None, bool]]:
    """What each turn brings, and whether the stream is over: others may not be."""
    for batch in ready:
        yield batch, False
    while True:
        yield None, True


def _sent(exchange: Exchange) -> dict[str, float]:
    """Bytes that this process has sent, where there are others."""
    return {"bytes_sent": exchange.traffic.wire} if exchange.ranks.world > 1 else {}


def _save(learner: Learner, metrics: Metrics, run: Path) -> None:
    """Save the state to resume from, once the metrics that lead up to it are on the disk."""
    learner.check()
    metrics.flush()
    position, ranks = learner.position, learner.ranks
    for phase, lanes in enumerate(position.lanes):  # each process knows of its own
        own = {str(lane): lanes[lane].to_json() for lane in range(ranks.rank, len(lanes), ranks.world)}
        for said in gather(own, ranks):
            for lane, value in said.items():
                position.lanes[phase][int(lane)] = Lane.from_json(value)
    save_state(run, ranks, learner.pupil, learner.optimizer, position, learner.average, learner.exchange.state_dict())
    if ranks.first:
        remove_others(run, position.kept)
