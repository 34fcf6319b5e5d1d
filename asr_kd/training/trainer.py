"""Job 2: one trainer for teachers and students. Read it from the top: `train` is the whole run."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from asr_kd.allocator import keep_freed_memory
from asr_kd.audio.blas import one_thread
from asr_kd.audio.features import versioned
from asr_kd.ending import Status, Stopped, stop_requests
from asr_kd.errors import UserError
from asr_kd.files import claim_folder, local
from asr_kd.models.acoustic import (
    Checkpoint,
    blank_held_back,
    build_model,
    load_checkpoint,
    parameters,
    pick_device,
    save_checkpoint,
)
from asr_kd.models.lstm import LstmModel
from asr_kd.progress import Progress
from asr_kd.shards.leases import sole_writer
from asr_kd.training.averaging import Scored, chosen, folder_of, mean_of, remove_others
from asr_kd.training.batches import Batch, Lane, PhaseStream
from asr_kd.training.checkpoints import STATE, Position, load_state, save_state
from asr_kd.training.development import Development, score_development
from asr_kd.training.distributed import make_exchange
from asr_kd.training.distributed.exchange import Exchange
from asr_kd.training.distributed.ranks import Ranks, gather, joined, total
from asr_kd.training.feed import ready_batches
from asr_kd.training.losses import batch_loss, soft_losses
from asr_kd.training.metrics import Metrics
from asr_kd.training.outcome import concluded, phase_lost, said_of
from asr_kd.training.provenance import provenance, start_from
from asr_kd.training.settings import PhaseSettings, TrainSettings
from asr_kd.training.texts import check_texts
from asr_kd.units import Units, load_units

#: seconds between looks whether the run's folder is still there and this job's own
CHECK_SECONDS = 1.0


@dataclass
class Learner:
    """A network in training, with all that a step changes.

    Attributes:
        average: of the weights, which is scored and kept in their place; None: the weights themselves.
        check: refuses to go on when the run's folder is gone or in the hands of another job.
        position: where the run stands; ranks: this process among those of the run.
    """

    settings: TrainSettings
    model: nn.Module
    optimizer: torch.optim.Optimizer
    exchange: Exchange
    average: AveragedModel | None = None
    check: Callable[[], None] = lambda: None
    ranks: Ranks = field(default_factory=Ranks)
    position: Position = field(default_factory=Position)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device


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
    model = build_model(settings.model, settings.features.dimension, units.size).to(ranks.device)
    if init:
        start_from(init, model, settings, units)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, betas=(0.9, 0.98), weight_decay=settings.weight_decay)
    learner = Learner(settings, model, optimizer, Exchange(model, ranks), check=check, ranks=ranks)
    if settings.ema_decay:
        learner.average = AveragedModel(model)
    torch.manual_seed(settings.seed + ranks.rank)  # the same weights, but dropout of its own
    saved = None
    if (run / STATE).exists():
        learner.position, saved = load_state(run, ranks, model, optimizer, learner.average)
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
        f"{run}: {settings.model.kind}, {parameters(model):,} parameters, {units.size} units, on {ranks.device}{several}",
    )
    with closing(metrics), stop_requests() as stop_asked:
        if (
            saved is None
        ):  # the curve's first point, and an unfit development set is found before the work, not after it
            position.lanes = [stream.start() for stream in streams]
            _score(learner, units, metrics, run)
            _save(learner, metrics, run)
        while not position.finished:
            stream = streams[position.phase]
            _begin_phase(learner, stream, saved)
            saved = None
            _run_phase(learner, stream, units, metrics, run, stop_asked)
            if position.step != position.scored:
                _score(learner, units, metrics, run)
            position.phase, position.turn, position.phase_seconds = position.phase + 1, 0, 0.0
            if position.phase == len(streams):
                position.phase, position.cycle = 0, position.cycle + 1
                position.finished = position.cycle == settings.cycles
                if position.finished and ranks.first and position.kept:
                    _score_mean(learner, units, metrics, run)
            if ranks.first and (lost := phase_lost(position, settings, stream.phase)):
                print(f"{run}: {lost}")
            position.phase_start = position.step
            # The next phase goes on from the best weights, so that a phase can only help. They are in the saved state:
            # by the time it is read, `best` may be the next phase's.
            if not position.finished:
                total(torch.zeros(1), ranks)  # the first process has written them
                model.load_state_dict(load_checkpoint(run / "best", ranks.device).model.state_dict())
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
    _freeze(learner.model, stream.plan, f"{learner.settings.output}: phases.{stream.phase}.frozen")
    traffic = learner.exchange.traffic
    learner.exchange = make_exchange(learner.model, learner.optimizer, learner.settings.distributed, learner.ranks)
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
    stop = False
    heard, alone = 0.0, 0  # audio and steps since the processes last met
    with Progress(title, round(stream.seconds), "s of audio", ranks.first) as progress, closing(ready):
        progress.resume(round(position.phase_seconds))
        began = checked = time.monotonic()
        for batch, ended in _turns(ready):
            rate = _learning_rate(plan, (position.phase_seconds + heard * ranks.world) / max(stream.seconds, 1))
            heard += batch.seconds if batch else 0.0
            if exchange.meets:
                frames = batch.frames if batch else 0
                said = torch.tensor([frames, heard, not ended, bool(stop_asked())], dtype=torch.float64)
                everyone = total(said, ranks).tolist()
                exchange.traffic.reduced += said.nbytes
                stop = everyone[3] > 0
                if not everyone[2]:
                    break
            position.turn = (position.turn + ranks.world) % settings.lanes
            if exchange.averages and not everyone[0]:  # these lanes have come to their end, others have not
                continue
            loss = step(learner, batch, plan, rate * settings.cycle_decay**position.cycle)
            if batch:
                lanes[batch.lane] = batch.after
            position.step += 1
            alone += 1
            if not exchange.settled:
                continue
            _average(learner, alone)
            position.audio_seconds += everyone[1]
            position.phase_seconds += everyone[1]
            heard, alone = 0.0, 0
            if batch and not math.isfinite(loss):
                raise UserError(
                    f"{settings.output}: the loss became {loss} at step {position.step - 1}; lower phases.{stream.phase}.learning_rate"
                )
            began, before = time.monotonic(), began
            if batch:
                metrics.add(
                    position.step, phase=stream.phase, cycle=position.cycle, done=round(position.phase_seconds / max(stream.seconds, 1), 4),
                    audio_hours=round(position.audio_seconds / 3600, 4), loss=loss, learning_rate=rate * settings.cycle_decay**position.cycle,
                    frames_per_second=round(everyone[1] * 1000 / settings.features.frame_ms / max(began - before, 1e-9)),
                    padding=round(1 - batch.frames / batch.features.shape[:2].numel(), 4), **_sent(exchange),
                )  # fmt: skip
            progress.advance(round(everyone[1]), everyone[1], f"loss {loss:.3f}")
            if began - checked > CHECK_SECONDS:
                learner.check()
                checked = began
            if position.step // settings.evaluate_every > position.scored // settings.evaluate_every:
                _score(learner, units, metrics, run)
                _save(learner, metrics, run)
                began = time.monotonic()
            if stop or (ranks.world == 1 and stop_asked()):  # alone, there is nobody to agree with first
                _save(learner, metrics, run)
                raise Stopped(
                    f"{settings.output}: stopped at step {position.step:,} as asked; the same command goes on from there",
                    stop_asked() or Status.TERMINATED,  # another process of the run was asked
                )
        exchange.settle()
        if alone:
            _average(learner, alone)
        position.audio_seconds += everyone[1]
        position.phase_seconds += everyone[1]
    _account(learner, stream)


def _average(learner: Learner, steps: int) -> None:
    """Take the common weights into the moving average; they are so many steps away from those that it took before."""
    if learner.average:
        learner.average.multi_avg_fn = get_ema_multi_avg_fn(learner.settings.ema_decay**steps)
        with learner.exchange.global_weights():
            learner.average.update_parameters(learner.model)


def _turns(ready: Iterator[Batch | None]) -> Iterator[tuple[Batch | None, bool]]:
    """What each turn brings, and whether the stream is over: others may not be."""
    for batch in ready:
        yield batch, False
    while True:
        yield None, True


def _sent(exchange: Exchange) -> dict[str, float]:
    """Bytes that this process has sent, where there are others."""
    return {"bytes_sent": exchange.traffic.wire} if exchange.ranks.world > 1 else {}


def _freeze(model: nn.Module, plan: PhaseSettings, where: str) -> None:
    """Let a phase learn all weights but those whose names begin as `frozen` says."""
    names = [name for name, _ in model.named_parameters()]
    for prefix in plan.frozen:
        if not any(name.startswith(prefix) for name in names):
            known = ", ".join(sorted({name.partition(".")[0] for name in names}))
            raise UserError(f"{where}: no weight begins with {prefix}; the network has {known}")
    for name, weight in model.named_parameters():
        weight.requires_grad_(not name.startswith(tuple(plan.frozen)))


def _account(learner: Learner, stream: PhaseStream) -> None:
    """Say what of a phase's sources could not be used, and refuse too much of it."""
    settings, ranks = learner.settings, learner.ranks
    for index, source in enumerate(stream.sources):
        own = range(ranks.rank, settings.lanes, ranks.world)
        lanes = learner.position.lanes[stream.phase]
        cursors = [source.ends.get(lane, lanes[lane].cursors[index]) for lane in own]
        counts = torch.tensor([[one.seen, one.unused, one.incomplete] for one in cursors], dtype=torch.float64).sum(0)
        seen, unused, incomplete = map(int, total(counts, ranks).tolist())
        for what, count, (key, reason) in (
            ("left out", unused, source.first_unused),
            ("without every teacher", incomplete, source.first_incomplete),
        ):
            example = f" (first: {key}: {reason})" if key else ""
            if what == "left out" and 0 < seen == count:
                raise UserError(f"{source.plan.audio}: none of {seen} utterances can be used{example}; fix the data")
            if count > settings.max_bad_share * seen:
                raise UserError(
                    f"{source.plan.audio}: {what}: {count} of {seen} utterances{example}, more than max_bad_share "
                    f"{settings.max_bad_share}; fix the data or raise max_bad_share"
                )
            if count:
                _say(ranks, f"{source.plan.audio}: {what}: {count} of {seen} utterances{example}")


def step(learner: Learner, batch: Batch | None, plan: PhaseSettings, rate: float) -> float:
    """One update, or with carried chunks one for each chunk; returns the loss, a mean over frames.

    Without a batch this process takes part in what the others do, and has nothing to say.
    """
    learner.model.train()
    for group in learner.optimizer.param_groups:
        group["lr"] = rate
    if plan.chunks and plan.chunks.carry and batch:
        return _carried_steps(learner, batch, plan.chunks.frames, plan)
    exchange = learner.exchange
    share = exchange.begin_step(batch.frames if batch else 0)
    if batch is None and not exchange.averages:
        exchange.end_step()
        return 0.0
    if batch is None:
        loss = _nothing(learner)
    else:
        with _precision(learner.settings, learner.device):
            logits, lengths = exchange.network(batch.features.to(learner.device), batch.lengths)
        loss = batch_loss(logits.float(), lengths, batch, plan, learner.settings)
    _update(learner, loss * share)
    return loss.item()


def _nothing(learner: Learner) -> Tensor:
    """A loss of 0 that every weight has a part in: the others wait for this process's gradient."""
    frames = torch.zeros(1, 1, learner.settings.features.dimension, device=learner.device)
    return learner.exchange.network(frames, torch.ones(1, dtype=torch.int64))[0].float().sum() * 0.0


def _carried_steps(learner: Learner, batch: Batch, frames: int, plan: PhaseSettings) -> float:
    """Truncated backpropagation through time: the utterances of a batch chunk by chunk, the network's state carried over."""
    network, device = learner.model, learner.device
    assert isinstance(network, LstmModel)  # the settings allow no other
    lengths = batch.lengths.to(device)
    longest = batch.features.shape[1]
    inside = torch.arange(longest, device=device) < lengths[:, None]
    features = nn.functional.pad(batch.features.to(device) * inside[..., None], (0, 0, 0, network.delay))
    starts = (lengths.cumsum(0) - lengths)[:, None]
    state = None
    heard = 0.0
    for begin in range(0, features.shape[1], frames):
        with _precision(learner.settings, device):
            logits, state = network.stream(features[:, begin : begin + frames], state)
        state = [(hidden.detach(), cell.detach()) for hidden, cell in state]
        frame = torch.arange(begin, begin + logits.shape[1], device=device) - network.delay
        learned = (frame >= 0) & (frame < lengths[:, None])
        if not learned.any():
            continue
        rows = (starts + frame)[learned]
        losses = soft_losses(logits.float()[learned], batch, learner.settings, rows)
        loss = plan.sources[batch.source].soft * losses.sum() / len(rows)
        _update(learner, loss)
        heard += loss.item() * len(rows)
    return heard / batch.frames


def _precision(settings: TrainSettings, device: torch.device) -> Any:
    half = settings.precision == "bfloat16" or (settings.precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16) if half else nullcontext()


def _update(learner: Learner, loss: Tensor) -> None:
    learner.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    learner.exchange.average_gradients()
    nn.utils.clip_grad_norm_(learner.model.parameters(), learner.settings.clip)
    learner.optimizer.step()
    learner.exchange.end_step()


def _learning_rate(plan: PhaseSettings, done: float) -> float:
    """Linear warm-up, then a cosine from the peak to its final share; `done` is the share of the phase's audio."""
    if done < plan.warmup:
        return plan.learning_rate * max(done / plan.warmup, 0.01)
    after = min(1.0, (done - plan.warmup) / max(1 - plan.warmup, 1e-9))
    return plan.learning_rate * (plan.final_rate + (1 - plan.final_rate) * (1 + math.cos(math.pi * after)) / 2)


def _score(learner: Learner, units: Units, metrics: Metrics, run: Path) -> None:
    """Score, and keep the checkpoint when it is the best so far; the first process does, the others wait when they next meet."""
    settings, position = learner.settings, learner.position
    position.scored = position.step
    if not learner.ranks.first:
        return
    with learner.exchange.global_weights():
        model = learner.average.module if learner.average else learner.model
        scores, now = _try(learner, model, units, run)
        position.last = now
        if position.step:
            position.lowest = min(position.lowest, now.loss)
        if settings.average and position.step:  # before the first step they are not of this run
            position.kept = chosen(settings.average, [*position.kept, now], settings.choose)
            if now in position.kept:
                _write(learner, model, units, folder_of(run, now), scores)
    said = {f"development_{name}": value for name, value in asdict(scores).items()}
    metrics.add(position.step, audio_hours=round(position.audio_seconds / 3600, 4), **said)


def _score_mean(learner: Learner, units: Units, metrics: Metrics, run: Path) -> None:
    """Score the mean of the checkpoints that are kept for it."""
    kept = learner.position.kept
    model = mean_of([folder_of(run, one) for one in kept]).to(learner.device)
    scores, _ = _try(learner, model, units, run, averaged=[one.step for one in kept])
    metrics.add(learner.position.step, mean_wer=scores.wer, mean_loss=scores.loss)


def _try(learner: Learner, model: nn.Module, units: Units, run: Path, **made: Any) -> tuple[Development, Scored]:
    """Score weights, and make them the run's best when they are; `made` says how they came about."""
    settings, position = learner.settings, learner.position
    scores = score_development(settings, Checkpoint(model, units, settings.features, settings.model, ""))
    now = Scored(position.step, scores.wer, scores.loss, scores.deletions, scores.insertions)
    position.start = position.start or now
    if position.best is None or now.rank(settings.choose) < position.best.rank(settings.choose):
        position.best = now
        _write(learner, model, units, run / "best", scores, **made)
    return scores, now


def _write(learner: Learner, model: nn.Module, units: Units, folder: Path, scores: Development, **made: Any) -> None:
    learner.check()
    settings, training = learner.settings, said_of(learner.position, learner.settings, scores) | made
    with blank_held_back(model, scores.blank_offset):  # in what is written alone: training goes on without
        save_checkpoint(folder, model, units, settings.features, settings.model, training)


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
    save_state(run, ranks, learner.model, learner.optimizer, position, learner.average, learner.exchange.state_dict())
    if ranks.first:
        remove_others(run, position.kept)
