"""Job 3: checkpoints over labelled shards → WER report. Read it from the top: `evaluate` is the whole job."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from asr_kd.config import EvalSettings
from asr_kd.errors import UserError
from asr_kd.evaluation.bootstrap import CONFIDENCE, interval, resampled_errors
from asr_kd.evaluation.parts import Shard, read_part
from asr_kd.evaluation.report import FORMAT, VERSION, system_table, verdict, write_report
from asr_kd.evaluation.score import System
from asr_kd.evaluation.sharing import DECIDING, Work, refuse_bad, score_all
from asr_kd.evaluation.tally import Tally, most_frequent
from asr_kd.evaluation.text import NORMALIZERS
from asr_kd.evaluation.wer import ErrorCounts, align
from asr_kd.files import Place, claim_folder, hash_json, place, write_whole
from asr_kd.models.acoustic import load_checkpoint, parameters, pick_device
from asr_kd.shards.index import ShardList
from asr_kd.shards.tarset import read_index


@dataclass
class TestSet:
    """What the parts say of all systems together."""

    words: list[int] = field(default_factory=list)
    speakers: list[str | None] = field(default_factory=list)
    audio_seconds: float = 0.0
    quarantined: int = 0


@dataclass
class Scored:
    """A system, and what the parts say of it."""

    system: System
    costs: dict[str, Any]
    tally: Tally = field(default_factory=Tally)
    same_as_teacher: int = 0


def evaluate(settings: EvalSettings) -> None:
    """Decode the shards with every system and write the WER report.

    Writes into `settings.output`, each file whole: `parts/`, the scores of each shard, and in the end `report.json`,
    `report.html`, `report.md`, `utterances.jsonl`, `quarantine.jsonl`. All systems are scored on the same utterances: one
    that a system's front end cannot read is left out for all.

    Raises:
        UserError: when a name, a checkpoint or the shards are wrong, an utterance has no text, or more than
            `max_bad_share` of the utterances could not be read.
    """
    torch.set_num_threads(settings.threads)
    for role in ("baseline", "teacher", "student"):
        name = getattr(settings, role)
        if name is not None and name not in settings.systems:
            raise UserError(f"{role}: {name} is none of the systems; it must be one of {', '.join(settings.systems)}")
    sets = {name: (folder, read_index(folder)) for name, folder in settings.sets.items()}
    for folder, infos in sets.values():
        if not infos.samples:
            raise UserError(f"{folder}: holds no utterances; prepare labelled audio shards")
    device = pick_device(settings.device)
    if device == torch.device("cuda"):  # started by torchrun, each process takes the GPU of its place
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    systems = [System(name, place(path), load_checkpoint(path, device)) for name, path in settings.systems.items()]
    output = place(settings.output)
    shards = [Shard(name, folder, info) for name, (folder, infos) in sets.items() for info in infos]
    # what is made of the scores may change, but not what decides them; a checkpoint or audio that changed is scored again
    claim_folder(output, "eval", settings.model_dump(include={"systems", "audio", *DECIDING}))
    costs = score_all(Work(settings, systems, shards, output))
    scored = {system.name: Scored(system, costs[system.name]) for system in systems}
    test = _sum_up(settings, shards, scored, output)
    report = _report(settings, [infos for _, infos in sets.values()], list(scored.values()), test, device)
    write_report(output, report)
    print(system_table(report))
    print(f"\n{report['verdict']}\n{output / 'report.html'}")


def _sum_up(settings: EvalSettings, shards: Iterable[Shard], scored: dict[str, Scored], output: Place) -> TestSet:
    """Add up the parts in order, and write utterances.jsonl and quarantine.jsonl."""
    test, first = TestSet(), next(iter(scored))
    bad: tuple[Shard, tuple[str, str]] | None = None
    with (
        write_whole(output / "utterances.jsonl") as lines,
        write_whole(output / "quarantine.jsonl", "w") as quarantine,
    ):
        for shard in shards:
            part = read_part(shard.part(output))
            for key, reason in part.quarantined.items():
                bad = bad or (shard, (key, reason))
                entry = {"key": key, "set": shard.set, "shard": shard.info.name, "reason": reason}
                quarantine.write(json.dumps(entry, ensure_ascii=False) + "\n")
            lines.write(part.body)
            test.quarantined += len(part.quarantined)
            test.audio_seconds += part.seconds
            for line in part.lines:
                if line["system"] == first:
                    test.words.append(line["words"])
                    test.speakers.append(line["speaker"])
                one = scored[line["system"]]
                one.tally.add(line["key"], line["speaker"], align(line["reference_scored"], line["hypothesis_scored"]))
                one.same_as_teacher += bool(line["same_as_teacher"])
        # raised inside: nothing is published
        total = len(test.words) + test.quarantined
        if bad:
            refuse_bad(settings, test.quarantined, total, *bad)
        if not sum(test.words):
            raise UserError(f"{', '.join(settings.sets.values())}: the texts hold no words; a WER needs labelled audio")
    return test


def _report(
    settings: EvalSettings, sets: list[ShardList], systems: list[Scored], test: TestSet, device: torch.device
) -> dict[str, Any]:
    """Everything that the report shows, as one JSON value; README.md describes it."""
    labels, blocks = _blocks(test.speakers)
    sums = np.zeros((len(systems), blocks), np.int64)
    for row, system in zip(sums, systems, strict=True):
        np.add.at(row, labels, system.tally.errors)
    words = np.bincount(labels, weights=test.words, minlength=blocks).astype(np.int64)
    errors, drawn = resampled_errors(sums, words, settings.bootstrap, settings.seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        samples = dict(zip(settings.systems, errors / drawn, strict=True))
    by_name = {system.system.name: system for system in systems}
    report = {
        "format": FORMAT,
        "version": VERSION,
        "verdict": "",
        "baseline": settings.baseline,
        "teacher": settings.teacher,
        "student": settings.student,
        "normalizer": NORMALIZERS[settings.normalizer].name,
        "data": {
            "audio": ", ".join(settings.sets.values()),
            "hash": hash_json([shard.sha256 for shards in sets for shard in shards]),
            "shards": sum(map(len, sets)),
            "utterances": len(test.words),
            "quarantined": test.quarantined,
            "words": sum(test.words),
            "seconds": round(test.audio_seconds, 3),
            "speakers": len(set(test.speakers)) if None not in test.speakers else None,
        },
        "bootstrap": {
            "resamples": settings.bootstrap,
            "confidence": CONFIDENCE,
            "blocks": "utterances" if blocks == len(test.words) else "speakers",
            "number": blocks,
        },
        "systems": {name: _system(settings, system, by_name, samples, test) for name, system in by_name.items()},
        "settings": settings.model_dump(),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("asr-kd", "torch", "numpy", "jiwer")},
        },
        "device": str(device) if device.type == "cpu" else torch.cuda.get_device_name(device),
    }
    report["verdict"] = verdict(report)
    return report


def _blocks(speakers: list[str | None]) -> tuple[np.ndarray, int]:
    """The bootstrap block of each utterance, and how many there are: speakers where all are known, else utterances."""
    known = list(dict.fromkeys(speakers))
    if None in known or len(known) < 2:
        return np.arange(len(speakers)), len(speakers)
    number = {speaker: index for index, speaker in enumerate(known)}
    return np.array([number[speaker] for speaker in speakers]), len(known)


def _system(
    settings: EvalSettings, system: Scored, systems: dict[str, Scored], samples: dict[str, np.ndarray], test: TestSet
) -> dict[str, Any]:
    name, checkpoint = system.system.name, system.system.checkpoint
    counts, utterances = system.tally.counts, len(test.words)
    weights = checkpoint.model.state_dict().values()
    factors = {one: _real_time_factor(other) for one, other in systems.items()}
    teacher = settings.teacher
    return {
        "wer": counts.rate,
        "interval": interval(samples[name]),
        **_counts(counts),
        "utterances": utterances,
        "sentence_errors": system.tally.sentence_errors,
        "parameters": parameters(checkpoint.model),
        "size_bytes": sum(weight.numel() * weight.element_size() for weight in weights),
        "frame_ms": checkpoint.frame_ms,
        "lookahead_ms": checkpoint.lookahead_ms,
        "real_time_factor": factors[name],
        "real_time_factor_to_teacher": factors[name] / factors[teacher] if teacher else None,
        "decoder_real_time_factor": _share(system, "decoder_seconds"),
        "peak_memory_bytes": system.costs["peak_memory_bytes"],
        "peak_device_bytes": system.costs["peak_device_bytes"],
        **_relative("baseline", settings.baseline, name, systems, samples),
        **_relative("teacher", teacher, name, systems, samples),
        **_gap(settings, name, systems, samples),
        "agreement_with_teacher": system.same_as_teacher / utterances if teacher else None,
        "checkpoint": str(system.system.folder),
        "fingerprint": checkpoint.fingerprint,
        "units_hash": checkpoint.units.hash,
        "units": checkpoint.units.size,
        "model": checkpoint.settings.model_dump(),
        "features": checkpoint.features.model_dump(),
        "speakers": {
            speaker: {"wer": _finite(one.rate), **_counts(one)}
            for speaker, one in sorted(system.tally.speakers.items())
        },
        "confusions": {
            "substitutions": most_frequent(system.tally.substitutions),
            "deletions": most_frequent(system.tally.deletions),
            "insertions": most_frequent(system.tally.insertions),
        },
        "worst": [
            {
                "key": one.key,
                "speaker": one.speaker,
                **_counts(one.counts),
                "alignment": [[edit.kind, edit.reference, edit.hypothesis] for edit in one.edits],
            }
            for one in system.tally.worst_first()
        ],
        "curve": learning_curve(system.system.folder),
    }


def _counts(counts: ErrorCounts) -> dict[str, int]:
    return {
        "words": counts.words,
        "errors": counts.errors,
        "substitutions": counts.substitutions,
        "deletions": counts.deletions,
        "insertions": counts.insertions,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _real_time_factor(system: Scored) -> float:
    """Seconds of work of the front end and the network for a second of audio."""
    return _share(system, "frontend_seconds") + _share(system, "network_seconds")


def _share(system: Scored, what: str) -> float:
    return system.costs[what] / system.costs["seconds"]


def _relative(
    role: str, other: str | None, name: str, systems: dict[str, Scored], samples: dict[str, np.ndarray]
) -> dict[str, Any]:
    """Relative WER change against the system in that role; null without one, for itself, and where it has no error."""
    key = f"relative_change_to_{role}"
    if other is None or other == name or not systems[other].tally.counts.errors:
        return {key: None, f"{key}_interval": None}
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn = samples[name] / samples[other] - 1
    change = systems[name].tally.counts.rate / systems[other].tally.counts.rate - 1
    return {key: change, f"{key}_interval": interval(drawn)}


def _gap(
    settings: EvalSettings, name: str, systems: dict[str, Scored], samples: dict[str, np.ndarray]
) -> dict[str, Any]:
    """Share of the WER gap between baseline and teacher that a system recovers; null where there is no gap."""
    nothing = {"gap_recovered": None, "gap_recovered_interval": None}
    baseline, teacher = settings.baseline, settings.teacher
    if baseline is None or teacher is None or name in (baseline, teacher):
        return nothing
    rate = {one: systems[one].tally.counts.rate for one in (baseline, teacher, name)}
    if rate[baseline] <= rate[teacher]:
        return nothing
    gap = samples[baseline] - samples[teacher]
    with np.errstate(divide="ignore", invalid="ignore"):
        # where the gap itself may be nought the share of it has no interval
        drawn = np.where(gap > 0, (samples[baseline] - samples[name]) / gap, np.nan)
    share = (rate[baseline] - rate[name]) / (rate[baseline] - rate[teacher])
    return {"gap_recovered": share, "gap_recovered_interval": interval(drawn)}


def learning_curve(folder: Place) -> list[dict[str, float]]:
    """Development scores from the `metrics.jsonl` of a run folder (or of the run that a checkpoint lies in).

    Returns:
        step, audio_hours and development_wer of each score; empty where nothing was logged. Torn lines are passed over.
    """
    places = [place / "metrics.jsonl" for place in (folder, folder.parent)]
    path = next((place for place in places if place.is_file()), None)
    points = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path else []:
        try:
            entry = json.loads(line)
            point = {key: float(entry[key]) for key in ("step", "audio_hours", "development_wer")}
        except (ValueError, KeyError, TypeError):
            continue  # a line of training, or one torn by a crash
        if all(map(math.isfinite, point.values())):
            points.append(point)
    return points
