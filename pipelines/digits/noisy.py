"""What noise on the student's side wins: the students once more, with it, and WER by condition. The measurements of digits and an4 use it."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from asr_kd.files import read_json

RIVALS = ("student-pseudo-label", "student-distilled")
#: of Student's t distribution, two-sided 95 %, by degrees of freedom from 1 on
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201)


def with_noise(stages: dict[str, Any]) -> dict[str, Any]:
    """The stages of the students that hear noise and rooms in all audio, and learn the same of it."""
    made = {}
    for kind in RIVALS:
        stage = copy.deepcopy(stages[kind])
        stage["settings"]["output"] = "${run}/" + f"{kind}-noise"
        for source in stage["settings"]["phases"][0]["sources"]:
            source["augment"] = {**source["augment"], "noise": {}}
        made[f"{kind}-noise"] = stage
    return made


def compared(output: str) -> dict[str, Any]:
    """The stage of a report about teacher and students, with noise and without, in every condition."""
    names = ("teacher", "student-supervised", *(name for kind in RIVALS for name in (kind, f"{kind}-noise")))
    systems = {name: "${run}/" + name for name in names}
    return {"verb": "eval", "settings": {"systems": systems, "audio": "${run}/data/test-conditions", "output": output}}


def by_condition(report: Path) -> dict[str, dict[str, float]]:
    """WER of each condition and system: the clean one first, of each noise the softest first."""
    slices = next(one for one in read_json(report / "report.json")["slices"] if one["field"] == "condition")
    found = {one["value"]: {name: at["wer"] for name, at in one["systems"].items()} for one in slices["values"]}

    def order(condition: str) -> tuple[bool, str, int]:
        noise, *ratio = condition.split()
        return condition != "clean", noise, -int(ratio[0]) if ratio else 0

    return {condition: found[condition] for condition in sorted(found, key=order)}


def change(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """The relative difference over the same seeds, with its 95 % interval."""
    base = statistics.mean(theirs)
    if not base:
        return "–"
    differences = [100 * (one - other) / base for one, other in zip(ours, theirs, strict=True)]
    mean = statistics.mean(differences)
    if len(differences) < 2:
        return f"{mean:+.0f} % (one seed)"
    half = T95[len(differences) - 2] * statistics.stdev(differences) / math.sqrt(len(differences))
    return f"{mean:+.0f} % ({mean - half:+.0f} to {mean + half:+.0f})"


def print_conditions(reports: Sequence[Path]) -> None:
    """WER by condition, mean of the seeds (a report each), and for the students with noise what it changed."""
    seeds = [by_condition(report) for report in reports]
    names = list(seeds[0]["clean"])
    kinds = [kind for kind in RIVALS if f"{kind}-noise" in names]
    heads = [f"WER %, mean of {len(seeds)}", *names, *(f"{kind}: with noise against without" for kind in kinds)]
    print(f"\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for condition in seeds[0]:
        wers = {name: [seed[condition][name] for seed in seeds] for name in names}
        cells = [f"{100 * statistics.mean(wers[name]):.1f}" for name in names]
        cells += [change(wers[f"{kind}-noise"], wers[kind]) for kind in kinds]
        print(f"| {' | '.join([condition, *cells])} |")
