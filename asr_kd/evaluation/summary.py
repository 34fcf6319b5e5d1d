"""Lines of scores → the figures of the report: `Scores` hears all lines once, `summarise` says what they amount to.

Of an utterance a few numbers are held, never its texts.
"""

from __future__ import annotations

import functools
import hashlib
import heapq
import importlib.metadata
import itertools
import math
import platform
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from asr_kd.evaluation.bootstrap import CONFIDENCE, blocks, interval, resampled
from asr_kd.evaluation.calibration import Calibration, Delays, timed_words
from asr_kd.evaluation.history import history
from asr_kd.evaluation.report import FORMAT, VERSION
from asr_kd.evaluation.score import System
from asr_kd.evaluation.settings import EvalSettings
from asr_kd.evaluation.significance import MatchedPairs, compared, marks, segments
from asr_kd.evaluation.slices import OTHERS, SLICE_WORDS, Fields, Slicing
from asr_kd.evaluation.tally import Tally, most_frequent
from asr_kd.evaluation.verdict import verdict
from asr_kd.evaluation.wer import ErrorCounts, align
from asr_kd.files import hash_json
from asr_kd.models.acoustic import parameters
from asr_kd.shards.index import ShardList
from asr_kd.text import NORMALIZERS

ALIGNMENT = "sclite: substitution 4, deletion 3, insertion 3"
NAMED_SLICES = 5
ENOUGH = 4  # speakers of a slice; the interval of fewer is their range, and says little of what is sure
SAMPLES = 6  # utterances to listen to, of each kind


class Set:
    """A test set by name: what was scored of it."""

    def __init__(self) -> None:
        self.utterances = self.words = self.quarantined = 0
        self.seconds = 0.0
        self.speakers: set[str | None] = set()


class Scores:
    """All that one pass over the lines leaves: sums, and a few numbers for each utterance."""

    def __init__(self, settings: EvalSettings) -> None:
        names = list(settings.systems)
        self.teacher, self.reference = settings.teacher, settings.baseline or settings.teacher
        # a word that comes again is normalised once
        self.normalize = functools.lru_cache(100_000)(NORMALIZERS[settings.normalizer].apply)
        self.tallies = {name: Tally() for name in names}
        self.pairs = {pair: MatchedPairs() for pair in itertools.combinations(names, 2)}
        self.calibrations = {name: Calibration() for name in names}
        self.delays = {name: Delays() for name in names if self.teacher not in (None, name)}
        self.changed: dict[str, list[tuple[int, int, dict[str, Any]]]] = {name: [] for name in names}
        self.sets: dict[str, Set] = {}
        self.fields = Fields()
        self.words, self.characters = array("i"), array("i")
        self.speakers = array("i")  # -1 where the speaker is not known
        self.set_of = array("i")
        self.speaker_numbers: dict[str, int] = {}

    def add(self, name: str, lines: Iterable[Mapping[str, Any]], seconds: float, quarantined: int) -> None:
        """Count a shard of the set of this name.

        Args:
            lines: as scoring writes them, system by system, each with the same utterances in the same order.
            seconds: of the audio that was scored.
        """
        by_system: dict[str, list[Mapping[str, Any]]] = {system: [] for system in self.tallies}
        for line in lines:
            by_system[line["system"]].append(line)
        one = self.sets.setdefault(name, Set())
        one.seconds += seconds
        one.quarantined += quarantined
        number = list(self.sets).index(name)
        for utterance in zip(*by_system.values(), strict=True):
            self._add(one, number, {line["system"]: line for line in utterance})

    def _add(self, one: Set, number: int, lines: dict[str, Mapping[str, Any]]) -> None:
        first = next(iter(lines.values()))
        speaker = first["speaker"]
        one.utterances += 1
        one.words += first["words"]
        one.speakers.add(speaker)
        self.fields.add(first)
        self.words.append(first["words"])
        self.characters.append(first["characters"])
        self.set_of.append(number)
        self.speakers.append(
            -1 if speaker is None else self.speaker_numbers.setdefault(speaker, len(self.speaker_numbers))
        )
        edits = {name: align(line["reference_scored"], line["hypothesis_scored"]) for name, line in lines.items()}
        marked = {name: marks(one) for name, one in edits.items()}
        timed = {name: timed_words(line["times"], edits[name], self.normalize) for name, line in lines.items()}
        teacher = timed[self.teacher] if self.teacher else None
        for name, line in lines.items():
            self.tallies[name].add(line, edits[name])
            words = timed[name]
            if words is not None:
                self.calibrations[name].add(words)
                if teacher is not None and name in self.delays:
                    self.delays[name].add(words, teacher)
            if self.reference not in (None, name):
                self._compare(line, line["errors"] - lines[self.reference]["errors"])
        for (a, b), pairs in self.pairs.items():
            pairs.add(segments(marked[a], marked[b]))

    def _compare(self, line: Mapping[str, Any], change: int) -> None:
        """Hold on to the utterances that changed most against the baseline (or else the teacher)."""
        if not change:
            return
        found = {"key": line["key"], "set": line["set"], "shard": line["shard"], "change": change}
        heap = self.changed[line["system"]]
        heapq.heappush(heap, (abs(change), -len(self.words), found))
        if len(heap) > 2 * SAMPLES:
            heapq.heappop(heap)

    @property
    def quarantined(self) -> int:
        """Utterances that could not be scored."""
        return sum(one.quarantined for one in self.sets.values())


@dataclass
class Resampler:
    """WERs of resampled test sets, for the whole set or a part of it."""

    scores: Scores
    settings: EvalSettings

    def __post_init__(self) -> None:
        self.errors = np.array([tally.errors for tally in self.scores.tallies.values()])
        self.characters = np.array([tally.character_errors for tally in self.scores.tallies.values()])
        self.words = np.array(self.scores.words)
        self.speakers = np.array(self.scores.speakers)

    def draw(self, part: np.ndarray | slice, rows: np.ndarray, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Resampled sums of the rows and of the words of some utterances: [rows, resamples], [resamples]."""
        settings = self.settings
        return resampled(rows[:, part], words[part], self.speakers[part], settings.bootstrap, settings.seed)

    def rates(self, part: np.ndarray | slice) -> dict[str, np.ndarray]:
        """Resampled WERs of every system, by name: the same draws for all; not finite where no words were drawn."""
        drawn, words = self.draw(part, self.errors, self.words)
        with np.errstate(divide="ignore", invalid="ignore"):
            return dict(zip(self.scores.tallies, drawn / words, strict=True))


def summarise(
    settings: EvalSettings,
    systems: Mapping[str, System],
    sets: Mapping[str, tuple[str, ShardList]],
    scores: Scores,
    costs: Mapping[str, Mapping[str, Any]],
    device: torch.device,
) -> dict[str, Any]:
    """Everything that the report shows, as one JSON value; README.md describes it.

    Args:
        sets: folder and shards of each test set, by name.
        costs: of each system, as `score_all` returns them.
    """
    resampler = Resampler(scores, settings)
    samples = resampler.rates(slice(None))
    in_sets = {one: resampler.rates(np.array(scores.set_of) == number) for number, one in enumerate(scores.sets)}
    student = _student(settings, scores)
    slices, worst, changed = _slices(settings, scores, resampler, student)
    described = {name: _set(folder, shards, scores.sets[name]) for name, (folder, shards) in sets.items()}
    speakers = set().union(*(one.speakers for one in scores.sets.values()))
    report = {
        "format": FORMAT,
        "version": VERSION,
        "verdict": "",
        "baseline": settings.baseline,
        "teacher": settings.teacher,
        "student": settings.student,
        "normalizer": NORMALIZERS[settings.normalizer].name,
        "alignment": ALIGNMENT,
        "data": {
            "audio": ", ".join(settings.sets.values()),
            "hash": hash_json([shard.sha256 for _, shards in sets.values() for shard in shards]),
            **{key: sum(one[key] for one in described.values()) for key in ("shards", "utterances", "quarantined", "words")},
            "seconds": round(sum(one.seconds for one in scores.sets.values()), 3),
            "speakers": None if None in speakers else len(speakers),
        },
        "sets": described,
        "bootstrap": {
            "resamples": settings.bootstrap,
            "confidence": CONFIDENCE,
            **_blocks(resampler.speakers),
        },
        "systems": {
            name: _system(settings, system, scores, resampler, samples, in_sets, costs) for name, system in systems.items()
        },
        "pairs": [_pair(pair, scores, samples) for pair in scores.pairs],
        "slices": slices,
        "slices_left_out": scores.fields.left_out,
        "slices_worst": worst,
        "slices_changed": changed,
        "samples": _samples(scores, student),
        "settings": settings.model_dump(),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("asr-kd", "torch", "numpy", "rapidfuzz")},
        },
        "device": str(device) if device.type == "cpu" else torch.cuda.get_device_name(device),
    }  # fmt: skip
    report["verdict"] = verdict(report)
    return report


def _student(settings: EvalSettings, scores: Scores) -> str:
    """The system that the verdict is about: the one of the settings, else the best that is neither baseline nor teacher."""
    if settings.student:
        return settings.student
    ranked = sorted(scores.tallies, key=lambda name: scores.tallies[name].counts.rate)
    return next((name for name in ranked if name not in (settings.baseline, settings.teacher)), ranked[0])


def _set(folder: str, shards: ShardList, one: Set) -> dict[str, Any]:
    return {
        "audio": folder,
        "hash": hash_json([shard.sha256 for shard in shards]),
        "shards": len(shards),
        "utterances": one.utterances,
        "quarantined": one.quarantined,
        "words": one.words,
        "seconds": round(one.seconds, 3),
        "speakers": None if None in one.speakers else len(one.speakers),
    }


def _system(
    settings: EvalSettings,
    system: System,
    scores: Scores,
    resampler: Resampler,
    samples: dict[str, np.ndarray],
    in_sets: dict[str, dict[str, np.ndarray]],
    costs: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    name, checkpoint, teacher, tally = system.name, system.checkpoint, settings.teacher, scores.tallies[system.name]
    utterances, counts = len(scores.words), tally.counts
    weights = checkpoint.model.state_dict().values()
    character_errors = sum(tally.character_errors)
    by_set: dict[str, dict[str, Any]] = {}
    for one, drawn in in_sets.items():
        part = tally.sets.get(one, ErrorCounts())
        by_set[one] = {"wer": _finite(part.rate), "interval": interval(drawn[name]), **_counts(part)}
    rates = [one["wer"] for one in by_set.values()]
    return {
        "wer": counts.rate,
        "interval": interval(samples[name]),
        **_counts(counts),
        "edit_distance": tally.edit_distance,
        "sets": by_set,
        "mean_of_sets_wer": None if None in rates else sum(rates) / len(rates),
        "utterances": utterances,
        "sentence_errors": tally.sentence_errors,
        "ser": tally.sentence_errors / utterances,
        "cer": _finite(character_errors / tally.characters if tally.characters else math.nan),
        "cer_interval": _character_interval(name, resampler),
        "characters": tally.characters,
        "character_errors": character_errors,
        "parameters": parameters(checkpoint.model),
        "size_bytes": sum(weight.numel() * weight.element_size() for weight in weights),
        "frame_ms": checkpoint.frame_ms,
        "lookahead_ms": checkpoint.lookahead_ms,
        "word_delay_ms": scores.delays[name].figures() if name in scores.delays else None,
        "calibration": scores.calibrations[name].figures(),
        **_costs(costs, name, teacher),
        **_relative("baseline", settings.baseline, name, scores, samples),
        **_relative("teacher", teacher, name, scores, samples),
        **_gap(settings, name, scores, samples),
        "agreement_with_teacher": tally.same_as_teacher / utterances if teacher else None,
        "checkpoint": str(system.folder),
        "fingerprint": checkpoint.fingerprint,
        "started_from": checkpoint.training.get("started_from"),
        "units_hash": checkpoint.units.hash,
        "units": checkpoint.units.size,
        "model": checkpoint.settings.model_dump(),
        "features": checkpoint.features.model_dump(),
        "speakers": {
            speaker: {"wer": _finite(one.rate), **_counts(one)} for speaker, one in sorted(tally.speakers.items())
        },
        "confusions": {
            "substitutions": most_frequent(tally.substitutions),
            "deletions": most_frequent(tally.deletions),
            "insertions": most_frequent(tally.insertions),
        },
        "worst": [
            {
                **{key: one.line[key] for key in ("key", "set", "shard", "speaker")},
                **_counts(one.counts),
                "alignment": [[edit.kind, edit.reference, edit.hypothesis] for edit in one.edits],
            }
            for one in tally.worst_first()
        ],
        **history(system.folder),
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


def _character_interval(name: str, resampler: Resampler) -> list[float] | None:
    row = list(resampler.scores.tallies).index(name)
    errors, characters = resampler.draw(
        slice(None), resampler.characters[row : row + 1], np.array(resampler.scores.characters)
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        return interval(errors[0] / characters)


def _costs(costs: Mapping[str, Mapping[str, Any]], name: str, teacher: str | None) -> dict[str, Any]:
    def factor(one: str, *parts: str) -> float:
        """Seconds of work for a second of audio."""
        return sum(costs[one][part] for part in parts) / costs[one]["seconds"]

    network = ("frontend_seconds", "network_seconds")
    return {
        "real_time_factor": factor(name, *network),
        "real_time_factor_to_teacher": factor(name, *network) / factor(teacher, *network) if teacher else None,
        **{f"{part}_real_time_factor": factor(name, f"{part}_seconds") for part in ("frontend", "network", "decoder")},
        "peak_memory_bytes": costs[name]["peak_memory_bytes"],
        "peak_device_bytes": costs[name]["peak_device_bytes"],
    }


def _relative(
    role: str, other: str | None, name: str, scores: Scores, samples: dict[str, np.ndarray]
) -> dict[str, Any]:
    """Relative WER change against the system in that role; null without one, for itself, and where it has no error."""
    key = f"relative_change_to_{role}"
    if other is None or other == name or not scores.tallies[other].counts.errors:
        return {key: None, f"{key}_interval": None}
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn = samples[name] / samples[other] - 1
    change = scores.tallies[name].counts.rate / scores.tallies[other].counts.rate - 1
    return {key: change, f"{key}_interval": interval(drawn)}


def _gap(settings: EvalSettings, name: str, scores: Scores, samples: dict[str, np.ndarray]) -> dict[str, Any]:
    """Share of the WER gap between baseline and teacher that a system recovers; null where there is no gap."""
    nothing = {"gap_recovered": None, "gap_recovered_interval": None}
    baseline, teacher = settings.baseline, settings.teacher
    if baseline is None or teacher is None or name in (baseline, teacher):
        return nothing
    rate = {one: scores.tallies[one].counts.rate for one in (baseline, teacher, name)}
    if rate[baseline] <= rate[teacher]:
        return nothing
    gap = samples[baseline] - samples[teacher]
    with np.errstate(divide="ignore", invalid="ignore"):
        # where the gap itself may be nought the share of it has no interval
        drawn = np.where(gap > 0, (samples[baseline] - samples[name]) / gap, np.nan)
    share = (rate[baseline] - rate[name]) / (rate[baseline] - rate[teacher])
    return {"gap_recovered": share, "gap_recovered_interval": interval(drawn)}


def _pair(pair: tuple[str, str], scores: Scores, samples: dict[str, np.ndarray]) -> dict[str, Any]:
    a, b = pair
    difference = scores.tallies[a].counts.rate - scores.tallies[b].counts.rate
    return compared(a, b, difference, samples[a] - samples[b], scores.pairs[pair])


def _slices(
    settings: EvalSettings, scores: Scores, resampler: Resampler, student: str
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """The slices of every field; those where the student is worst; those where it differs most from baseline and teacher."""
    found, named, changed = [], [], []
    seen = set()  # utterances of the slices so far: a set that is one condition is named once
    others = [one for one in dict.fromkeys((settings.baseline, settings.teacher)) if one not in (None, student)]
    for slicing in scores.fields.slicings(resampler.words):
        values = []
        for number, value in enumerate(slicing.names):
            part = slicing.labels == number
            rates = resampler.rates(part)
            entry = _slice(value, part, rates, resampler)
            values.append(entry)
            utterances = hashlib.sha256(np.packbits(part).tobytes()).digest()
            if value == OTHERS or entry["words"] < SLICE_WORDS or utterances in seen:
                continue
            seen.add(utterances)
            named.append(_worst(slicing, entry, student))
            changed += [_change(slicing, entry, student, other, rates) for other in others if other is not None]
        found.append({"field": slicing.field, "bands": slicing.bands, "values": values})
    overall = scores.tallies[student].counts.rate
    # by the end of the interval that is nearer to the overall rate, so that chance names no small slice
    worst = sorted(
        (one for one in named if one["wer"] > overall),
        key=lambda one: (one["number"] < ENOUGH, -(one["interval"][0] if one["interval"] else one["wer"])),
    )
    most: list[dict[str, Any]] = []
    for other in others:
        mine = [one for one in changed if one["other"] == other and one["difference"]]
        most += sorted(
            mine, key=lambda one: (one["number"] < ENOUGH, -_surely(one["interval"]), -abs(one["difference"]))
        )[:NAMED_SLICES]
    return found, worst[:NAMED_SLICES], most


def _slice(value: str | None, part: np.ndarray, rates: dict[str, np.ndarray], resampler: Resampler) -> dict[str, Any]:
    words = int(resampler.words[part].sum())
    systems = {}
    for row, (name, drawn) in enumerate(rates.items()):
        errors = int(resampler.errors[row][part].sum())
        systems[name] = {"wer": errors / words if words else None, "interval": interval(drawn), "errors": errors}
    drawn_of = _blocks(resampler.speakers[part])
    return {"value": value, "utterances": int(part.sum()), "words": words, **drawn_of, "systems": systems}


def _blocks(speakers: np.ndarray) -> dict[str, Any]:
    """What resamples are drawn of."""
    _, number, by_speaker = blocks(speakers)
    return {"blocks": "speakers" if by_speaker else "utterances", "number": number}


def _worst(slicing: Slicing, entry: dict[str, Any], student: str) -> dict[str, Any]:
    return {**_place(slicing, entry), "system": student, **entry["systems"][student]}


def _change(
    slicing: Slicing, entry: dict[str, Any], student: str, other: str, rates: dict[str, np.ndarray]
) -> dict[str, Any]:
    mine, theirs = entry["systems"][student]["wer"], entry["systems"][other]["wer"]
    return {
        **_place(slicing, entry), "system": student, "wer": mine, "other": other, "other_wer": theirs,
        "difference": mine - theirs, "interval": interval(rates[student] - rates[other]),
    }  # fmt: skip


def _place(slicing: Slicing, entry: dict[str, Any]) -> dict[str, Any]:
    return {"field": slicing.field, **{key: one for key, one in entry.items() if key != "systems"}}


def _surely(bounds: list[float] | None) -> float:
    """How far an interval of differences is from nought."""
    return max(bounds[0], -bounds[1], 0.0) if bounds else 0.0


def _samples(scores: Scores, student: str) -> list[dict[str, Any]]:
    """Utterances to listen to: the student's worst, then those that changed most against the baseline."""
    found: dict[tuple[str, str, str], dict[str, Any]] = {}

    def take(one: Mapping[str, Any], why: str) -> None:
        place = {key: one[key] for key in ("key", "set", "shard")}
        found.setdefault((one["set"], one["shard"], one["key"]), place | {"why": why})

    for one in scores.tallies[student].worst_first()[:SAMPLES]:
        take(one.line, f"{student}: {_errors(one.counts.errors)}")
    ranked = sorted(scores.changed[student], key=lambda entry: entry[:2], reverse=True)
    for _, _, change in ranked:
        if len(found) == 2 * SAMPLES:
            break
        much = f"{_errors(abs(change['change']))} {'more' if change['change'] > 0 else 'fewer'}"
        take(change, f"{student}: {much} than {scores.reference}")
    return list(found.values())


def _errors(count: int) -> str:
    return f"{count} error{'' if count == 1 else 's'}"
