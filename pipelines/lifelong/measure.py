"""Measure what is forgotten: the pipeline with several seeds, and word error rates on the old and the new domain, before and after.

    python pipelines/lifelong/measure.py --seeds 3

What was run is kept in runs/lifelong; the same command goes on after an interruption. README.md beside this file says what the columns mean.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "taxonomy"))
from tables import each, paired, verdict

from asr_kd.errors import UserError
from asr_kd.files import read_json

BEFORE, FINETUNED = "before", "finetuned"


def print_table(runs: Sequence[Path]) -> None:
    """A row for each student: both domains, each with the change from what it is compared with, paired by seed."""
    reports = [read_json(run / "report" / "report.json")["systems"] for run in runs]
    wers = {
        name: {domain: [report[name]["sets"][domain]["wer"] for report in reports] for domain in ("old", "new")}
        for name in reports[0]
    }
    print(
        f"\n| student | old domain: WER %, mean of {len(runs)} | each seed | backward transfer, points | which shows | "
        f"new domain: WER % | each seed | against {FINETUNED}, points | which shows |\n|---|---|---|---|---|---|---|---|---|"
    )
    for name, own in wers.items():
        cells = [name]
        for domain, base in (("old", BEFORE), ("new", FINETUNED)):
            cells += [f"{100 * statistics.mean(own[domain]):.2f}", each(own[domain])]
            if name in (BEFORE, base):
                cells += ["–", "–"]
                continue
            theirs = wers[base][domain]
            mean, half = paired(own[domain], theirs)
            cells.append(f"{100 * mean:+.2f}" + (f" ± {100 * half:.2f}" if half is not None else ""))
            cells.append(verdict(mean, half, statistics.mean(theirs)))
        print(f"| {' | '.join(cells)} |")


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--passes", type=int, help="of what is learned later: for a quick look, with another --output")
    parser.add_argument("--jobs", type=int, default=2, help="trainings side by side, one thread each")
    parser.add_argument("--output", default="runs/lifelong")
    given = parser.parse_args()
    if given.seeds < 1:
        parser.error("--seeds: give 1 or more")
    root = Path(given.output)
    runs = [root / f"seed{seed}" for seed in range(given.seeds)]
    for seed, run in enumerate(runs):
        words = [f"run={run}", f"data={root / 'data'}", f"seed={seed}", f"jobs={given.jobs}"]
        words += [f"passes={given.passes}"] if given.passes else []
        done = subprocess.run(
            [sys.executable, "-m", "asr_kd.cli", "run", str(Path(__file__).parent), *words], check=False
        )
        if done.returncode:
            raise SystemExit(done.returncode)
    try:
        print_table(runs)
    except UserError as error:
        print(f"measure: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
