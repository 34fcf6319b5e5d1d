"""A made-up report, as summing up writes it, and lines for it."""

from __future__ import annotations

import itertools
from typing import Any

from asr_kd.audio.settings import FeatureSettings
from asr_kd.evaluation.schema import Report, SystemFigures
from asr_kd.evaluation.settings import EvalSettings
from asr_kd.evaluation.verdict import verdict
from asr_kd.evaluation.wer import count_errors
from asr_kd.models.settings import ModelSettings


def changed(report: Report, **changes: Any) -> Report:
    """The same report with other values, at `systems__name__key` or from the top."""
    values = report.model_dump()
    for path, value in changes.items():
        *keys, last = path.split("__")
        inner = values
        for key in keys:
            inner = inner[key]
        inner[last] = value
    return Report.model_validate(values)


def system(errors: int, **changes: Any) -> SystemFigures:
    """A made-up system of the report."""
    counts = {"words": 100, "errors": errors, "substitutions": errors, "deletions": 0, "insertions": 0}
    values = dict.fromkeys(SystemFigures.model_fields) | {
        "wer": errors / 100, "interval": (errors / 120, errors / 80), **counts, "utterances": 20, "sentence_errors": 3,
        "parameters": 1000, "size_bytes": 4000, "frame_ms": 30, "lookahead_ms": 90, "real_time_factor": 0.01,
        "frontend_real_time_factor": 0.005, "network_real_time_factor": 0.005, "decoder_real_time_factor": 0.001,
        "edit_distance": errors, "fingerprint": f"ab{errors}", "checkpoint": "runs/x", "units_hash": "cd", "units": 9,
        "model": ModelSettings(layers=1, size=8), "features": FeatureSettings(), "speakers": {"anna": {"wer": 0.1, **counts}},
        "confusions": {"substitutions": [("one", "two", 3)], "deletions": [], "insertions": [("six", 1)]},
        "worst": [{
            "key": "u1", "set": "test", "shard": "shard-000000.tar", "speaker": None, **counts,
            "alignment": [("equal", "a", "a"), ("substitution", "b", "c"), ("deletion", "d", None), ("insertion", None, "e")],
        }],
        "curve": [{"step": 1, "audio_hours": 1.0, "development_wer": 0.5}],
        "cer": errors / 400, "characters": 400, "character_errors": errors, "ser": 0.15,
        "sets": {"test": {"wer": errors / 100, "interval": None, "change_to_baseline": None, "change_to_baseline_interval": None, **counts}}, "mean_of_sets_wer": errors / 100,
        "word_delay_ms": {"median": 30, "p90": 90, "words": 80},
        "calibration": {
            "words": 99, "expected_error": 0.1, "normalised_cross_entropy": None,
            "bins": [
                {"low": 0.0, "high": 0.5, "words": 0, "confidence": None, "accuracy": None},
                {"low": 0.5, "high": 1.0, "words": 99, "confidence": 0.9, "accuracy": 0.8},
            ],
        },
    }  # fmt: skip
    return SystemFigures.model_validate(values | changes)


def report_of(
    systems: dict[str, SystemFigures], baseline: str | None = None, teacher: str | None = None, p: float = 0.03
) -> Report:
    """A made-up report; `p` of every pair."""
    figures = {name: {"wer": one.wer, "interval": one.interval, "errors": 1} for name, one in systems.items()}
    names = list(systems)
    data = {"audio": "test", "hash": "ef", "shards": 1, "utterances": 3, "quarantined": 1, "words": 100, "seconds": 60.0,
            "speakers": 1}  # fmt: skip
    two = {"words": 50, "utterances": 2, "blocks": "speakers", "number": 2}
    report = Report.model_validate({
        "verdict": "", "baseline": baseline, "teacher": teacher, "student": None, "normalizer": "basic-1", "alignment": "sclite",
        "systems": systems, "data": data, "sets": {"test": data},
        "bootstrap": {"resamples": 10, "confidence": 0.95, "blocks": "speakers", "number": 5},
        "pairs": [
            {"a": a, "b": b, "difference": systems[a].wer - systems[b].wer, "interval": (-0.02, 0.001),
             "p_bootstrap": p, "mapsswe": {"segments": 9, "mean": -0.1, "z": -2.0, "p": p + 0.01}}
            for a, b in itertools.combinations(names, 2)
        ],
        "slices": [
            {"field": "condition", "bands": False, "values": [
                {"value": value, **two, "systems": figures} for value in ("clean", "noisy")]},
            {"field": "seconds", "bands": True, "values": [
                {"value": "0 to 4", "utterances": 3, "words": 100, "blocks": "utterances", "number": 1, "systems": figures}]},
        ],
        "slices_worst": [{"field": "condition", "value": "noisy", "system": names[0], "wer": 0.3, "interval": None, "errors": 15, **two}],
        "slices_changed": [{"field": "condition", "value": None, "system": names[0], "wer": 0.3, "other": names[-1],
                            "other_wer": 0.1, "difference": 0.2, "interval": (0.1, 0.25), **two}],
        "slices_left_out": {"id": "more than 2,000 values"},
        "samples": [{"key": "u1", "set": "test", "shard": "shard-000000.tar", "why": "most errors"}],
        "settings": EvalSettings(systems=dict.fromkeys(names, "runs/x"), audio="test", output="out", decoder="beam", beam=4),
        "versions": {"python": "3"}, "device": "cpu",
    })  # fmt: skip
    return changed(report, verdict=verdict(report))


def distilled(
    baseline: int, teacher: int, student: int, bounds: tuple[float, float] | None = None, p: float = 0.03, **others: int
) -> Report:
    """A report of base, big (the teacher), small and others, each with that many errors in 100 words."""

    def one(errors: int, name: str) -> SystemFigures:
        gap = (baseline - errors) / (baseline - teacher) if baseline > teacher and name not in ("base", "big") else None
        return system(
            errors, gap_recovered=gap, fingerprint=f"of {name}",
            relative_change_to_baseline=errors / baseline - 1 if baseline and name != "base" else None,
            relative_change_to_teacher=errors / teacher - 1 if teacher and name != "big" else None,
            relative_change_to_baseline_interval=bounds if name == "small" else None,
        )  # fmt: skip

    errors = {"base": baseline, "big": teacher, "small": student, **others}
    return report_of({name: one(count, name) for name, count in errors.items()}, "base", "big", p)


def line(system: str, key: str, reference: str, hypothesis: str, **changes: Any) -> dict[str, Any]:
    errors = count_errors(reference, hypothesis).errors
    return {
        "system": system, "set": "test", "shard": "shard-000000.tar", "key": key, "speaker": "anna", "seconds": 2.0,
        "fields": {"condition": "clean"}, "reference_scored": reference, "hypothesis_scored": hypothesis, "errors": errors,
        "words": len(reference.split()),
    } | changes  # fmt: skip
