"""Measure students of few bits: rounded after their training, in training on pseudo-labels, and in training on soft targets.

    python pipelines/quantised/measure.py --seeds 3

The task is `strong` of pipelines/taxonomy, with its data, start, teacher and targets: what was trained there is taken over, and the same
command goes on after an interruption. Prints the table of RESULTS.md; README.md beside this file says what its rows mean.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "taxonomy"))
from arms import Arm, read_arms, stages_of
from measure import run_stages
from tables import each, paired, verdict

from asr_kd.errors import UserError
from asr_kd.files import read_json

TASK, BITS = "strong", (8, 4, 2)


def arms_of(bits: Sequence[int]) -> list[Arm]:
    """The students that are trained: of float32, and of these bits."""
    arms = read_arms()
    names = ["soft", "pseudo", *(f"bits-{number}{kind}" for number in bits for kind in ("-pseudo", ""))]
    return [arms[name] for name in names]


def after(bits: int) -> str:
    """The folder of the float32 student rounded after its training."""
    return f"student-soft-{bits}-bits"


def rows_of(bits: Sequence[int]) -> dict[str, tuple[str, str | None]]:
    """The rows of the table: the folder of each, and the row that it is compared with."""
    rows: dict[str, tuple[str, str | None]] = {
        "float32, soft targets": ("student-soft", None),
        "float32, pseudo-labels": ("student-pseudo", None),
    }
    soft, pseudo = rows
    for number in bits:
        rows |= {
            f"{number} bits, after training": (after(number), soft),
            f"{number} bits, in training on pseudo-labels": (f"student-bits-{number}-pseudo", pseudo),
            f"{number} bits, in training on soft targets": (f"student-bits-{number}", soft),
        }
    return rows


def stages(seed: int, bits: Sequence[int], variables: dict[str, Any]) -> dict[str, Any]:
    """All that a seed needs: the task's stages, the students, the rounded ones, and a report on the test set."""
    found = stages_of(TASK, seed, [(arm, None) for arm in arms_of(bits)], variables)
    data, run = f"${{run}}/{TASK}/data", f"${{run}}/{TASK}/seed{seed}"
    for number in bits:
        found[f"{TASK}-{seed}-{after(number)}"] = {
            "verb": "quantise",
            "settings": {
                "checkpoint": f"{run}/student-soft", "output": f"{run}/{after(number)}", "bits": number,
                "development": f"{data}/development", "feature_cache": f"{data}-features",
            },
        }  # fmt: skip
    systems = {folder: f"{run}/{folder}" for folder, _ in rows_of(bits).values()}
    found[f"{TASK}-{seed}-report-quantised"] = {
        "verb": "eval",
        "settings": {
            "systems": {"teacher": f"{run}/teacher", **systems}, "audio": f"{data}/test", "output": f"{run}/report-quantised",
            "baseline": "student-soft", "teacher": "teacher", "bootstrap": 0,
        },
    }  # fmt: skip
    return found


def print_table(root: Path, seeds: Sequence[int], bits: Sequence[int]) -> None:
    """Word error rate, paired differences, and size of each student."""
    reports = [read_json(root / TASK / f"seed{seed}" / "report-quantised" / "report.json")["systems"] for seed in seeds]
    rows = rows_of(bits)
    wers = {name: [report[folder]["wer"] for report in reports] for name, (folder, _) in rows.items()}
    whole = reports[0]["student-soft"]["size_bytes"]
    print(
        f"| student | kB | of float32 | test WER %, mean of {len(reports)} | each seed | against float32, points | which shows |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, (folder, base) in rows.items():
        size, points, shown = reports[0][folder]["size_bytes"], "–", "–"
        if base:
            mean, half = paired(wers[name], wers[base])
            points = f"{100 * mean:+.2f}" + (f" ± {100 * half:.2f}" if half is not None else "")
            shown = verdict(mean, half, statistics.mean(wers[base]))
        cells = [name, f"{size / 1000:,.0f}", f"{100 * size / whole:.0f} %", f"{100 * statistics.mean(wers[name]):.2f}"]
        print("| " + " | ".join([*cells, each(wers[name]), points, shown]) + " |")


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bits", nargs="+", type=int, default=list(BITS), choices=BITS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--passes", type=int, help="in place of the task's: for a quick look, with another --output")
    parser.add_argument("--jobs", type=int, default=2, help="trainings side by side, one thread each")
    parser.add_argument("--output", default="runs/taxonomy")
    chosen = parser.parse_args()
    root, variables = Path(chosen.output), {} if chosen.passes is None else {"passes": chosen.passes}
    wanted: dict[str, Any] = {}
    for seed in range(chosen.seeds):
        wanted |= stages(seed, chosen.bits, variables)
    try:
        if failed := run_stages(root, wanted, chosen.jobs):
            raise UserError(f"these stages failed: {', '.join(sorted(failed))}; see above, and run the command again")
        print_table(root, range(chosen.seeds), chosen.bits)
    except UserError as error:
        print(f"measure: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
