"""Weights of several teachers by how well each did on development audio.

A teacher's weight is 1 / WER. That error rates should say whom to trust is from Gao, Parcollet and Lane (arXiv 2005.09310); the form is that of Bates
and Granger (*The combination of forecasts*, 1969), where a forecast counts by the inverse of its mean squared error, which is the best there is
where the errors are independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from asr_kd.distillation.settings import SourceSettings
from asr_kd.errors import UserError
from asr_kd.files import place, read_json
from asr_kd.models.acoustic import read_training
from asr_kd.models.origin import Score, score_of
from asr_kd.models.teachers import is_foreign
from asr_kd.targets.settings import DEVELOPMENT
from asr_kd.training.settings import TrainSettings

#: a lower WER counts as this one: a teacher without an error is not the only one that is heard
LOWEST = 0.001
#: in a folder of targets: what `label` says of them
REPORT = "report.json"


def with_weights(settings: TrainSettings) -> tuple[TrainSettings, list[str]]:
    """The settings with numbers in place of `combine.weights: development`, and a sentence about those of each source.

    Raises:
        UserError: when a teacher has no score, or two were scored on different audio.
    """
    phases, remarks = [], []
    for phase in settings.phases:
        sources = []
        for source in phase.sources:
            if source.combine.weights == DEVELOPMENT:
                source, remark = _weighed(source)
                remarks.append(remark)
            sources.append(source)
        phases.append(phase.model_copy(update={"sources": sources}))
    return (settings.model_copy(update={"phases": phases}) if remarks else settings), remarks


def weights_of(error_rates: Sequence[float]) -> list[float]:
    """Weights that add up to 1, each in proportion to 1 / WER."""
    inverse = [1 / max(one, LOWEST) for one in error_rates]
    return [one / sum(inverse) for one in inverse]


def _weighed(source: SourceSettings) -> tuple[SourceSettings, str]:
    scores = {name: _of_targets(name) for name in source.target_sets} or {
        name: _of_teacher(name) for name in source.teachers
    }
    (first, begin), *others = scores.items()
    if odd := next((name for name, score in others if score.audio != begin.audio), None):
        raise UserError(
            f"combine.weights: {first} was scored on {begin.audio} and {odd} on {scores[odd].audio}; score them on the same development "
            "audio, or give weights as numbers"
        )
    weights = weights_of([score.wer for score in scores.values()])
    named = zip(scores.items(), weights, strict=True)
    said = ", ".join(f"{weight:.3f} {name} (development WER {score.wer:.2%})" for (name, score), weight in named)
    combined = source.combine.model_copy(update={"weights": weights})
    return source.model_copy(update={"combine": combined}), f"{source.name}: weights of the teachers: {said}"


def _of_teacher(folder: str) -> Score:
    score = None if is_foreign(folder) else score_of(read_training(folder))
    if score is None:
        raise UserError(f"combine.weights: the checkpoint {folder} has no development WER; give weights as numbers")
    return score


def _of_targets(folder: str) -> Score:
    report = place(folder) / REPORT
    said: Any = read_json(report) if report.exists() else None
    match said:
        case {"teacher": {"development_wer": float(wer), "development": str(audio)}}:
            return Score(wer, audio)
    raise UserError(
        f"combine.weights: {report} does not say how the teacher of these targets did on development audio; run their `asr-kd label` again (it "
        "labels nothing twice) with a teacher that was trained here, or give weights as numbers"
    )
