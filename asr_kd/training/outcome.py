"""The last words of a run: its result, and if it or a phase improved nothing, the likely reason."""

from __future__ import annotations

from typing import Any

from asr_kd.models.origin import figures
from asr_kd.summary import tell_summary
from asr_kd.training.averaging import Scored
from asr_kd.training.development import Development
from asr_kd.training.settings import TrainSettings
from asr_kd.training.step import Position


def concluded(position: Position, settings: TrainSettings, again: bool = False) -> str:
    """The last lines of a finished run, told for the summary too; `again`: it had finished before this command."""
    best = position.best
    assert best is not None
    steps, hours, wer = position.step, position.audio_seconds / 3600, best.wer
    tell_summary(
        settings.output, audio_hours=hours,
        figures={"steps": steps, "best_step": best.step, "development_wer": wer, "development_loss": best.loss},
    )  # fmt: skip
    line = f"{steps:,} steps over {hours:.1f} audio hours, best development WER {wer:.2%}"
    if again:
        line = f"already trained, {steps:,} steps, development WER {wer:.2%}"
    lost = run_lost(position, settings)
    return "\n".join(f"{settings.output}: {one}" for one in (line, lost) if one)


def said_of(position: Position, settings: TrainSettings, scores: Development) -> dict[str, Any]:
    """What a checkpoint records of its training: progress, scores, what it started from, the settings."""
    said = {
        "step": position.step,
        "audio_hours": position.audio_seconds / 3600,
        "development_wer": scores.wer,
        "development_loss": scores.loss,
        "development_substitutions": scores.substitutions,
        "development_deletions": scores.deletions,
        "development_insertions": scores.insertions,
        "blank_offset": scores.blank_offset,
        "settings": settings.model_dump(exclude={"log"}),
    }
    if settings.init and position.start:
        start = {"folder": settings.init, "wer": position.start.wer, "loss": position.start.loss}
        said["started_from"] = {**start, "won": position.step > 0}  # the start is scored before the first step
    return said


def run_lost(position: Position, settings: TrainSettings) -> str | None:
    """Sentences for a finished run whose best weights are those it started from; else None."""
    start, best, last = position.start, position.best, position.last
    if not (start and best and last) or best.step or not last.step:
        return None
    where = settings.init or "the fresh weights"
    if settings.init_layers:
        where = f"layers {', '.join(map(str, settings.init_layers))} of {where}"
    return (
        f"no checkpoint was better than {where}, where it started ({figures(start.wer, start.loss)}): best/ holds the "
        f"start. The last weights have {figures(last.wer, last.loss)}: {_reason(start, last, position.lowest, settings)}."
    )


def phase_lost(position: Position, settings: TrainSettings, phase: int) -> str | None:
    """A sentence for the end of a phase (of several) that did not improve the best weights; else None."""
    best, last = position.best, position.last
    several = len(settings.phases) * settings.cycles > 1
    if not (several and best and last) or best.step > position.phase_start or last.step <= position.phase_start:
        return None
    if position.finished and not best.step:
        return None  # the run has not either, and `run_lost` says so
    then = "best/ holds" if position.finished else "the next phase begins at"
    return (
        f"phase {phase + 1} of {len(settings.phases)} won nothing: its last weights, of step {last.step:,} "
        f"({figures(last.wer, last.loss)}), are thrown away, and {then} those of step {best.step:,} "
        f"({figures(best.wer, best.loss)})"
    )


def _reason(start: Scored, last: Scored, lowest: float, settings: TrainSettings) -> str:
    """The likely reason, judging by the scores, and what to try."""
    if lowest >= start.loss:
        fell = "though the WER fell, " if last.wer < start.wer else ""
        try_wer = ", or choose: wer" if fell and settings.choose != "wer" else ""
        return (
            f"{fell}the loss was never below the start's, so the learning rate may be too high or the targets worse than what "
            f"the start knows; try a lower learning_rate{try_wer}"
        )
    if last.loss >= start.loss:
        return f"the loss fell to {lowest:.3g} and rose again; try a lower learning_rate or fewer passes"
    rose = ""
    if last.deletions > start.deletions:
        rose = f" and deletions rose from {start.deletions:,} to {last.deletions:,}"
    others = {"wer": "choose: both, choose: loss", "both": "choose: loss", "loss": ""}[settings.choose]
    return f"the loss fell though the WER did not{rose}; try {others + ' or ' if others else ''}more passes"
