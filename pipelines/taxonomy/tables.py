"""The tables of RESULTS.md: what was chosen, word error rates with paired differences, and the quiet readouts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from arms import task_of
from plans import Plan
from readouts import churn, hypotheses, read_fidelity, steps_to

from asr_kd.files import read_json

#: of Student's t distribution, two-sided 95 %, by degrees of freedom from 1 on
T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110,
    2.101, 2.093, 2.086, 2.080, 2.074, 2.069,
)  # fmt: skip


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
    students = [folder for name, folder in rows.items() if name != "teacher"]
    near = [read_fidelity(run, students, plan.root / plan.task / "data" / "development") for run in runs]
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
    print_quiet(plan, rows, reports, near, costs, against)


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
    plan: Plan, rows: Mapping[str, str], reports: Sequence[Mapping[str, Any]], near: Sequence[Mapping[str, Any]],
    costs: Mapping[str, Mapping[str, float]], against: Mapping[str, Sequence[str]],
) -> None:  # fmt: skip
    """Divergence from the teacher on development audio, its spikes agreed on, steps, delay, churn, and cost.

    Args:
        rows: folder of each row.
        reports: systems of each seed's report.
        near: `read_fidelity` of each seed.
        costs: see `print_tables`.
        against: see `print_tables`.
    """
    runs, values = [plan.run(seed) for seed in plan.seeds], task_of(plan.task, 0, plan.variables)["values"]
    students = {name: folder for name, folder in rows.items() if name != "teacher"}
    heard = [hypotheses(run / "report") for run in runs]
    reach = float(values["reach"])
    print(
        f"\n| {plan.task}: arm | KL from the teacher, nat a frame | difference | KL on spikes, nat | difference | agreement on spikes % | "
        f"steps to {100 * reach:g} % | delay, median ms | churn % | time × | memory, MB |\n|---|---|---|---|---|---|---|---|---|---|---|"
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
