"""Job 3: checkpoints over labelled shards → WER report. Read it from the top: `evaluate` is the whole job."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import time
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np
import torch

from asr_kd.audio.decode import decode
from asr_kd.audio.features import Frontend
from asr_kd.config import EvalSettings
from asr_kd.decoding.decoder import make_decoder
from asr_kd.errors import AudioError, UserError
from asr_kd.evaluation.bootstrap import CONFIDENCE, interval, resampled_errors
from asr_kd.evaluation.report import FORMAT, VERSION, system_table, verdict, write_report
from asr_kd.evaluation.tally import Tally, most_frequent
from asr_kd.evaluation.text import NORMALIZERS
from asr_kd.evaluation.wer import ErrorCounts, align
from asr_kd.files import Place, claim_folder, hash_json, place, write_whole
from asr_kd.models.acoustic import Checkpoint, infer, load_checkpoint, parameters, pick_device
from asr_kd.progress import Progress
from asr_kd.shards.index import ShardInfo, ShardList
from asr_kd.shards.stream import batches_by_length
from asr_kd.shards.tarset import read_checked, read_index


@dataclass
class System:
    """A checkpoint under test and what was measured of it."""

    name: str
    folder: Place
    checkpoint: Checkpoint
    tally: Tally = field(default_factory=Tally)
    network_seconds: float = 0.0
    decoder_seconds: float = 0.0
    same_as_teacher: int = 0

    @property
    def frontend(self) -> str:
        """Name of its feature settings: systems with the same share one computation."""
        return hash_json(self.checkpoint.features.model_dump())


@dataclass
class TestSet:
    """What was read of the shards."""

    references: list[str] = field(default_factory=list)  # of the present shard only
    words: list[int] = field(default_factory=list)
    speakers: list[str | None] = field(default_factory=list)
    audio_seconds: float = 0.0
    frontend_seconds: dict[str, float] = field(default_factory=dict)
    bad: list[tuple[str, str, str]] = field(default_factory=list)  # key, shard, reason


@dataclass
class Utterance:
    """A test utterance: features float16 [frames, inputs] for each front end, its text, its speaker."""

    key: str
    features: dict[str, np.ndarray]
    text: str
    speaker: str | None


def evaluate(settings: EvalSettings) -> None:
    """Decode the shards with every system and write the WER report.

    Writes into `settings.output`, each file whole: `report.json`, `report.html`, `report.md`, `utterances.jsonl`,
    `quarantine.jsonl`. All systems are scored on the same utterances: one that a system's front end cannot read is
    left out for all.

    Raises:
        UserError: when a name, a checkpoint or the shards are wrong, an utterance has no text, or more than
            `max_bad_share` of the utterances could not be read.
    """
    torch.set_num_threads(settings.threads)
    for role in ("baseline", "teacher", "student"):
        name = getattr(settings, role)
        if name is not None and name not in settings.systems:
            raise UserError(f"{role}: {name} is none of the systems; it must be one of {', '.join(settings.systems)}")
    shards = read_index(settings.audio)
    total = shards.samples
    if not total:
        raise UserError(f"{settings.audio}: holds no utterances; prepare labelled audio shards")
    device = pick_device(settings.device)
    systems = [System(name, place(path), load_checkpoint(path, device)) for name, path in settings.systems.items()]
    output = place(settings.output)
    claim_folder(output, "eval", settings.model_dump())

    test = TestSet(frontend_seconds={system.frontend: 0.0 for system in systems})
    with (
        write_whole(output / "utterances.jsonl", "w") as lines,
        write_whole(output / "quarantine.jsonl", "w") as quarantine,
    ):
        with Progress("eval", total, "utterances") as progress:
            for shard in shards:
                _score_shard(settings, shard, systems, test, lines)
                errors = ", ".join(f"{system.name} {system.tally.counts.rate:.2%}" for system in systems)
                progress.advance(shard.samples, shard.seconds, errors)
        for key, name, reason in test.bad:
            quarantine.write(json.dumps({"key": key, "shard": name, "reason": reason}, ensure_ascii=False) + "\n")
        _check(settings, test, total)
    report = _report(settings, shards, systems, test, device)
    write_report(output, report)
    print(system_table(report))
    print(f"\n{report['verdict']}\n{output / 'report.html'}")


def _score_shard(
    settings: EvalSettings, shard: ShardInfo, systems: list[System], test: TestSet, lines: IO[str]
) -> None:
    """Decode one shard with every system; one shard's features are all that is held of the audio."""
    normalizer = NORMALIZERS[settings.normalizer]
    utterances = _read_shard(settings, shard, systems, test)
    references = [normalizer.apply(utterance.text) for utterance in utterances]
    test.words += [len(reference.split()) for reference in references]
    test.speakers += [utterance.speaker for utterance in utterances]
    found = {system.name: _decode_all(settings, system, utterances) for system in systems}
    scored = {name: [normalizer.apply(text) for text in texts] for name, texts in found.items()}
    for system in systems:
        for index, (utterance, reference) in enumerate(zip(utterances, references, strict=True)):
            hypothesis = scored[system.name][index]
            counts = system.tally.add(utterance.key, utterance.speaker, align(reference, hypothesis))
            if settings.teacher is not None:
                system.same_as_teacher += hypothesis == scored[settings.teacher][index]
            line = {
                "system": system.name, "key": utterance.key, "speaker": utterance.speaker,
                "reference": utterance.text, "hypothesis": found[system.name][index],
                "reference_scored": reference, "hypothesis_scored": hypothesis,
                "words": counts.words, "substitutions": counts.substitutions, "deletions": counts.deletions,
                "insertions": counts.insertions, "errors": counts.errors,
            }  # fmt: skip
            lines.write(json.dumps(line, ensure_ascii=False) + "\n")


def _read_shard(settings: EvalSettings, shard: ShardInfo, systems: list[System], test: TestSet) -> list[Utterance]:
    """Features of a shard for every front end among the systems, timed; what cannot be read goes to quarantine."""
    frontends = {system.frontend: Frontend(system.checkpoint.features) for system in systems}
    utterances = []
    for sample in read_checked(settings.audio, shard):
        text, speaker = sample.fields.get("text"), sample.fields.get("speaker")
        if not isinstance(text, str):
            raise UserError(
                f"{settings.audio}/{shard.name}: {sample.key} has no text; "
                "a WER needs labelled audio: prepare the shards from a manifest with texts"
            )
        features: dict[str, np.ndarray] = {}
        seconds = 0.0
        try:
            for name, frontend in frontends.items():
                rate = frontend.settings.sample_rate
                waveform, _ = decode(sample.audio, sample.key, rate, settings.max_seconds)
                began = time.perf_counter()
                # rounded as in training
                features[name] = frontend.compute(waveform).astype(np.float16)
                test.frontend_seconds[name] += time.perf_counter() - began
                seconds = len(waveform) / rate
        except AudioError as error:
            test.bad.append((sample.key, shard.name, str(error)))
            continue
        test.audio_seconds += seconds
        utterances.append(Utterance(sample.key, features, text, None if speaker is None else str(speaker)))
    return utterances


def _decode_all(settings: EvalSettings, system: System, utterances: list[Utterance]) -> list[str]:
    """Texts of the utterances by one system, in their order, timed."""
    features = [utterance.features[system.frontend] for utterance in utterances]
    texts = [""] * len(features)
    decoder = make_decoder(settings, system.checkpoint)
    batches = batches_by_length([len(item) for item in features], settings.batch_frames)
    if batches and not system.network_seconds:
        infer(system.checkpoint, [features[index] for index in batches[0]])  # first-use costs stay out of the figures
    for batch in batches:
        began = time.perf_counter()
        outputs = infer(system.checkpoint, [features[index] for index in batch])
        system.network_seconds += time.perf_counter() - began
        began = time.perf_counter()
        for index, log_probs in zip(batch, outputs, strict=True):
            texts[index] = decoder(log_probs)[0].text
        system.decoder_seconds += time.perf_counter() - began
    return texts


def _check(settings: EvalSettings, test: TestSet, total: int) -> None:
    bad, held = len(test.bad), len(test.words) + len(test.bad)
    if held != total:
        raise UserError(
            f"{settings.audio}: index.json counts {total} utterances, the shards hold {held}; prepare the shards again"
        )
    if bad > settings.max_bad_share * total:
        key, name, reason = test.bad[0]
        raise UserError(
            f"{settings.audio}: {bad} of {total} utterances could not be used (first: {name}, {key}: {reason}); "
            "mend them or raise max_bad_share"
        )
    if not sum(test.words):
        raise UserError(f"{settings.audio}: the texts hold no words; a WER needs labelled audio")


def _report(
    settings: EvalSettings, shards: ShardList, systems: list[System], test: TestSet, device: torch.device
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
    by_name = {system.name: system for system in systems}
    report = {
        "format": FORMAT,
        "version": VERSION,
        "verdict": "",
        "baseline": settings.baseline,
        "teacher": settings.teacher,
        "student": settings.student,
        "normalizer": NORMALIZERS[settings.normalizer].name,
        "data": {
            "audio": settings.audio,
            "hash": hash_json([shard.sha256 for shard in shards]),
            "shards": len(shards),
            "utterances": len(test.words),
            "quarantined": len(test.bad),
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
        "systems": {system.name: _system(settings, system, by_name, samples, test) for system in systems},
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
    settings: EvalSettings, system: System, systems: dict[str, System], samples: dict[str, np.ndarray], test: TestSet
) -> dict[str, Any]:
    counts, checkpoint, utterances = system.tally.counts, system.checkpoint, len(test.words)
    weights = checkpoint.model.state_dict().values()
    factors = {name: _real_time_factor(other, test) for name, other in systems.items()}
    teacher = settings.teacher
    return {
        "wer": counts.rate,
        "interval": interval(samples[system.name]),
        **_counts(counts),
        "utterances": utterances,
        "sentence_errors": system.tally.sentence_errors,
        "parameters": parameters(checkpoint.model),
        "size_bytes": sum(weight.numel() * weight.element_size() for weight in weights),
        "frame_ms": checkpoint.frame_ms,
        "lookahead_ms": checkpoint.lookahead_ms,
        "real_time_factor": factors[system.name],
        "real_time_factor_to_teacher": factors[system.name] / factors[teacher] if teacher else None,
        "decoder_real_time_factor": system.decoder_seconds / test.audio_seconds,
        **_relative("baseline", settings.baseline, system.name, systems, samples),
        **_relative("teacher", teacher, system.name, systems, samples),
        **_gap(settings, system.name, systems, samples),
        "agreement_with_teacher": system.same_as_teacher / utterances if teacher else None,
        "checkpoint": str(system.folder),
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
        "curve": learning_curve(system.folder),
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


def _real_time_factor(system: System, test: TestSet) -> float:
    """Seconds of work of the front end and the network for a second of audio."""
    return (test.frontend_seconds[system.frontend] + system.network_seconds) / test.audio_seconds


def _relative(
    role: str, other: str | None, name: str, systems: dict[str, System], samples: dict[str, np.ndarray]
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
    settings: EvalSettings, name: str, systems: dict[str, System], samples: dict[str, np.ndarray]
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
