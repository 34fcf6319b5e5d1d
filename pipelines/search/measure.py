"""Search the smallest or the fastest student within a word error rate, against random search and a grid of the same budget.

    python pipelines/search/measure.py --within 0.06 --by parameters

Development audio decides; what is found is trained with several seeds, and tested once. Runs what is missing; trials and trainings are kept in
runs/taxonomy, and the same command goes on after an interruption. README.md beside this file says what the tables mean.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[1] / "shapes"))
sys.path.insert(0, str(Path(__file__).parents[1] / "taxonomy"))  # its `measure` before this one
from arms import Arm, filled, stages_of, student_of, task_of, with_own_start
from measure import run_stages
from search import METHODS, Goal, Search, Tried, front, need_optuna, rank_correlation, rungs_of, winner
from space import Candidate, Space, read_space
from streaming import streaming
from tables import each, paired, verdict

from asr_kd.audio.settings import FeatureSettings
from asr_kd.config.load import build
from asr_kd.errors import UserError
from asr_kd.files import read_json, write_json
from asr_kd.models.acoustic import build_model, parameters
from asr_kd.models.settings import ModelSettings
from asr_kd.shards.leases import sole_writer
from asr_kd.units import load_units

HERE = Path(__file__).parent
TASK = "strong"
#: the student of the task that learns soft targets; each candidate takes its place, and its start's
STUDENT = Arm("soft")
#: turns of the frame-by-frame timing, whose median counts
TURNS = 5
COSTS = {"parameters": "parameters", "real-time-factor": "real_time_factor"}


@dataclass
class Lab:
    """Trains candidates as the task's student, and knows what they cost.

    Attributes:
        root: folder of all tasks.
        variables: in place of those of the task's file.
    """

    root: Path
    variables: Mapping[str, Any]
    jobs: int
    known: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """What belongs to the search alone."""
        return self.root / TASK / "search"

    def settings(self, seed: int) -> dict[str, Any]:
        """Settings of the task's student with a seed."""
        task = task_of(TASK, seed, self.variables)
        return dict(filled(student_of(task["stages"], STUDENT, None), task["values"]))

    def train(self, wanted: Sequence[tuple[Candidate, int]], seed: int = 0, needed: bool = False) -> list[float]:
        """Development WERs of candidates after so many passes each; 1 for one whose training fails, a UserError if it is `needed`, or what it needs
        fails."""
        stages = self.stages(wanted, seed)
        failed = run_stages(self.root, stages, self.jobs)
        lead = f"{TASK}-{seed}-"
        own = {lead + name for student, passes in wanted for name in (begun(student), trained(student, passes))}
        if lost := failed if needed else failed - own:
            raise UserError(f"these stages failed: {', '.join(sorted(lost))}; see above, and run the command again")
        wers = []
        for student, passes in wanted:
            name = trained(student, passes)
            best = self.root / TASK / f"seed{seed}" / name / "best" / "checkpoint.json"
            broken = f"{TASK}-{seed}-{name}" in failed
            wers.append(1.0 if broken else float(read_json(best)["training"]["development_wer"]))
        return wers

    def stages(self, wanted: Sequence[tuple[Candidate, int]], seed: int) -> dict[str, Any]:
        """The task's own stages, and for each candidate its start and its training."""
        found = stages_of(TASK, seed, [(STUDENT, None)], self.variables)
        like = found.pop(f"{TASK}-{seed}-{STUDENT.stage(None)}")["settings"]
        for student, passes in wanted:
            settings = copy.deepcopy(like) | {"model": student.model.model_dump()}
            settings["output"] = f"${{run}}/{TASK}/seed{seed}/{trained(student, passes)}"
            settings["phases"][0] |= {"passes": passes, "learning_rate": student.rate}
            found |= with_own_start(found, f"{TASK}-{seed}-", begun(student), settings)
        return found

    def test(self, students: Mapping[str, Candidate], passes: int, seeds: range) -> list[dict[str, Any]]:
        """Each seed's systems of a report on the test set: the teacher, and these by their names."""
        reports = []
        for seed in seeds:
            run = f"${{run}}/{TASK}/seed{seed}"
            stages = self.stages([(student, passes) for student in students.values()], seed)
            systems = {name: f"{run}/{trained(student, passes)}" for name, student in students.items()}
            settings = {
                "systems": {"teacher": f"{run}/teacher", **systems}, "audio": f"${{run}}/{TASK}/data/test",
                "output": f"{run}/search-report", "teacher": "teacher", "bootstrap": 0, "threads": 1,
            }  # fmt: skip
            stages[f"{TASK}-{seed}-search-report"] = {"verb": "eval", "settings": settings}
            if failed := run_stages(self.root, stages, self.jobs):
                raise UserError(
                    f"these stages failed: {', '.join(sorted(failed))}; see above, and run the command again"
                )
            reports.append(read_json(self.root / TASK / f"seed{seed}" / "search-report" / "report.json")["systems"])
        return reports

    def costs(self, student: Candidate) -> dict[str, float]:
        """Parameters and real-time factor of a candidate, measured once: the network frame by frame, one thread."""
        file, name = self.folder / "costs.json", student.model.model_dump_json()
        if not self.known and file.exists():
            self.known = read_json(file)
        if name not in self.known:
            features = build(FeatureSettings, self.settings(0)["features"], "features")
            units = load_units(str(self.root / TASK / "seed0" / "units")).size
            torch.set_num_threads(1)
            factor = statistics.median(streaming(student.model, features, units)[0] for _ in range(TURNS))
            size = parameters(build_model(student.model, features.dimension, units))
            self.known[name] = {"parameters": size, "real_time_factor": factor}
            write_json(file, self.known)
        return self.known[name]


def begun(student: Candidate) -> str:
    """Name of the training that it begins from, and of its folder."""
    return f"search-{student.name}-start"


def trained(student: Candidate, passes: int) -> str:
    """Name of a training, and of its folder."""
    return f"search-{student.name}-{passes}-passes"


def draw(file: Path, searches: Mapping[str, Sequence[Tried]], goal: Goal, lab: Lab) -> None:
    """A picture of all that was trained in full: cost against development WER, each method's front as a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, (method, tried) in enumerate(searches.items()):
        full = [one for one in tried if goal.rungs[-1] in one.wers]
        points = [(lab.costs(one.student)[goal.by], 100 * one.wers[goal.rungs[-1]]) for one in full]
        colour, best = f"C{number}", front(points)
        axes.scatter(
            *zip(*points, strict=True), color=colour, s=18, marker="os^"[number % 3], alpha=0.6
        ) if points else None
        axes.step(
            *zip(*best, strict=True), where="post", color=colour, label=f"{method}: {len(full)} in full"
        ) if best else None
    axes.axhline(100 * goal.within, color="grey", linewidth=1, linestyle=":", label=f"{100 * goal.within:.2f} %")
    axes.scatter(
        [goal.standard_cost], [100 * goal.standard[-1]], color="black", marker="*", s=90, label="task's student"
    )
    axes.set_xscale("log")
    axes.set_xlabel(goal.by.replace("_", " "))
    axes.set_ylabel(f"development WER %, {goal.rungs[-1]} passes")
    axes.legend()
    figure.savefig(file, dpi=120)
    print(f"\n{file}")


def print_searches(searches: Mapping[str, Sequence[Tried]], goal: Goal, lab: Lab) -> dict[str, Candidate]:
    """What each method spent and found; returns the students that it found, by method."""
    full, found = goal.rungs[-1], dict[str, Candidate]()
    print(
        f"\n| search for least {goal.by.replace('_', ' ')} within {100 * goal.within:.2f} % | passes spent | students | in full | found | "
        "parameters | real-time factor | development WER % |\n|---|---|---|---|---|---|---|---|"
    )
    for method, tried in searches.items():
        spent, whole = sum(sum(one.wers) for one in tried), sum(full in one.wers for one in tried)
        cells = [method, f"{spent:,}", f"{len(tried)}", f"{whole}"]
        if best := winner(tried, goal, lab.costs):
            found[method], costs = best.student, lab.costs(best.student)
            cells += [
                best.student.name,
                f"{costs['parameters']:,}",
                f"{costs['real_time_factor']:.5f}",
                f"{100 * best.wers[full]:.2f}",
            ]
        else:
            nearest = min((one.wers[full] for one in tried if full in one.wers), default=None)
            cells += [
                f"none within it{f'; the best has {100 * nearest:.2f} %' if nearest is not None else ''}",
                "–",
                "–",
                "–",
            ]
        print(f"| {' | '.join(cells)} |")
    return found


def print_proxies(tried: Sequence[Tried], goal: Goal, lab: Lab) -> None:
    """Rank correlation of few passes and of all, over students that chance has chosen: the halving's own are a selection by the proxy."""
    whole = [one for one in tried if goal.rungs[-1] in one.wers]
    print(
        f"\n| passes | rank correlation with {goal.rungs[-1]} passes (Spearman, {len(whole)} students of random search) |\n|---|---|"
    )
    for passes in goal.rungs[:-1]:
        proxies = lab.train([(one.student, passes) for one in whole])
        found = rank_correlation(proxies, [one.wers[goal.rungs[-1]] for one in whole])
        print(f"| {passes} | {'not defined' if found is None else f'{found:.2f}'} |")


def print_test(students: Mapping[str, Candidate], passes: int, seeds: range, lab: Lab) -> None:
    """Word error rates on the test set, which was not looked at before, and paired differences from the task's student."""
    reports = lab.test(students, passes, seeds)
    base = [report["standard"]["wer"] for report in reports]
    print(
        f"\n| student | parameters | real-time factor, stream | test WER %, mean of {len(reports)} | each seed | against standard, points | which shows |"
        "\n|---|---|---|---|---|---|---|"
    )
    for name in ("teacher", *students):
        wers, factor, points, shown = [report[name]["wer"] for report in reports], "–", "–", "–"
        if name in students:
            factor = f"{lab.costs(students[name])['real_time_factor']:.5f}"
        if name not in ("teacher", "standard"):
            mean, half = paired(wers, base)
            points = f"{100 * mean:+.2f}" + (f" ± {100 * half:.2f}" if half is not None else "")
            shown = verdict(mean, half, statistics.mean(base))
        size = f"{reports[0][name]['parameters']:,}"
        print(
            f"| {' | '.join([name, size, factor, f'{100 * statistics.mean(wers):.2f}', each(wers), points, shown])} |"
        )


def search_all(given: argparse.Namespace, space: Space, lab: Lab) -> None:
    """The whole comparison: the standard, each method's search, tables, picture, and the test."""
    like = lab.settings(0)
    passes = int(like["phases"][0]["passes"])
    standard = Candidate("standard", build(ModelSettings, like["model"], TASK), like["phases"][0]["learning_rate"])
    rungs = rungs_of(passes, given.factor, given.rungs)
    wers = lab.train([(standard, number) for number in rungs], needed=True)
    by = COSTS[given.by]
    limits = {"parameters": given.most_parameters, "real_time_factor": given.most_real_time_factor}
    goal = Goal(
        by, wers[-1] if given.within is None else given.within, {name: most for name, most in limits.items() if most},
        rungs, given.factor, wers, lab.costs(standard)[by],
    )  # fmt: skip
    searches = {}
    for method in given.methods:
        print(f"search: {method}", flush=True)
        searches[method] = Search(
            method, space, goal, lab.costs, lab.train, given.budget * passes, lab.folder / "journal.log", given.seed
        ).run()
    found = print_searches(searches, goal, lab)
    draw(lab.folder / f"front-{given.by}.png", searches, goal, lab)
    if "random" in searches:
        print_proxies(searches["random"], goal, lab)
    if found:
        print_test({"standard": standard, **found}, passes, range(given.seeds), lab)
    else:
        print("nothing was found within it: nothing is tested; give a higher --within or a larger --budget")


def main() -> None:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--by", choices=COSTS, default="parameters", help="what is to be small")
    parser.add_argument(
        "--within",
        type=float,
        metavar="WER",
        help="development WER at most, 0.06 is 6 %%; that of the task's student without it",
    )
    parser.add_argument("--most-parameters", type=int, metavar="N", help="students with more are not trained")
    parser.add_argument(
        "--most-real-time-factor",
        type=float,
        metavar="X",
        help="nor those that take more seconds for a second, frame by frame",
    )
    parser.add_argument("--budget", type=int, default=16, help="of each method, in full trainings")
    parser.add_argument(
        "--factor", type=int, default=3, help="one student in so many goes on, for so many times the passes"
    )
    parser.add_argument("--rungs", type=int, default=3, help="of the halving, the last in full")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--space", type=Path, default=HERE / "space.yaml")
    parser.add_argument("--seed", type=int, default=0, help="of the proposals; trainings of the search have seed 0")
    parser.add_argument("--seeds", type=int, default=3, help="with which what was found is tested")
    parser.add_argument("--passes", type=int, help="in place of the task's: for a quick look, with another --output")
    parser.add_argument("--jobs", type=int, default=2, help="trainings side by side, one thread each")
    parser.add_argument("--output", type=Path, default=Path("runs/taxonomy"))
    given = parser.parse_args()
    for name, least in (("budget", 1), ("factor", 2), ("rungs", 1), ("seeds", 1), ("seed", 0)):
        if getattr(given, name) < least:
            parser.error(f"--{name}: give {least} or more")
    if given.within is not None and not 0 < given.within < 1:
        parser.error("--within is a share of the words, as 0.06: give one between 0 and 1")
    try:
        need_optuna()
        lab = Lab(given.output, {} if given.passes is None else {"passes": given.passes}, given.jobs)
        lab.folder.mkdir(parents=True, exist_ok=True)
        with sole_writer(lab.folder):
            search_all(given, read_space(given.space), lab)
    except UserError as error:
        print(f"measure: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
