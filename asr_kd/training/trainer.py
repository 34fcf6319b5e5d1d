"""Job 2: one trainer for teachers and students. Read it from the top: `train` is the whole run."""

from __future__ import annotations

import functools
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from asr_kd.audio.noise import noise_files
from asr_kd.config import PhaseSettings, TrainSettings
from asr_kd.decoding.greedy import greedy
from asr_kd.distillation.response import soft_cross_entropy
from asr_kd.distillation.spikes import find_spikes, spike_cross_entropy
from asr_kd.errors import UserError
from asr_kd.evaluation.wer import count_errors
from asr_kd.files import claim_folder, local, sha256_file, write_whole
from asr_kd.models.acoustic import (
    Checkpoint,
    build_model,
    infer,
    load_checkpoint,
    parameters,
    pick_device,
    save_checkpoint,
)
from asr_kd.models.lstm import LstmModel
from asr_kd.progress import Progress
from asr_kd.shards.stream import ShardInput, batches_by_length, load_features, read_ahead
from asr_kd.shards.tarset import read_index
from asr_kd.targets.store import teacher_of
from asr_kd.training.batches import Batch, Lane, PhaseStream
from asr_kd.training.checkpoints import Position, load_state, save_state
from asr_kd.training.sequence import expected_word_errors
from asr_kd.units import Units, load_units

STATE = "state.safetensors"
#: log-probability that CTC sees for a unit outside its targets: a path there is always worse, and never impossible
OUTSIDE = -30.0


def train(settings: TrainSettings) -> None:
    """Train an acoustic model through the phases of `settings`; run again after an interruption, it goes on.

    Writes into `settings.output`: `best/`, the checkpoint with the lowest WER on the development set;
    `last/state.safetensors`, from which an interrupted run resumes; `metrics.jsonl`; TensorBoard events.

    Raises:
        UserError: when settings, units, targets and audio do not fit each other, or too much of the data is unusable.
    """
    run = local(settings.output, "output")
    torch.set_num_threads(settings.threads)
    device = pick_device(settings.device)
    units = load_units(settings.units)
    torch.manual_seed(settings.seed)
    init = load_checkpoint(settings.init) if settings.init else None
    streams = [PhaseStream(settings, phase, units) for phase in range(len(settings.phases))]
    claim_folder(run, "train", {**settings.model_dump(), **_provenance(settings, units, init)})

    model = build_model(settings.model, settings.features.dimension, units.size).to(device)
    if init:
        _start_from(init, model, settings, units)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, betas=(0.9, 0.98), weight_decay=settings.weight_decay)
    average = None
    if settings.ema_decay:
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(settings.ema_decay))
    learner = Checkpoint(average.module if average else model, units, settings.features, settings.model, "")
    position = Position()
    resuming = (run / "last" / STATE).exists()
    if resuming:
        position = load_state(run / "last" / STATE, model, optimizer, average)
        if position.finished:
            print(f"{run}: already trained, {position.step:,} steps, development WER {position.best_wer:.2%}")
            return
        print(f"{run}: resuming at step {position.step:,}", file=sys.stderr)
    metrics = Metrics(run, position.step if resuming else -1, settings.tensorboard)
    score = functools.partial(_score, settings, learner, metrics, run)
    save = functools.partial(_save, run, model, optimizer, metrics, average)

    print(
        f"{run}: {settings.model.kind}, {parameters(model):,} parameters, {units.size} units, on {device}",
        file=sys.stderr,
    )
    if not position.lanes:
        position.lanes = [stream.start() for stream in streams]
    with closing(metrics), _stop_requests() as stop_asked:
        if not resuming:  # the curve's first point, and an unfit development set is found before the work, not after it
            score(position)
            save(position)
        while not position.finished:
            _run_phase(
                settings, streams[position.phase], model, optimizer, average, position, metrics, score, save, stop_asked
            )
            if position.step % settings.evaluate_every or not position.step:  # else it has just been scored
                score(position)
            position.phase, position.turn, position.phase_seconds = position.phase + 1, 0, 0.0
            if position.phase == len(streams):
                position.phase, position.cycle = 0, position.cycle + 1
                position.finished = position.cycle == settings.cycles
            # The next phase goes on from the best weights, so that a phase can only help. They are in the saved state:
            # by the time it is read, `best` may be the next phase's.
            if not position.finished:
                model.load_state_dict(load_checkpoint(run / "best", device).model.state_dict())
                if average:
                    average.n_averaged.zero_()  # so that the next step's weights begin a new average
            save(position)
    print(
        f"{run}: {position.step:,} steps over {position.audio_seconds / 3600:.1f} audio hours, best development WER {position.best_wer:.2%}"
    )


def _run_phase(
    settings: TrainSettings, stream: PhaseStream, model: nn.Module, optimizer: torch.optim.Optimizer, average: AveragedModel | None,
    position: Position, metrics: Metrics, score: Callable[[Position], None], save: Callable[[Position], None], stop_asked: Callable[[], bool],
) -> None:  # fmt: skip
    """The passes of one phase: step after step, from wherever `position` stands."""
    plan, device = stream.plan, next(model.parameters()).device
    _freeze(model, plan, f"{settings.output}: phases.{stream.phase}.frozen")
    lanes = position.lanes[stream.phase]
    title = f"train {Path(settings.output).name}, phase {stream.phase + 1} of {len(settings.phases)}"
    if settings.cycles > 1:
        title += f", cycle {position.cycle + 1} of {settings.cycles}"
    ready = read_ahead(stream.batches(lanes, position.cycle, position.turn), settings.ready_batches)
    with Progress(title, round(stream.seconds), "s of audio") as progress, closing(ready):
        progress.advance(round(position.phase_seconds))
        began = time.monotonic()
        for batch in ready:
            position.turn = (position.turn + 1) % settings.lanes
            if batch is None:  # this lane has come to its end, others have not
                continue
            done = position.phase_seconds / max(stream.seconds, 1)
            rate = _learning_rate(plan, done) * settings.cycle_decay**position.cycle
            loss = step(model, optimizer, batch, plan, settings, rate, device)
            if average:
                average.update_parameters(model)
            if not math.isfinite(loss):
                raise UserError(
                    f"{settings.output}: the loss became {loss} at step {position.step}; lower phases.{stream.phase}.learning_rate"
                )
            lanes[batch.lane] = batch.after
            position.step += 1
            position.audio_seconds += batch.seconds
            position.phase_seconds += batch.seconds
            began, before = time.monotonic(), began
            metrics.add(
                position.step, phase=stream.phase, cycle=position.cycle, done=round(position.phase_seconds / max(stream.seconds, 1), 4),
                audio_hours=round(position.audio_seconds / 3600, 4), loss=loss, learning_rate=rate,
                frames_per_second=round(batch.frames / max(began - before, 1e-9)), padding=round(1 - batch.frames / batch.features.shape[:2].numel(), 4),
            )  # fmt: skip
            progress.advance(round(batch.seconds), batch.seconds, f"loss {loss:.3f}")
            if position.step % settings.evaluate_every == 0:
                score(position)
                save(position)
                began = time.monotonic()
            if stop_asked():
                save(position)
                raise UserError(
                    f"{settings.output}: stopped at step {position.step:,} as asked; the same command goes on from there"
                )
    _account(settings, stream, lanes)


def _freeze(model: nn.Module, plan: PhaseSettings, where: str) -> None:
    """Let a phase learn all weights but those whose names begin as `frozen` says."""
    names = [name for name, _ in model.named_parameters()]
    for prefix in plan.frozen:
        if not any(name.startswith(prefix) for name in names):
            known = ", ".join(sorted({name.partition(".")[0] for name in names}))
            raise UserError(f"{where}: no weight begins with {prefix}; the network has {known}")
    for name, weight in model.named_parameters():
        weight.requires_grad_(not name.startswith(tuple(plan.frozen)))


def _account(settings: TrainSettings, stream: PhaseStream, lanes: list[Lane]) -> None:
    """Say what of a phase's sources could not be used, and refuse too much of it."""
    for index, source in enumerate(stream.sources):
        cursors = [source.ends.get(number, lane.cursors[index]) for number, lane in enumerate(lanes)]
        seen = sum(cursor.seen for cursor in cursors)
        for what, count, (key, reason) in (
            ("left out", sum(cursor.unused for cursor in cursors), source.first_unused),
            ("without every teacher", sum(cursor.incomplete for cursor in cursors), source.first_incomplete),
        ):
            example = f" (first: {key}: {reason})" if key else ""
            if count > settings.max_bad_share * seen:
                raise UserError(
                    f"{source.plan.audio}: {what}: {count} of {seen} utterances{example}, more than max_bad_share "
                    f"{settings.max_bad_share}; mend the data or raise max_bad_share"
                )
            if count:
                print(f"{source.plan.audio}: {what}: {count} of {seen} utterances{example}", file=sys.stderr)


def step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, plan: PhaseSettings, settings: TrainSettings, rate: float,
    device: torch.device,
) -> float:  # fmt: skip
    """One update, or with carried chunks one for each chunk; returns the loss, a mean over frames."""
    model.train()
    for group in optimizer.param_groups:
        group["lr"] = rate
    if plan.chunks and plan.chunks.carry:
        return _carried_steps(model, optimizer, batch, plan.chunks.frames, plan, settings, device)
    with _precision(device):
        logits, lengths = model(batch.features.to(device), batch.lengths)
    loss = batch_loss(logits.float(), lengths, batch, plan, settings)
    _update(model, optimizer, loss, settings)
    return loss.item()


def _carried_steps(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, frames: int, plan: PhaseSettings, settings: TrainSettings,
    device: torch.device,
) -> float:  # fmt: skip
    """Truncated backpropagation through time: the utterances of a batch chunk by chunk, the network's state carried over."""
    network: Any = getattr(model, "module", model)
    assert isinstance(network, LstmModel)  # the settings allow no other
    lengths = batch.lengths.to(device)
    longest = batch.features.shape[1]
    inside = torch.arange(longest, device=device) < lengths[:, None]
    features = nn.functional.pad(batch.features.to(device) * inside[..., None], (0, 0, 0, network.delay))
    starts = (lengths.cumsum(0) - lengths)[:, None]
    state = None
    total = 0.0
    for begin in range(0, features.shape[1], frames):
        with _precision(device):
            logits, state = network.stream(features[:, begin : begin + frames], state)
        state = [(hidden.detach(), cell.detach()) for hidden, cell in state]
        frame = torch.arange(begin, begin + logits.shape[1], device=device) - network.delay
        learned = (frame >= 0) & (frame < lengths[:, None])
        if not learned.any():
            continue
        rows = (starts + frame)[learned]
        losses = _soft_losses(logits.float()[learned], batch, settings, rows)
        loss = plan.sources[batch.source].soft * losses.sum() / len(rows)
        _update(model, optimizer, loss, settings)
        total += loss.item() * len(rows)
    return total / batch.frames


def _precision(device: torch.device) -> Any:
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def _update(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, settings: TrainSettings) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
    optimizer.step()


def batch_loss(logits: Tensor, lengths: Tensor, batch: Batch, plan: PhaseSettings, settings: TrainSettings) -> Tensor:
    """The weighted sum of a source's losses, each a mean over the frames of the batch.

    Args:
        logits: float32 [batch, frames, units]; lengths: int64 [batch].
    """
    source, device = plan.sources[batch.source], logits.device
    learned = _between(logits, batch.first, batch.last)
    loss = logits.new_zeros(())
    if source.ctc:
        assert batch.labels is not None and batch.label_lengths is not None
        log_probs = logits.log_softmax(-1)
        if source.ctc_within_targets:
            inside = log_probs.masked_fill(~_allowed(logits, learned, batch), OUTSIDE)
            # torch's ctc_loss has the right gradient for a distribution only: normalise, and add the norm back
            log_probs = inside.log_softmax(-1)
            loss = loss - source.ctc * inside.logsumexp(-1)[learned].sum() / batch.frames
        total = nn.functional.ctc_loss(
            log_probs.transpose(0, 1),
            batch.labels.to(device),
            lengths.to(device),
            batch.label_lengths.to(device),
            Units.blank,
            "sum",
        )
        loss = loss + source.ctc * total / batch.frames
    if source.mwer:
        assert batch.labels is not None and batch.label_lengths is not None and batch.spelling is not None
        errors = expected_word_errors(logits, lengths, batch.labels, batch.label_lengths, batch.spelling, source.mwer)
        loss = loss + errors.sum() / batch.frames
    if source.soft:
        rows = logits[learned]
        losses = _soft_losses(rows, batch, settings)
        total = losses.sum()
        if source.spikes:
            assert batch.units is not None and batch.probs is not None
            spikes = find_spikes(batch.units, batch.probs, batch.last - batch.first, source.spikes)
            targets = batch.units.to(device), batch.probs.to(device)
            total = losses[spikes.outside(len(losses))].sum()
            events = spike_cross_entropy(rows, *targets, spikes, source.spikes.temperature, source.spikes.certainty)
            total = total + events.sum()
        loss = loss + source.soft * total / batch.frames
    return loss


def _soft_losses(rows: Tensor, batch: Batch, settings: TrainSettings, places: Tensor | None = None) -> Tensor:
    """Weighted cross-entropy of each frame against its soft target.

    Args:
        rows: float32 [frames, units], logits of the batch's learned frames; or of some of them, by their int64 [frames] places.
    """
    values = (batch.units, batch.probs, batch.tail, batch.prior)
    units, probs, tail, prior = (
        None if one is None else one.to(rows.device) if places is None else one.to(rows.device)[places]
        for one in values
    )
    assert units is not None and probs is not None and tail is not None
    priors = None if batch.priors is None else batch.priors.to(rows.device)
    losses = soft_cross_entropy(rows, units, probs, tail, settings.missing_mass, priors, prior)
    return losses * torch.where(units[:, 0] == Units.blank, settings.blank_weight, 1.0)


def _between(logits: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """Bool [batch, frames]: which frames lie from `first` to before `last`, int64 [batch]."""
    frame = torch.arange(logits.shape[1], device=logits.device)[None, :]
    return (frame >= first.to(logits.device)[:, None]) & (frame < last.to(logits.device)[:, None])


def _allowed(logits: Tensor, learned: Tensor, batch: Batch) -> Tensor:
    """Bool [batch, frames, units]: the blank, and the units that the targets hold at the frame."""
    assert batch.units is not None and batch.probs is not None
    held = logits.new_zeros(len(batch.units), logits.shape[2])
    held.scatter_add_(1, batch.units.to(logits.device), batch.probs.to(logits.device))
    allowed = torch.zeros_like(logits, dtype=torch.bool)
    allowed[learned] = held > 0
    allowed[..., Units.blank] = True
    return allowed


def _learning_rate(plan: PhaseSettings, done: float) -> float:
    """Linear warm-up, then a cosine from the peak to its final share; `done` is the share of the phase's audio."""
    if done < plan.warmup:
        return plan.learning_rate * max(done / plan.warmup, 0.01)
    after = min(1.0, (done - plan.warmup) / max(1 - plan.warmup, 1e-9))
    return plan.learning_rate * (plan.final_rate + (1 - plan.final_rate) * (1 + math.cos(math.pi * after)) / 2)


@dataclass
class Development:
    """Scores on the development set."""

    wer: float
    loss: float


def score_development(settings: TrainSettings, learner: Checkpoint) -> Development:
    """WER by greedy decoding, and CTC loss a frame, on the development shards.

    Raises:
        UserError: when an utterance of the development set has no text or cannot be read.
    """
    learner.model.eval()
    errors = words = frames = 0
    loss = 0.0
    wanted = ShardInput(
        folder=settings.development,
        features=settings.features,
        max_seconds=settings.max_seconds,
        cache=settings.feature_cache,
    )
    for shard in read_index(settings.development):
        content = load_features(wanted, shard)
        if content.bad:
            raise UserError(
                f"{settings.development}: {content.bad[0][0]}: {content.bad[0][1]}; mend the development set"
            )
        for positions in batches_by_length([len(item.features) for item in content.items], 2 * settings.batch_frames):
            items = [content.items[index] for index in positions]
            for item, log_probs in zip(items, infer(learner, [item.features for item in items]), strict=True):
                if "text" not in item.fields:
                    raise UserError(
                        f"{settings.development}: {item.key} has no text; the development set must be labelled"
                    )
                counts = count_errors(item.fields["text"], learner.units.decode(greedy(log_probs)))
                errors += counts.substitutions + counts.deletions + counts.insertions
                words += counts.words
                ids = learner.units.encode(item.fields["text"])
                value = nn.functional.ctc_loss(
                    torch.from_numpy(log_probs), torch.tensor(ids), torch.tensor([len(log_probs)]), torch.tensor([len(ids)]),
                    Units.blank, "sum", zero_infinity=True,
                )  # fmt: skip
                loss += value.item()
                frames += len(log_probs)
    if not words:
        raise UserError(f"{settings.development}: holds no words; the development set must be labelled")
    return Development(errors / words, loss / frames)


def _score(settings: TrainSettings, learner: Checkpoint, metrics: Metrics, run: Path, position: Position) -> None:
    """Score, and keep the checkpoint when it is the best so far."""
    scores = score_development(settings, learner)
    # the lower CTC loss decides between equal WERs: early on all are 100 %
    if (scores.wer, scores.loss) < (position.best_wer, position.best_loss):
        position.best_wer, position.best_loss = scores.wer, scores.loss
        training = {
            "step": position.step,
            "audio_hours": position.audio_seconds / 3600,
            "development_wer": scores.wer,
            "settings": settings.model_dump(),
        }
        save_checkpoint(run / "best", learner.model, learner.units, settings.features, settings.model, training)
    metrics.add(
        position.step,
        audio_hours=round(position.audio_seconds / 3600, 4),
        development_wer=scores.wer,
        development_loss=scores.loss,
    )


def _save(
    run: Path, model: nn.Module, optimizer: torch.optim.Optimizer, metrics: Metrics, average: AveragedModel | None,
    position: Position,
) -> None:  # fmt: skip
    """Save the state to resume from, once the metrics that lead up to it are on the disk."""
    metrics.flush()
    save_state(run / "last" / STATE, model, optimizer, position, average)


def _provenance(settings: TrainSettings, units: Units, init: Checkpoint | None) -> dict[str, Any]:
    """What the run's data is, so that resuming on other data is refused."""
    sources = [source for phase in settings.phases for source in phase.sources]
    audio = sorted({settings.development, *(source.audio for source in sources)})
    noises = {source.augment.noise.folder for source in sources if source.augment.noise and source.augment.noise.folder}
    return {
        "units_hash": units.hash,
        "data": {folder: read_index(folder).hash for folder in audio},
        "texts": {source.transcripts: sha256_file(source.transcripts) for source in sources if source.transcripts},
        "noises": {folder: [str(path.relative_to(folder)) for path in noise_files(folder)] for folder in noises},
        "teachers": {folder: teacher_of(folder) for source in sources for folder in source.target_sets},
        "init_fingerprint": init and init.fingerprint,
    }


def _start_from(other: Checkpoint, model: nn.Module, settings: TrainSettings, units: Units) -> None:
    if other.units.hash != units.hash:
        raise UserError(
            f"init: {settings.init} has units {other.units.hash}, this run {units.hash}; start from a checkpoint with the same units"
        )
    if other.features != settings.features:
        raise UserError(f"init: {settings.init} was trained on other feature settings; use the same features")
    try:
        model.load_state_dict(other.model.state_dict())
    except RuntimeError:
        raise UserError(
            f"init: {settings.init} is another network than this run's model; use the same model settings"
        ) from None


class Metrics:
    """`metrics.jsonl` and TensorBoard events, cut back to `step` when a run resumes."""

    def __init__(self, run: Path, step: int, tensorboard: bool) -> None:
        self.path = run / "metrics.jsonl"
        kept = []
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    if json.loads(line)["step"] <= step:
                        kept.append(line)
                except (ValueError, KeyError, TypeError):
                    break  # torn by a crash: all that follows is newer than the state
        with write_whole(self.path, "w") as file:
            file.writelines(line + "\n" for line in kept)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
        self._writer: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def add(self, step: int, **values: float) -> None:
        """Write one line."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """Push lines to the disk, before a state that refers to them is saved."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """End the files."""
        self._file.close()
        if self._writer is not None:
            self._writer.close()


@contextmanager
def _stop_requests() -> Iterator[Callable[[], bool]]:
    """While open, SIGTERM and SIGINT ask for a stop after the present step instead of ending the process."""
    asked: list[int] = []
    before = {
        number: signal.signal(number, lambda got, _: asked.append(got)) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
