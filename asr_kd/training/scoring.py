"""Scoring on the development set, and the checkpoints kept for it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from asr_kd.distillation.knowledge import Pupil
from asr_kd.errors import UserError
from asr_kd.files import write_whole
from asr_kd.models.acoustic import Checkpoint, blank_held_back, load_checkpoint, save_checkpoint
from asr_kd.training.averaging import Scored, chosen, folder_of, mean_of
from asr_kd.training.development import Development, score_development
from asr_kd.training.metrics import Metrics
from asr_kd.training.outcome import said_of
from asr_kd.training.step import Learner
from asr_kd.units import Units

#: in a run's folder: the best checkpoint
BEST = "best"
#: beside the best checkpoint: weights of the modules trained beside the student, which the checkpoint does not hold
BESIDE = "beside.safetensors"
#: in a run's folder: the float weights of the best checkpoint, where that is quantised
LATENT = Path("last") / "latent.safetensors"


def score(learner: Learner, units: Units, metrics: Metrics, run: Path) -> None:
    """Score, and keep the checkpoint if it is the best so far. Rank 0 does it; the others block at the next collective.

    Args:
        learner: what is trained; its position takes the scores.
        units: of its output.
        metrics: take the scores too.
        run: folder of the run.

    Raises:
        UserError: when the development set is not labelled or cannot be read.
    """
    settings, position = learner.settings, learner.position
    position.scored = position.step
    if not learner.ranks.first:
        return
    with learner.exchange.global_weights():
        pupil: Any = learner.average.module if learner.average else learner.pupil
        scores, now = _try(learner, pupil, units, run)
        position.last = now
        if position.step:
            position.lowest = min(position.lowest, now.loss)
        if settings.average and position.step:  # before the first step the weights are not this run's work
            position.kept = chosen(settings.average, [*position.kept, now], settings.choose)
            if now in position.kept:
                _write(learner, pupil, units, folder_of(run, now), scores)
    said = {f"development_{name}": value for name, value in asdict(scores).items()}
    metrics.add(position.step, audio_hours=round(position.audio_seconds / 3600, 4), **said)


def score_mean(learner: Learner, units: Units, metrics: Metrics, run: Path) -> None:
    """Score the mean of the checkpoints kept for it.

    Args: see `score`.

    Raises:
        UserError: as `score`, and when a kept checkpoint is missing or damaged.
    """
    kept = learner.position.kept
    student = mean_of([folder_of(run, one) for one in kept]).to(learner.ranks.device)
    scores, _ = _try(learner, Pupil(student), units, run, averaged=[one.step for one in kept])
    metrics.add(learner.position.step, mean_wer=scores.wer, mean_loss=scores.loss)


def restore_best(learner: Learner, run: Path) -> None:
    """Load the weights of the best checkpoint into what is trained."""
    if learner.settings.model.bits:
        weights = _read(run / LATENT)
    else:
        weights = load_checkpoint(run / BEST, learner.ranks.device).model.state_dict()
    learner.pupil.student.load_state_dict(weights)
    if learner.pupil.beside:
        learner.pupil.beside.load_state_dict(_read(run / BEST / BESIDE))


def _read(file: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(file.read_bytes())
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: cannot be read ({error}); remove the run's folder and train again") from None


def _try(learner: Learner, pupil: Pupil, units: Units, run: Path, **made: Any) -> tuple[Development, Scored]:
    """Score weights, and keep them if they are the run's best; `made` is recorded in the checkpoint."""
    settings, position = learner.settings, learner.position
    scores = score_development(settings, Checkpoint(pupil.student, units, settings.features, settings.model, ""))
    now = Scored(position.step, scores.wer, scores.loss, scores.deletions, scores.insertions)
    position.start = position.start or now
    if position.best is None or now.rank(settings.choose) < position.best.rank(settings.choose):
        position.best = now
        _write(learner, pupil, units, run / BEST, scores, **made)
        if pupil.beside:
            with write_whole(run / BEST / BESIDE) as file:
                file.write(safetensors.torch.save(pupil.beside.state_dict()))
    return scores, now


def _write(learner: Learner, pupil: Pupil, units: Units, folder: Path, scores: Development, **made: Any) -> None:
    learner.check()
    settings, training = learner.settings, said_of(learner.position, learner.settings, scores) | made
    with blank_held_back(
        pupil.student, scores.blank_offset
    ):  # only in the checkpoint, not in the weights being trained
        save_checkpoint(folder, pupil.student, units, settings.features, settings.model, training)
        if settings.model.bits:
            # the one checkpoint of such a run is its best
            with write_whole(folder.parent / LATENT) as file:
                file.write(safetensors.torch.save(pupil.student.state_dict()))
