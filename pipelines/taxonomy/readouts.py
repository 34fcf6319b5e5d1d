"""What tells students apart before the word error rate does: how near they are to their teacher, how soon they learn, how much they churn."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rapidfuzz.distance import Levenshtein

from asr_kd.audio.settings import FeatureSettings
from asr_kd.distillation.spikes import AFTER_MS, BEFORE_MS, Spikes, find_spikes, spike_cross_entropy
from asr_kd.files import read_json, write_json
from asr_kd.models.acoustic import Checkpoint, infer_batches, load_checkpoint
from asr_kd.shards.stream import ShardInput, load_features
from asr_kd.shards.tarset import read_index
from asr_kd.units import Units

BATCH_FRAMES, MAX_SECONDS = 2000, 60.0


def features_of(audio: Path, features: FeatureSettings) -> list[np.ndarray]:
    """Network input of all utterances of a set."""
    wanted = ShardInput(folder=str(audio), features=features, max_seconds=MAX_SECONDS)
    return [item.features for shard in read_index(audio) for item in load_features(wanted, shard).items]


def posteriors(checkpoint: Checkpoint, features: Sequence[np.ndarray]) -> list[torch.Tensor]:
    """Log-probabilities, float64 [frames, units], of every utterance, in their order."""
    found: dict[int, torch.Tensor] = {}
    for batch, answers in infer_batches(checkpoint, features, BATCH_FRAMES):
        found |= {index: torch.from_numpy(one).double() for index, one in zip(batch, answers, strict=True)}
    return [found[index] for index in range(len(features))]


def fidelity(teacher: Sequence[torch.Tensor], student: Sequence[torch.Tensor], frame_ms: int) -> dict[str, float]:
    """How near a student is to its teacher on audio that neither has learned.

    Args:
        teacher: log-probabilities of each utterance, float64 [frames, units].
        student: the same of the student, which may be a frame shorter or longer (of audio at another rate); what both have is compared.
        frame_ms: duration of a frame.

    Returns:
        frame_kl: divergence of the student from the teacher, nat a frame, each frame by itself.
        spike_kl: the cross-entropy that `spikes` learns by, nat a spike of the teacher: each is one event, which the student may
            place within a stretch; less what the teacher itself has there, so that the same answers have 0.
        agreement: share of the spikes in whose stretch the student's best path says the teacher's unit, once, and no other.
    """
    lengths = [min(len(one), len(other)) for one, other in zip(teacher, student, strict=True)]
    said, own = (
        torch.cat([one[:size] for one, size in zip(rows, lengths, strict=True)]) for rows in (teacher, student)
    )
    probs, units = said.exp().sort(1, descending=True)
    before, after = (round(span / frame_ms) for span in (BEFORE_MS, AFTER_MS))
    spikes = find_spikes(units, probs, torch.tensor(lengths), before, after)
    kl = (said.exp() * (said - own)).sum(1).mean()
    found = {"frame_kl": kl.item(), "spike_kl": 0.0, "agreement": 1.0}
    if len(spikes.start):
        theirs, ours = (spike_cross_entropy(one, units, probs, spikes).mean() for one in (said, own))
        found["spike_kl"] = (ours - theirs).item()
        found["agreement"] = _agreement(said, own.argmax(1), spikes)
    return found


def _agreement(said: torch.Tensor, path: torch.Tensor, spikes: Spikes) -> float:
    same = 0
    for start, end, first, last in zip(*(edge.tolist() for edge in spikes.edges), strict=True):
        mass = said[start:end].exp().sum(0)
        mass[Units.blank] = 0.0
        spoken = [unit for unit, _ in itertools.groupby(path[first:last].tolist()) if unit != Units.blank]
        same += spoken == [int(mass.argmax())]
    return same / len(spikes.start)


def read_fidelity(run: Path, names: Sequence[str], audio: Path) -> dict[str, dict[str, float]]:
    """`fidelity` of the students of a run, by their folder's names; kept in `readouts.json` there, so that nothing is measured twice."""
    file = run / "readouts.json"
    known: dict[str, Any] = read_json(file) if file.exists() else {}
    checkpoints = {name: load_checkpoint(run / name) for name in ["teacher", *names]}
    marks = {name: [one.fingerprint, checkpoints["teacher"].fingerprint] for name, one in checkpoints.items()}
    due = [name for name in names if known.get(name, {}).get("of") != marks[name]]
    if due:
        frontends = {checkpoints[name].features for name in ["teacher", *due]}
        heard = {features: features_of(audio, features) for features in frontends}
        said = posteriors(checkpoints["teacher"], heard[checkpoints["teacher"].features])
        for name in due:
            features = checkpoints[name].features
            own = posteriors(checkpoints[name], heard[features])
            known[name] = {"of": marks[name], **fidelity(said, own, features.frame_ms)}
            write_json(file, known)
            print(f"{run / name}: {known[name]['frame_kl']:.4f} nat a frame from the teacher", flush=True)
    return {name: {key: known[name][key] for key in ("frame_kl", "spike_kl", "agreement")} for name in names}


def steps_to(metrics: Path, wer: float) -> int | None:
    """The first scored step at which the development WER was so low; None: it never was."""
    for line in metrics.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row.get("development_wer", 1.0) <= wer and row["step"]:
            return int(row["step"])
    return None


def hypotheses(report: Path) -> dict[str, dict[str, tuple[list[str], int]]]:
    """For each system of a report, its words by utterance, with the number of words that were said."""
    found: dict[str, dict[str, tuple[list[str], int]]] = {}
    for line in (report / "utterances.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found.setdefault(row["system"], {})[row["key"]] = (row["hypothesis_scored"].split(), row["words"])
    return found


def churn(seeds: Sequence[Mapping[str, tuple[list[str], int]]]) -> float | None:
    """Share of the words said on which two seeds of a student differ, a mean over pairs; None for a single seed."""
    if len(seeds) < 2:
        return None
    shares = []
    for one, other in itertools.combinations(seeds, 2):
        apart = sum(Levenshtein.distance(words, other[key][0]) for key, (words, _) in one.items())
        shares.append(apart / sum(words for _, words in one.values()))
    return statistics.mean(shares)
