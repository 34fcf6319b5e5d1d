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

from asr_kd.config import PhaseSettings, TrainSettings
from asr_kd.decoding.greedy import greedy
from asr_kd.distillation.response import soft_cross_entropy
from asr_kd.distillation.spikes import find_spikes, spike_cross_entropy
from asr_kd.errors import UserError
from asr_kd.evaluation.wer import count_errors
from asr_kd.files import claim_folder, sha256_file, write_whole
from asr_kd.models.acoustic import (
    Checkpoint,
    build_model,
    infer,
    load_checkpoint,
    parameters,
    pick_device,
    save_checkpoint,
)
from asr_kd.progress import Progress
from asr_kd.shards.stream import ShardInput, batches_by_length, load_features
from asr_kd.shards.tarset import read_index
from asr_kd.targets.store import teacher_of
from asr_kd.training.batches import Batch, PhaseStream
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
    torch.set_num_threads(settings.threads)
    device = pick_device(settings.device)
    units = load_units(settings.units)
    run = Path(settings.output)
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
    with closing(metrics), _stop_requests() as stop_asked:
        if not resuming:  # the curve's first point, and an unfit development set is found before the work, not after it
            score(position)
            save(position)
        for phase, stream in list(enumerate(streams))[position.phase :]:
            _run_phase(settings, stream, model, optimizer, average, position, metrics, score, save, stop_asked)
            if position.step % settings.evaluate_every or not position.step:  # else it has just been scored
                score(position)
            position.phase, position.number, position.phase_seconds = phase + 1, 0, 0.0
            # The next phase goes on from the best weights, so that a phase can only help. They are in the saved state:
            # by the time it is read, `best` may be the next phase's.
            if phase + 1 < len(settings.phases):
                model.load_state_dict(load_checkpoint(run / "best", device).model.state_dict())
                if average:
                    average.n_averaged.zero_()  # so that the next step's weights begin a new average
            position.finished = phase + 1 == len(settings.phases)
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
    total = round(sum(stream.seconds) * plan.passes)
    with Progress(
        f"train {Path(settings.output).name}, phase {stream.phase + 1} of {len(settings.phases)}", total, "s of audio"
    ) as progress:
        progress.advance(round(position.phase_seconds))
        for number in range(position.number, plan.passes):
            for index, batch in enumerate(stream.batches(number)):
                if number == position.number and index < position.batches:
                    continue  # done before the interruption
                rate = _learning_rate(plan, position.phase_seconds / max(total, 1))
                began = time.monotonic()
                loss = step(model, optimizer, batch, plan, settings, rate, device)
                if average:
                    average.update_parameters(model)
                if not math.isfinite(loss):
                    raise UserError(
                        f"{settings.output}: the loss became {loss} at step {position.step}; lower phases.{stream.phase}.learning_rate"
                    )
                seconds = batch.seconds
                position.step += 1
                position.number, position.batches = number, index + 1
                position.audio_seconds += seconds
                position.phase_seconds += seconds
                metrics.add(
                    position.step, phase=stream.phase, **{"pass": round(position.phase_seconds / max(total, 1) * plan.passes, 3)}, audio_hours=round(position.audio_seconds / 3600, 4),
                    loss=loss, learning_rate=rate, frames_per_second=round(batch.frames / max(time.monotonic() - began, 1e-9)),
                )  # fmt: skip
                progress.advance(round(seconds), seconds, f"loss {loss:.3f}")
                if position.step % settings.evaluate_every == 0:
                    score(position)
                    save(position)
                if stop_asked():
                    save(position)
                    raise UserError(
                        f"{settings.output}: stopped at step {position.step:,} as asked; the same command goes on from there"
                    )
            if stream.unused and number == 0:
                key, reason = stream.unused[0]
                print(
                    f"left out {len(stream.unused)} of {stream.utterances} utterances (first: {key}: {reason})",
                    file=sys.stderr,
                )
            position.number, position.batches = number + 1, 0


def step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, plan: PhaseSettings, settings: TrainSettings, rate: float,
    device: torch.device,
) -> float:  # fmt: skip
    """One update; returns the loss, a mean over frames."""
    model.train()
    for group in optimizer.param_groups:
        group["lr"] = rate
    with torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext():
        logits, lengths = model(batch.features.to(device), batch.lengths)
    loss = batch_loss(logits.float(), lengths, batch, plan, settings)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
    optimizer.step()
    return loss.item()


def batch_loss(logits: Tensor, lengths: Tensor, batch: Batch, plan: PhaseSettings, settings: TrainSettings) -> Tensor:
    """The weighted sum of a source's losses, each a mean over the frames of the batch.

    Args:
        logits: float32 [batch, frames, units]; lengths: int64 [batch].
    """
    source, device = plan.sources[batch.source], logits.device
    loss = logits.new_zeros(())
    if source.ctc:
        assert batch.labels is not None and batch.label_lengths is not None
        log_probs = logits.log_softmax(-1)
        if source.ctc_within_targets:
            inside = log_probs.masked_fill(~_allowed(logits, lengths, batch), OUTSIDE)
            # torch's ctc_loss has the right gradient for a distribution only: normalise, and add the norm back
            log_probs = inside.log_softmax(-1)
            loss = loss - source.ctc * inside.logsumexp(-1)[_within(logits, lengths)].sum() / batch.frames
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
        assert batch.units is not None and batch.probs is not None and batch.tail is not None
        within = _within(logits, lengths)
        targets = batch.units.to(device), batch.probs.to(device), batch.tail.to(device)
        priors = (
            () if batch.priors is None or batch.prior is None else (batch.priors.to(device), batch.prior.to(device))
        )
        losses = soft_cross_entropy(logits[within], *targets, settings.missing_mass, *priors)
        weights = torch.where(targets[0][:, 0] == Units.blank, settings.blank_weight, 1.0)
        total = (losses * weights).sum()
        if source.spikes:
            spikes = find_spikes(batch.units, batch.probs, lengths.cpu(), source.spikes)
            total = (losses * weights)[spikes.outside(len(losses))].sum()
            total = total + spike_cross_entropy(logits[within], *targets[:2], spikes, source.spikes.temperature).sum()
        loss = loss + source.soft * total / weights.sum()
    return loss


def _within(logits: Tensor, lengths: Tensor) -> Tensor:
    """Bool [batch, frames]: which frames are not padding."""
    return torch.arange(logits.shape[1], device=logits.device)[None, :] < lengths.to(logits.device)[:, None]


def _allowed(logits: Tensor, lengths: Tensor, batch: Batch) -> Tensor:
    """Bool [batch, frames, units]: the blank, and the units that the targets hold at the frame."""
    assert batch.units is not None and batch.probs is not None
    held = logits.new_zeros(len(batch.units), logits.shape[2])
    held.scatter_add_(1, batch.units.to(logits.device), batch.probs.to(logits.device))
    allowed = torch.zeros_like(logits, dtype=torch.bool)
    allowed[_within(logits, lengths)] = held > 0
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
    for shard in read_index(Path(settings.development)):
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
    return {
        "units_hash": units.hash,
        "data": {folder: [shard.sha256 for shard in read_index(Path(folder))] for folder in audio},
        "texts": {source.transcripts: sha256_file(source.transcripts) for source in sources if source.transcripts},
        "teachers": {source.targets: teacher_of(Path(source.targets)) for source in sources if source.targets},
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
