"""Measure arms of arms.yaml against each other: paired seeds, weights chosen on development, the test set looked at once.

    python pipelines/taxonomy/measure.py --tasks strong --arms spikes reverse --seeds 3

Runs what is missing, two trainings at a time, and prints the tables of RESULTS.md; what was measured is kept in runs/taxonomy, and the
same command goes on after an interruption. README.md beside this file says what the rows mean.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parent))
from arms import TASKS, Arm, read_arms, refusal, stages_of, with_baselines
from costs import measure_costs
from plans import Plan
from tables import print_tables

from asr_kd.ending import Status
from asr_kd.errors import UserError

#: arms that take this much longer for the same audio than their baseline are compared with a longer baseline too (--equal-time)
DEARER = 1.1


def run_stages(root: Path, stages: dict[str, Any], jobs: int) -> set[str]:
    """Run what is missing of these stages. One that fails is left out, with what needs it, and the others go on.

    Returns:
        the names of the stages that were left out.

    Raises:
        SystemExit: when the run was interrupted, or nothing is left that works.
    """
    root.mkdir(parents=True, exist_ok=True)
    asked = set(stages)
    while stages:
        file = root / "measured.yaml"
        file.write_text(
            yaml.safe_dump({"variables": {"run": str(root), "jobs": jobs}, "stages": stages}, sort_keys=False)
        )
        words = [sys.executable, "-m", "asr_kd.cli", "run", str(file)]
        done = subprocess.run(words, check=False, stderr=subprocess.PIPE, text=True)
        print(done.stderr, end="", file=sys.stderr)
        failed = re.search(r"stage (\S+) failed", done.stderr)
        if done.returncode == 0:
            return asked - set(stages)
        if done.returncode in (Status.INTERRUPTED, Status.TERMINATED) or not failed:
            raise SystemExit(done.returncode)
        stages = without(stages, failed[1])
    raise SystemExit("no stage is left that works")


def without(stages: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The stages less one, what reads its output, and reports' mention of them."""
    output, left = str(stages[name]["settings"]["output"]), {}
    for other, stage in stages.items():
        if other == name:
            continue
        if stage["verb"] == "eval":
            systems = {system: folder for system, folder in stage["settings"]["systems"].items() if folder != output}
            stage = {"verb": "eval", "settings": {**stage["settings"], "systems": systems}}
        left[other] = stage
    for other, stage in list(left.items()):
        if other in left and re.search(rf"{re.escape(output)}(?![\w.-])", yaml.safe_dump(stage)):
            left = without(left, other)
    return left


def train_all(plans: Sequence[Plan], jobs: int) -> list[Plan]:
    """Tune what has a grid, train every arm with what was chosen, and evaluate all of a seed together.

    Returns:
        the plans without the values, and the arms, whose training failed.
    """
    tuning: dict[str, Any] = {}
    for plan in plans:
        for seed in plan.seeds:
            tried = plan.tuned if seed in plan.tuned else ()
            chosen = [(arm, value) for arm in plan.arms for value in arm.values if tried or len(arm.values) == 1]
            tuning |= stages_of(plan.task, seed, chosen, plan.variables)
    plans = working(plans, run_stages(plans[0].root, tuning, jobs))
    final: dict[str, Any] = {}
    for plan in plans:
        for seed in plan.seeds:
            chosen = [(arm, plan.value(arm)) for arm in plan.arms]
            report = [arm.stage(value) for arm, value in chosen]
            final |= stages_of(plan.task, seed, chosen, plan.variables, report)
    failed = run_stages(plans[0].root, final, jobs)
    decided = [replace(plan, arms=[replace(arm, values=(plan.value(arm),)) for arm in plan.arms]) for plan in plans]
    kept = [{arm.name for arm in plan.arms} for plan in working(decided, failed)]
    return [
        replace(plan, arms=[arm for arm in plan.arms if arm.name in names])
        for plan, names in zip(plans, kept, strict=True)
    ]


def working(plans: Sequence[Plan], failed: set[str]) -> list[Plan]:
    """The plans without the values that have a stage among the failed, and without the arms that have no other."""

    def works(plan: Plan, arm: Arm, value: Any) -> bool:
        return not {f"{plan.task}-{seed}-{arm.stage(value)}" for seed in plan.seeds} & failed

    left = [
        [replace(arm, values=[value for value in arm.values if works(plan, arm, value)]) for arm in plan.arms]
        for plan in plans
    ]
    return [replace(plan, arms=[arm for arm in arms if arm.values]) for plan, arms in zip(plans, left, strict=True)]


def costs_of(plan: Plan) -> dict[str, dict[str, float]]:
    """`measure_costs` of the arms; one from random weights costs what the same one from the supervised student costs."""
    arms = {arm.name: arm for arm in plan.arms}
    twins = {name: twin if (twin := name.removesuffix("-fresh")) in arms else name for name in arms}
    settings = {twin: plan.settings(arms[twin]) for twin in twins.values()}
    found = measure_costs(plan.root / plan.task / "costs.json", settings, "soft")
    return {name: found[twin] for name, twin in twins.items()}


def longer(plan: Plan, costs: Mapping[str, Mapping[str, float]]) -> dict[str, Arm]:
    """For each arm that costs more time than its baseline, that baseline with as many more passes as take the same time."""
    arms = {arm.name: arm for arm in plan.arms}
    found: dict[str, Arm] = {}
    for arm in plan.arms:
        if arm.baseline not in arms:
            continue
        ratio = costs[arm.name]["ratio"] / costs[arm.baseline]["ratio"]
        if ratio > DEARER:
            passes = round(plan.settings(arms[arm.baseline])["phases"][0]["passes"] * ratio)
            name, value = f"{arm.baseline}-{passes}-passes", plan.value(arms[arm.baseline])
            found[arm.name] = replace(arms[arm.baseline], name=name, values=(value,), passes=passes, baseline=None)
    return found


def planned(chosen: argparse.Namespace, arms: dict[str, Arm]) -> list[Plan]:
    """What is asked for; arms that the settings refuse are left out, with the reason."""
    plans = []
    for task in chosen.tasks:
        variables = {
            key: value for key, value in (("corpus", chosen.corpus), ("passes", chosen.passes)) if value is not None
        }
        wanted = []
        for arm in with_baselines(arms, chosen.arms or list(arms)):
            if task not in arm.tasks:
                continue
            if refused := refusal(task, arm, variables):
                print(f"{task}: {arm.name} is left out: {refused}", flush=True)
            else:
                wanted.append(arm)
        seeds, tuned = range(chosen.seeds), range(min(chosen.tune_seeds, chosen.seeds))
        plans.append(Plan(task, wanted, seeds, tuned, Path(chosen.output), variables))
    return plans


def main() -> None:
    """Run what is missing and print the tables."""
    arms = read_arms()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=["strong", "weak"], choices=TASKS)
    parser.add_argument(
        "--arms", nargs="+", choices=list(arms), help="all of arms.yaml without it; baselines come along"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tune-seeds", type=int, default=1, help="seeds whose development WER chooses the weights")
    parser.add_argument(
        "--equal-time", action="store_true", help="baselines with as many more passes as dearer arms take time"
    )
    parser.add_argument("--no-costs", action="store_true", help="leave out time and memory of a step")
    parser.add_argument("--corpus", help="real: the folder of CMU AN4")
    parser.add_argument(
        "--passes", type=int, help="of the students, in place of the task's: for a quick look, with another --output"
    )
    parser.add_argument("--jobs", type=int, default=2, help="trainings side by side, one thread each")
    parser.add_argument("--output", default="runs/taxonomy")
    chosen = parser.parse_args()
    if "real" in chosen.tasks and not chosen.corpus:
        parser.error("the task real needs --corpus, the folder of CMU AN4")
    if chosen.equal_time and chosen.no_costs:
        parser.error("--equal-time needs the costs; leave out --no-costs")
    try:
        plans = planned(chosen, arms)
        for plan in train_all(plans, chosen.jobs):
            costs = {} if chosen.no_costs else costs_of(plan)
            against = {arm.name: [arm.baseline] for arm in plan.arms if arm.baseline}
            if chosen.equal_time and (more := longer(plan, costs)):
                together = replace(plan, arms=[*plan.arms, *{arm.name: arm for arm in more.values()}.values()])
                (plan,) = train_all([together], chosen.jobs)
                against = {
                    name: [*bases, *([more[name].name] if name in more else [])] for name, bases in against.items()
                }
            print_tables(plan, costs, against)
    except UserError as error:
        print(f"measure: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
