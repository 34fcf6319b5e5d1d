"""Measure students that hear no unlabelled audio: noise, a trained generator and spliced recordings, against real audio.

    python pipelines/generated/measure.py --seeds 3

The task is `strong` of pipelines/taxonomy, with its data, teacher and supervised start: what was trained there is taken over, and the same command goes
on after an interruption. Prints the tables of RESULTS.md; README.md beside this file says what the rows are, that of the taxonomy how to read them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "taxonomy"))
from arms import read_arms, with_baselines
from measure import train_all
from plans import Plan
from tables import print_tables

from asr_kd.errors import UserError

TASK, HERE = "strong", Path(__file__).parent


def main() -> None:
    """Run what is missing and print the tables."""
    arms = read_arms(HERE / "arms.yaml")
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arms", nargs="+", choices=list(arms), default=list(arms), help="baselines come along")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tune-seeds", type=int, default=1, help="seeds whose development WER chooses the weight")
    parser.add_argument("--passes", type=int, help="in place of the task's: for a quick look, with another --output")
    parser.add_argument("--jobs", type=int, default=2, help="trainings side by side, one thread each")
    parser.add_argument("--output", default="runs/taxonomy")
    chosen = parser.parse_args()
    variables = {} if chosen.passes is None else {"passes": chosen.passes}
    wanted = with_baselines(arms, chosen.arms)
    seeds, tuned = range(chosen.seeds), range(min(chosen.tune_seeds, chosen.seeds))
    try:
        for plan in train_all([Plan(TASK, wanted, seeds, tuned, Path(chosen.output), variables)], chosen.jobs):
            print_tables(plan, {}, {arm.name: [arm.baseline] for arm in plan.arms if arm.baseline})
    except UserError as error:
        print(f"measure: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
