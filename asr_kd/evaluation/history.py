"""What a training run left beside its checkpoint: its learning curve, and how much unlabelled audio it learned from."""

from __future__ import annotations

import json

from asr_kd.config.base import Several, folders_of
from asr_kd.errors import UserError
from asr_kd.evaluation.schema import CurvePoint
from asr_kd.files import Place, read_json
from asr_kd.shards.tarset import read_index


def learning_curve(folder: Place) -> list[CurvePoint]:
    """Development scores from the `metrics.jsonl` of a run folder (or of the run that a checkpoint lies in), torn lines left out."""
    path, points = _of_run(folder, "metrics.jsonl"), list[CurvePoint]()
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path else []:
        try:
            entry = json.loads(line)
            points.append(CurvePoint(**{key: float(entry[key]) for key in CurvePoint.model_fields}))
        except (ValueError, KeyError, TypeError):
            continue  # a line of training, one torn by a crash, or a score that is no finite number
    return points


def unlabelled_hours(folder: Place) -> float | None:
    """Hours of audio that a run learned from without the texts of its shards: from soft targets, or texts from elsewhere.

    Each set of shards counts once, however often it was read. None where the run's settings (`job.json`) or an index are
    not there any more, or the shards have changed since.
    """
    claim, hours = _of_run(folder, "job.json"), 0.0
    if claim is None:
        return None
    try:
        settings = read_json(claim)["settings"]
        unlabelled = {
            str(Several(folders_of(source["audio"]))): source["audio"]
            for phase in settings["phases"]
            for source in phase["sources"]
            if source["audio"] and (source.get("transcripts") is not None or not source.get("ctc"))
        }
        for name, audio in unlabelled.items():
            shards = read_index(audio)
            if shards.hash != settings["data"][name]:
                return None
            hours += sum(shard.seconds for shard in shards) / 3600
    except (UserError, KeyError, TypeError, AttributeError):
        return None
    return hours


def _of_run(folder: Place, name: str) -> Place | None:
    places = (folder, folder.parent) if folder.is_dir() else ()  # a teacher from outside may be no folder but a name
    return next((one / name for one in places if (one / name).is_file()), None)
