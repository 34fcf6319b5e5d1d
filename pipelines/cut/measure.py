"""Measure students with half of their teacher's layers: by where they begin, and by what they learn of it.

    python pipelines/cut/measure.py --seeds 3

The task is `strong` of pipelines/taxonomy, with its data, alignments and supervised start: what was trained there is taken over, and the
same command goes on after an interruption. Prints the table of RESULTS.md; README.md beside this file says what its columns mean.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "taxonomy"))
from arms import Arm, read_arms, stages_of, task_of
from measure import run_stages
from readouts import steps_to
from tables import each, paired, verdict

from asr_kd.errors import UserError
from asr_kd.files import read_json

TASK, TEACHER, SUPERVISED = "strong", "teacher-deep", "student-supervised"
#: what the report is called, in the folder of a seed
REPORT = "report-cut"


def students() -> dict[str, Arm]:
    """The students of the table, by the names of their folders."""
    arms = read_arms(Path(__file__).with_name("arms.yaml")).values()
    return {arm.stage(None): arm for arm in arms}


def stages(seed: int, variables: Mapping[str, Any]) -> dict[str, Any]:
    """All that a seed's students need, and these, by names of stages."""
    found = stages_of(TASK, seed, [(arm, None) for arm in students().values()], variables)
    # its own teacher is not asked for
    others = {f"{TASK}-{seed}-{name}" for name in ("teacher", "soft-targets", "pseudo-labels")}
    return {name: stage for name, stage in found.items() if name not in others}


def report(seed: int) -> dict[str, Any]:
    """The comparison of a seed's students on the test set, in one thread: their speed is told too."""
    run = f"${{run}}/{TASK}/seed{seed}"
    settings = {
        "systems": {name: f"{run}/{name}" for name in (TEACHER, SUPERVISED, *students())},
        "audio": f"${{run}}/{TASK}/data/test", "output": f"{run}/{REPORT}", "baseline": SUPERVISED, "teacher": TEACHER,
        "bootstrap": 0, "threads": 1,
    }  # fmt: skip
    return {f"{TASK}-{seed}-{REPORT}": {"verb": "eval", "settings": settings}}


def print_table(root: Path, seeds: Sequence[int], variables: Mapping[str, Any]) -> None:
    """Word error rate, paired differences, what is kept of the teacher, steps and speed of each student."""
    runs = [root / TASK / f"seed{seed}" for seed in seeds]
    reports = [read_json(run / REPORT / "report.json")["systems"] for run in runs]
    bases = {name: arm.baseline and f"student-{arm.baseline}" for name, arm in students().items()}
    wers = {name: [one[name]["wer"] for one in reports] for name in (TEACHER, SUPERVISED, *bases)}
    taught, size = statistics.mean(wers[TEACHER]), reports[0][TEACHER]["parameters"]
    factors = {name: statistics.median(one[name]["real_time_factor"] for one in reports) for name in wers}
    reach = float(task_of(TASK, 0, variables)["values"]["reach"])
    print(
        f"| | parameters | test WER %, mean of {len(runs)} | each seed | against | points | which shows | words right, of the teacher's % | "
        f"steps to {100 * reach:g} % | real-time factor | × faster |\n|---|---|---|---|---|---|---|---|---|---|---|"
    )
    for name, own in wers.items():
        base, points, shown, steps = bases.get(name), "–", "–", "–"
        if base:
            mean, half = paired(own, wers[base])
            points = f"{100 * mean:+.2f}" + (f" ± {100 * half:.2f}" if half is not None else "")
            shown = verdict(mean, half, statistics.mean(wers[base]))
        if name in bases:
            steps = " / ".join(str(steps_to(run / name / "metrics.jsonl", reach) or "never") for run in runs)
        parameters, mean = reports[0][name]["parameters"], statistics.mean(own)
        cells = [
            name.removeprefix("student-"), f"{parameters:,} ({100 * parameters / size:.0f} %)", f"{100 * mean:.2f}", each(own),
            (base or "–").removeprefix("student-"), points, shown, f"{100 * (1 - mean) / (1 - taught):.1f}", steps,
            f"{factors[name]:.5f}", f"{factors[TEACHER] / factors[name]:.2f}",
        ]  # fmt: skip
        print("| " + " | ".join(cells) + " |")


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--passes", type=int, help="in place of the task's: for a quick look, with another --output")
    parser.add_argument("--jobs", type=int, default=2, help="trainings side by side, one thread each")
    parser.add_argument("--output", default="runs/taxonomy")
    chosen = parser.parse_args()
    root, variables = Path(chosen.output), {} if chosen.passes is None else {"passes": chosen.passes}
    trained: dict[str, Any] = {}
    reports: dict[str, Any] = {}
    for seed in range(chosen.seeds):
        trained |= stages(seed, variables)
        reports |= report(seed)
    try:
        failed = run_stages(root, trained, chosen.jobs)
        failed |= run_stages(root, trained | reports, 1)  # one at a time: speed is measured
        if failed:
            raise UserError(f"these stages failed: {', '.join(sorted(failed))}; see above, and run the command again")
        print_table(root, range(chosen.seeds), variables)
    except UserError as error:
        print(f"measure: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
