"""Measure arms of arms.yaml against each other: paired seeds, weights chosen on development, the test set looked at once.

    python pipelines/taxonomy/measure.py --tasks strong --arms spikes reverse --seeds 3

Runs what is missing, two trainings at a time, and prints the tables of RESULTS.md; what was measured is kept in runs/taxonomy, and the
same command goes on after an interruption. README.md beside this file says what the rows mean.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parent))
from arms import TASKS, Arm, filled, read_arms, refusal, stages_of, student_of, task_of, with_baselines
from costs import measure_costs
from readouts import churn, hypotheses, read_fidelity, steps_to

from asr_kd.ending import Status
from asr_kd.errors import UserError
from asr_kd.files import read_json

#: of Student's t distribution, two-sided 95 %, by degrees of freedom from 1 on
T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110,
    2.101, 2.093, 2.086, 2.080, 2.074, 2.069,
)  # fmt: skip
#: arms whose steps take this much longer than their baseline's are compared with a longer baseline too (--equal-time)
DEARER = 1.1


@dataclass(frozen=True)
class Plan:
    """What is to be measured of a task.

    Attributes:
        root: folder of all tasks.
        variables: in place of those of the task's file.
    """

    task: str
    arms: list[Arm]
    seeds: range
    tuned: range
    root: Path
    variables: dict[str, Any]

    def run(self, seed: int) -> Path:
        """Folder of a seed."""
        return self.root / self.task / f"seed{seed}"

    def value(self, arm: Arm) -> Any:
        """The value of an arm's setting with the lowest development WER over the tuning seeds; then the lowest loss."""
        return min(arm.values, key=lambda value: self.development(arm, value)) if len(arm.values) > 1 else arm.values[0]

    def development(self, arm: Arm, value: Any) -> tuple[float, float]:
        """Development WER and CTC loss of an arm with a value, means of the tuning seeds."""
        said = [
            read_json(self.run(seed) / arm.stage(value) / "best" / "checkpoint.json")["training"] for seed in self.tuned
        ]
        wer, loss = (statistics.mean(one[f"development_{name}"] for one in said) for name in ("wer", "loss"))
        return wer, loss

    def settings(self, arm: Arm) -> dict[str, Any]:
        """Settings of `train` of an arm with the first seed and its chosen value."""
        described = task_of(self.task, self.seeds[0], self.variables, str(self.root))
        return dict(filled(student_of(described["stages"], arm, self.value(arm)), described["values"]))


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
        the plans without the arms whose training failed.
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
    return working(plans, run_stages(plans[0].root, final, jobs))


def working(plans: Sequence[Plan], failed: set[str]) -> list[Plan]:
    """The plans without the arms that have a stage among the failed."""

    def works(plan: Plan, arm: Arm) -> bool:
        stages = {f"{plan.task}-{seed}-{arm.stage(value)}" for seed in plan.seeds for value in arm.values}
        return not stages & failed

    return [replace(plan, arms=[arm for arm in plan.arms if works(plan, arm)]) for plan in plans]


def costs_of(plan: Plan) -> dict[str, dict[str, float]]:
    """`measure_costs` of the arms; one from random weights costs what the same one from the supervised student costs."""
    arms = {arm.name: arm for arm in plan.arms}
    twins = {name: twin if (twin := name.removesuffix("-fresh")) in arms else name for name in arms}
    settings = {twin: plan.settings(arms[twin]) for twin in twins.values()}
    found = measure_costs(plan.root / plan.task / "costs.json", settings, "soft")
    return {name: found[twin] for name, twin in twins.items()}


def longer(plan: Plan, costs: Mapping[str, Mapping[str, float]]) -> dict[str, Arm]:
    """For each arm that costs more a step than its baseline, that baseline with as many more passes as take the same time."""
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


def paired(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float | None]:
    """Mean of the differences over the same seeds, and the half-width of its 95 % interval by Student's t; None for one seed."""
    differences = [one - other for one, other in zip(ours, theirs, strict=True)]
    if len(differences) < 2:
        return differences[0], None
    t = T95[min(len(differences) - 2, len(T95) - 1)]
    return statistics.mean(differences), t * statistics.stdev(differences) / math.sqrt(len(differences))


def verdict(mean: float, half: float | None, base: float) -> str:
    """What a paired difference shows, and where it shows nothing, the effects that it excludes; in per cent of the baseline's WER."""
    if half is None or not base:
        return "one seed"
    low, high = (100 * (mean + sign * half) / base for sign in (-1, 1))
    if low > 0 or high < 0:
        return (
            f"{'worse' if low > 0 else 'better'} by {min(abs(low), abs(high)):.0f} to {max(abs(low), abs(high)):.0f} %"
        )
    return f"null: excludes more than {-low:.0f} % better or {high:.0f} % worse"


def print_tables(plan: Plan, costs: Mapping[str, Mapping[str, float]], against: Mapping[str, Sequence[str]]) -> None:
    """The three tables of a task: what was chosen, word error rates, and the quiet readouts.

    Args:
        plan: its arms are the rows.
        costs: by arm; may lack some.
        against: names of the baselines of each arm that has any: with the same audio, then with the same time.
    """
    runs = [plan.run(seed) for seed in plan.seeds]
    stage = {arm.name: arm.stage(plan.value(arm)) for arm in plan.arms}
    reports = [read_json(run / "report" / "report.json")["systems"] for run in runs]
    rows = {"teacher": "teacher", "student-supervised": "student-supervised", **stage}
    rows = {name: folder for name, folder in rows.items() if all(folder in report for report in reports)}
    print_grid(plan)
    wers = {name: [report[folder]["wer"] for report in reports] for name, folder in rows.items()}
    print(
        f"\n| {plan.task}: arm | test WER %, mean of {len(runs)} | each seed | against | difference, points | which shows | sub / del / ins |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, folder in rows.items():
        counts = " / ".join(f"{statistics.mean(report[folder][kind] for report in reports):.0f}" for kind in ("substitutions", "deletions", "insertions"))  # fmt: skip
        cells = [name, f"{100 * statistics.mean(wers[name]):.2f}", each(wers[name])]
        for base in [one for one in against.get(name, ()) if one in wers] or [None]:
            points = shown = "–"
            if base:
                mean, half = paired(wers[name], wers[base])
                points = f"{100 * mean:+.2f}" + (f" ± {100 * half:.2f}" if half is not None else "")
                shown = verdict(mean, half, statistics.mean(wers[base]))
            print(f"| {' | '.join(cells)} | {base or '–'} | {points} | {shown} | {counts} |")
            cells, counts = [f"{name}, same time", "", ""], ""
    print_quiet(plan, rows, reports, costs, against)


def print_grid(plan: Plan) -> None:
    """What was tried of each setting on the development set, and what was chosen."""
    tuned = [arm for arm in plan.arms if len(arm.values) > 1]
    if not tuned:
        return
    print(
        f"\n| {plan.task}: arm | setting | development WER % of each value ({len(plan.tuned)} seeds) | chosen |\n|---|---|---|---|"
    )
    for arm in tuned:
        tried = ", ".join(f"{value:g}: {100 * plan.development(arm, value)[0]:.2f}" for value in arm.values)
        print(f"| {arm.name} | {arm.key} | {tried} | {plan.value(arm):g} |")


def print_quiet(
    plan: Plan, rows: Mapping[str, str], reports: Sequence[Mapping[str, Any]], costs: Mapping[str, Mapping[str, float]],
    against: Mapping[str, Sequence[str]],
) -> None:  # fmt: skip
    """Divergence from the teacher on development audio, its spikes agreed on, steps, delay, churn, and cost.

    Args:
        rows: folder of each row.
        reports: systems of each seed's report.
        costs: see `print_tables`.
        against: see `print_tables`.
    """
    runs, values = [plan.run(seed) for seed in plan.seeds], task_of(plan.task, 0, plan.variables)["values"]
    students = {name: folder for name, folder in rows.items() if name != "teacher"}
    near = [read_fidelity(run, list(students.values()), plan.root / plan.task / "data" / "development") for run in runs]
    heard = [hypotheses(run / "report") for run in runs]
    reach = float(values["reach"])
    print(
        f"\n| {plan.task}: arm | KL from the teacher, nat a frame | difference | KL on spikes, nat | difference | agreement on spikes % | "
        f"steps to {100 * reach:g} % | delay, median ms | churn % | step × | memory, MB |\n|---|---|---|---|---|---|---|---|---|---|---|"
    )
    for name, folder in students.items():
        cells = [name]
        for key in ("frame_kl", "spike_kl"):
            own, base = [one[folder][key] for one in near], next(iter(against.get(name, ())), None)
            cells += [f"{statistics.mean(own):.4f}", "–"]
            if base in students:
                mean, half = paired(own, [one[students[base]][key] for one in near])
                cells[-1] = f"{mean:+.4f}" + (f" ± {half:.4f}" if half is not None else "")
        cells.append(f"{100 * statistics.mean(one[folder]['agreement'] for one in near):.1f}")
        steps = [steps_to(run / folder / "metrics.jsonl", reach) for run in runs]
        cells.append(" / ".join(f"{one:,}" if one else "never" for one in steps))
        delays = [report[folder]["word_delay_ms"] for report in reports]
        cells.append(f"{statistics.mean(one['median'] for one in delays):.0f}" if all(delays) else "–")
        apart = churn([one[folder] for one in heard])
        cells.append("–" if apart is None else f"{100 * apart:.1f}")
        cost = costs.get(name)
        cells += [f"{cost['ratio']:.2f}", f"{cost['memory'] / 1e6:,.0f}"] if cost else ["–", "–"]
        print("| " + " | ".join(cells) + " |")


def each(values: Sequence[float]) -> str:
    """Every seed's WER in per cent."""
    return " / ".join(f"{100 * value:.2f}" for value in values)


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
