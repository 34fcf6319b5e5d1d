"""Sums → the figures of the report: `summarise` makes all that report.json holds."""

from __future__ import annotations

import importlib.metadata
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from asr_kd.evaluation import schema
from asr_kd.evaluation.history import learning_curve, unlabelled_hours
from asr_kd.evaluation.notable import samples, sliced
from asr_kd.evaluation.parts import Costs, Line
from asr_kd.evaluation.score import System
from asr_kd.evaluation.scores import Resampler, Scores, Set
from asr_kd.evaluation.settings import EvalSettings
from asr_kd.evaluation.significance import CONFIDENCE, blocks_of, compared, interval
from asr_kd.evaluation.verdict import student_of, verdict
from asr_kd.evaluation.wer import Edit, ErrorCounts, counts_of
from asr_kd.files import hash_json
from asr_kd.models.acoustic import parameters, stored_weights
from asr_kd.shards.index import ShardInfo, ShardList
from asr_kd.text import NORMALIZERS

ALIGNMENT = "sclite: substitution 4, deletion 3, insertion 3"


def summarise(
    settings: EvalSettings,
    systems: Mapping[str, System],
    sets: Mapping[str, tuple[str | list[str], ShardList]],
    scores: Scores,
    costs: Mapping[str, Costs],
    device: torch.device,
) -> schema.Report:
    """Everything that the report shows.

    Args:
        settings: of the job.
        systems: by name.
        sets: folder and shards of each test set, by name.
        scores: every utterance's, counted.
        costs: of each system, as `score_all` returns them.
        device: on which they were measured.
    """
    resampler = Resampler(scores, settings)
    figures = Summary(settings, scores, costs, resampler, resampler.rates(slice(None)))
    in_sets = {one: resampler.rates(np.array(scores.set_of) == number) for number, one in enumerate(scores.sets)}
    rates, drawn = {name: tally.counts.rate for name, tally in scores.tallies.items()}, figures.drawn
    student = student_of(settings, rates)
    slices, worst, changed = sliced(resampler, student)
    blocks, number, _ = blocks_of(resampler.speakers)
    described = {name: _data(str(folder), shards, [scores.sets[name]]) for name, (folder, shards) in sets.items()}
    every = [shard for _, shards in sets.values() for shard in shards]
    report = schema.Report(
        verdict="", baseline=settings.baseline, teacher=settings.teacher, student=settings.student,
        normalizer=NORMALIZERS[settings.normalizer].name, alignment=ALIGNMENT,
        data=_data(", ".join(map(str, settings.sets.values())), every, list(scores.sets.values())), sets=described,
        bootstrap=schema.Bootstrap(resamples=settings.bootstrap, confidence=CONFIDENCE, blocks=blocks, number=number),
        systems={name: figures.of(system, in_sets) for name, system in systems.items()},
        pairs=[
            compared(a, b, rates[a] - rates[b], drawn[a] - drawn[b], found) for (a, b), found in scores.pairs.items()
        ],
        slices=slices, slices_left_out=scores.fields.left_out, slices_worst=worst, slices_changed=changed,
        samples=samples(scores, student), settings=settings,
        versions={"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("asr-kd", "torch", "numpy", "rapidfuzz")},
        device=str(device) if device.type == "cpu" else torch.cuda.get_device_name(device),
    )  # fmt: skip
    return report.model_copy(update={"verdict": verdict(report)})


def _data(audio: str, shards: Sequence[ShardInfo], sets: list[Set]) -> schema.Data:
    speakers = set().union(*(one.speakers for one in sets))
    return schema.Data(
        audio=audio, hash=hash_json([shard.sha256 for shard in shards]), shards=len(shards),
        utterances=sum(one.utterances for one in sets), quarantined=sum(one.quarantined for one in sets),
        words=sum(one.words for one in sets), seconds=round(sum(one.seconds for one in sets), 3),
        speakers=None if None in speakers else len(speakers),
    )  # fmt: skip


@dataclass
class Summary:
    """What the figures of every system are made of."""

    settings: EvalSettings
    scores: Scores
    costs: Mapping[str, Costs]
    resampler: Resampler
    drawn: dict[str, np.ndarray]  # WERs of resampled test sets, by system, float [resamples]

    def of(self, system: System, in_sets: Mapping[str, Mapping[str, np.ndarray]]) -> schema.SystemFigures:
        """The figures of a system; `in_sets`: as `drawn`, of each set."""
        name, checkpoint, teacher = system.name, system.checkpoint, self.settings.teacher
        tally, costs = self.scores.tallies[name], self.costs[name]
        utterances, characters = len(self.scores.words), sum(self.scores.characters)
        character_errors = sum(tally.character_errors)
        weights = stored_weights(checkpoint.model, checkpoint.settings).values()
        sets = {one: self._on(name, one, drawn) for one, drawn in in_sets.items()}
        rates = [one.wer for one in sets.values() if one.wer is not None]
        to_baseline, to_baseline_interval = self._relative(name, self.settings.baseline)
        to_teacher, to_teacher_interval = self._relative(name, teacher)
        gap, gap_interval = self._gap(name)
        return schema.SystemFigures(
            interval=interval(self.drawn[name]), **_errors(tally.counts), edit_distance=tally.edit_distance, sets=sets,
            mean_of_sets_wer=sum(rates) / len(rates) if len(rates) == len(sets) else None,
            utterances=utterances, sentence_errors=tally.sentence_errors, ser=tally.sentence_errors / utterances,
            cer=character_errors / characters if characters else None, cer_interval=self.resampler.character_interval(name),
            characters=characters, character_errors=character_errors,
            relative_change_to_baseline=to_baseline, relative_change_to_baseline_interval=to_baseline_interval,
            relative_change_to_teacher=to_teacher, relative_change_to_teacher_interval=to_teacher_interval,
            gap_recovered=gap, gap_recovered_interval=gap_interval,
            agreement_with_teacher=tally.same_as_teacher / utterances if teacher else None,
            word_delay_ms=self.scores.delays[name].figures() if name in self.scores.delays else None,
            calibration=self.scores.calibrations[name].figures(),
            parameters=parameters(checkpoint.model), size_bytes=sum(one.numel() * one.element_size() for one in weights),
            frame_ms=checkpoint.frame_ms, lookahead_ms=checkpoint.lookahead_ms,
            real_time_factor=costs.factor,
            real_time_factor_to_teacher=costs.factor / self.costs[teacher].factor if teacher else None,
            frontend_real_time_factor=costs.frontend_seconds / costs.seconds,
            network_real_time_factor=costs.network_seconds / costs.seconds,
            decoder_real_time_factor=costs.decoder_seconds / costs.seconds,
            checkpoint=str(system.folder), fingerprint=checkpoint.fingerprint,
            started_from=_start(checkpoint.training.get("started_from")),
            units=checkpoint.units.size, units_hash=checkpoint.units.hash,
            model=checkpoint.settings, features=checkpoint.features,
            speakers={speaker: schema.SpeakerErrors(**_errors(one)) for speaker, one in sorted(tally.speakers.items())},
            confusions=schema.Confusions(**{f"{kind}s": tally.most_frequent(kind) for kind in tally.confusions}),
            worst=[_worst(line, edits) for *_, line, edits in sorted(tally.worst, reverse=True)],
            curve=learning_curve(system.folder), unlabelled_hours=unlabelled_hours(system.folder),
        )  # fmt: skip

    def _on(self, name: str, one: str, drawn: Mapping[str, np.ndarray]) -> schema.SetErrors:
        """A system's errors on one set; `drawn`: WERs of its resamples, by system."""
        mine, baseline = self.scores.tallies[name].sets.get(one, ErrorCounts()), self.settings.baseline
        change, within = math.nan, None
        if baseline is not None and baseline != name:
            change = mine.rate - self.scores.tallies[baseline].sets.get(one, ErrorCounts()).rate
            with np.errstate(invalid="ignore"):
                within = interval(drawn[name] - drawn[baseline])
        return schema.SetErrors(
            interval=interval(drawn[name]), change_to_baseline=change if math.isfinite(change) else None,
            change_to_baseline_interval=within, **_errors(mine),
        )  # fmt: skip

    def _relative(self, name: str, other: str | None) -> tuple[float | None, schema.Interval | None]:
        """Relative WER change against another system; None without one, for itself, and where it has no error."""
        tallies = self.scores.tallies
        if other is None or other == name or not tallies[other].counts.errors:
            return None, None
        with np.errstate(divide="ignore", invalid="ignore"):
            drawn = self.drawn[name] / self.drawn[other] - 1
        return tallies[name].counts.rate / tallies[other].counts.rate - 1, interval(drawn)

    def _gap(self, name: str) -> tuple[float | None, schema.Interval | None]:
        """Share of the WER gap between baseline and teacher that a system recovers; None where there is no gap."""
        baseline, teacher = self.settings.baseline, self.settings.teacher
        if baseline is None or teacher is None or name in (baseline, teacher):
            return None, None
        base, best, mine = (self.scores.tallies[one].counts.rate for one in (baseline, teacher, name))
        if base <= best:
            return None, None
        gap = self.drawn[baseline] - self.drawn[teacher]
        with np.errstate(divide="ignore", invalid="ignore"):
            # where the gap itself may be 0 the share of it has no interval
            drawn = np.where(gap > 0, (self.drawn[baseline] - self.drawn[name]) / gap, np.nan)
        return (base - mine) / (base - best), interval(drawn)


def _worst(line: Line, edits: list[Edit]) -> schema.WorstUtterance:
    where = {key: line[key] for key in ("key", "set", "shard", "speaker")}
    return schema.WorstUtterance(**where, **_counts(counts_of(edits)), alignment=edits)


def _errors(counts: ErrorCounts) -> dict[str, Any]:
    """The keys of `schema.SpeakerErrors`."""
    return {"wer": counts.rate if math.isfinite(counts.rate) else None, **_counts(counts)}


def _counts(counts: ErrorCounts) -> dict[str, int]:
    """The keys of `schema.Counts`."""
    return {**asdict(counts), "errors": counts.errors}


def _start(said: object) -> schema.Start | None:
    """What a checkpoint says that its training started from; None where that is nothing that this version knows."""
    try:
        return schema.Start.model_validate(said) if said else None
    except ValidationError:
        return None
