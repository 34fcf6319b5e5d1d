"""The search: Optuna proposes students, successive halving stops the bad ones early, and a journal lets it go on after an interruption.

A search depends on its settings, its seed and what the trainings say alone: killed at any moment and started again, it ends in the same
students. So each proposal has a sampler of its own seed, proposals are made in twos however many trainings run side by side, and who goes on
is decided here: Optuna's pruner marks a trial before it answers, and one killed in between would go on unseen.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from space import Candidate, Space, candidate, grid

from asr_kd.errors import UserError
from asr_kd.files import hash_json

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial

Method = Literal["halving", "random", "grid"]
METHODS: tuple[Method, ...] = ("halving", "random", "grid")
#: proposals that are made before any of them is known
TOGETHER = 2
#: a tenth more errors than asked weigh as much as a size or time of e^0.5, 1.6 times
PENALTY = 5.0
#: a search ends when so many proposals in a row were known or beyond the limits
STALE = 100
#: trains students for so many passes each; returns their development WERs
Train = Callable[[Sequence[tuple[Candidate, int]]], list[float]]


@dataclass(frozen=True)
class Goal:
    """What is looked for: the least of one cost within a WER, and what may not be exceeded.

    Attributes:
        by: name of the cost.
        within: development WER at most, after all passes.
        limits: costs at most, by name.
        rungs: passes of each training on the way, the last in full.
        factor: of the students on a rung, one in so many goes on to the next.
        standard: development WERs of the student that others are measured by, on each rung.
        standard_cost: its cost.
    """

    by: str
    within: float
    limits: Mapping[str, float]
    rungs: Sequence[int]
    factor: int
    standard: Sequence[float]
    standard_cost: float

    def value(self, cost: float, wer: float, rung: int) -> float:
        """What is minimised: the cost, and what the WER exceeds that which is allowed after so many passes.

        Less training leaves more errors: on an early rung as many more are allowed as the standard has there.
        """
        scale = self.standard[rung] / self.standard[-1] if self.standard[-1] else 1.0
        allowed = max(self.within * scale, 1e-6)
        return math.log(cost / self.standard_cost) + PENALTY * max(0.0, wer / allowed - 1)

    def beyond(self, costs: Mapping[str, float]) -> bool:
        """Whether a student exceeds a limit."""
        return any(costs[name] > most for name, most in self.limits.items())


@dataclass(frozen=True)
class Tried:
    """A student that a search has trained; its development WER by passes."""

    student: Candidate
    wers: Mapping[int, float]


def rungs_of(passes: int, factor: int, rungs: int) -> list[int]:
    """Passes on each rung, the last in full, each a `factor` fewer than the next: 24 by 3 → 3, 8, 24."""
    return sorted({max(1, round(passes / factor**below)) for below in range(rungs)})


def need_optuna() -> None:
    """Say how to get Optuna where it is missing, with a UserError."""
    try:
        import optuna
    except ImportError:
        raise UserError("search: needs the extra search; install it with pip install 'asr-kd[search]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)


class Search:
    """One method's search, in a journal.

    Args:
        method: halving (TPE, and successive halving over the rungs), random or grid (all that is proposed is trained in full).
        space: what is searched.
        goal: what is looked for.
        costs: of a student, by name.
        train: see `Train`.
        budget: passes that may be spent; a training that was begun is finished. Passes that this search has paid for are free.
        journal: file in which the trials are kept.
        seed: of the proposals.
    """

    def __init__(
        self, method: Method, space: Space, goal: Goal, costs: Callable[[Candidate], Mapping[str, float]], train: Train,
        budget: int, journal: Path, seed: int,
    ) -> None:  # fmt: skip
        need_optuna()
        self.method, self.space, self.goal, self.costs, self.train = method, space, goal, costs, train
        self.budget, self.journal, self.seed = budget, journal, seed
        self.rungs = goal.rungs if method == "halving" else goal.rungs[-1:]
        self.points = grid(space, budget // goal.rungs[-1]) if method == "grid" else []

    def run(self) -> list[Tried]:
        """Search until the budget is spent, or nothing new is proposed; returns what was trained, in the order of the proposals."""
        from optuna.trial import TrialState

        study = self._study()
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if "name" not in trial.user_attrs:  # killed while it was proposed
                study.tell(trial.number, state=TrialState.FAIL)
        while True:
            trials = proposed(study)
            running = [trial for trial in trials if not trial.state.is_finished()]
            if (not running or len(trials) % TOGETHER) and self._goes_on(trials):
                self._propose(study, len(trials))
            elif running:
                self._step(study, running)
            else:
                return self._tried(trials)

    def _study(self) -> Study:
        """The study in the journal that has all that decides the search in its name."""
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        asked = {"space": self.space, "goal": asdict(self.goal), "seed": self.seed, "points": self.points}
        name = f"{self.method}-{hash_json(asked)}"
        storage = JournalStorage(JournalFileBackend(str(self.journal)))
        return optuna.create_study(study_name=name, storage=storage, load_if_exists=True)

    def _goes_on(self, trials: Sequence[FrozenTrial]) -> bool:
        if self.method == "grid":
            return len(trials) < len(self.points)
        paid = [self._spent(trials[:at]) for at in (max(0, len(trials) - STALE), len(trials))]
        return paid[1] < self.budget and (len(trials) < STALE or paid[0] < paid[1])

    def _spent(self, trials: Sequence[FrozenTrial]) -> int:
        return sum(
            {
                (trial.user_attrs["name"], rung): self.rungs[rung]
                for trial in trials
                for rung in trial.intermediate_values
            }.values()
        )

    def _propose(self, study: Study, number: int) -> None:
        """One more trial, from what is known."""
        from optuna.samplers import RandomSampler, TPESampler
        from optuna.trial import TrialState

        seed = int.from_bytes(hashlib.sha256(f"{self.seed} {number}".encode()).digest()[:4])
        # where it has just proposed what was known, chance looks elsewhere
        lately = [trial.state for trial in proposed(study) if trial.state.is_finished()][-TOGETHER:]
        guess = self.method == "random" or TrialState.FAIL in lately
        study.sampler = RandomSampler(seed=seed) if guess else TPESampler(seed=seed)
        trial = study.ask()
        if self.method == "grid":
            kind, values = self.points[number]
        else:
            kind = trial.suggest_categorical("kind", list(self.space))
            values = {
                name: trial.suggest_categorical(f"{kind}.{name}", list(every))
                for name, every in self.space[kind].items()
            }
        trial.set_user_attr("student", [kind, values])
        made = candidate(kind, values)
        trial.set_user_attr("name", made.name if made else "")

    def _step(self, study: Study, running: Sequence[FrozenTrial]) -> None:
        """Decide which of these go on, and train them on their next rung."""
        from optuna.trial import Trial, TrialState

        names = [trial.user_attrs["name"] for trial in proposed(study)]
        due: list[tuple[FrozenTrial, Candidate, int]] = []
        for frozen in running:
            student = candidate(*frozen.user_attrs["student"])
            if student is None or self.goal.beyond(self.costs(student)):
                study.tell(frozen.number, state=TrialState.PRUNED)
            elif (
                student.name in names[: self._place(study, frozen)]
            ):  # proposed before: nothing to learn, for the sampler neither
                study.tell(frozen.number, state=TrialState.FAIL)
            elif self._decide(study, frozen):
                due.append((frozen, student, len(frozen.intermediate_values)))
        wers = self.train([(student, self.rungs[rung]) for _, student, rung in due]) if due else []
        for (frozen, student, rung), wer in zip(due, wers, strict=True):
            trial = Trial(study, frozen._trial_id)
            trial.set_user_attr(f"wer {rung}", wer)
            cost, above = self.costs(student)[self.goal.by], len(self.goal.rungs) - len(self.rungs)
            trial.report(self.goal.value(cost, wer, rung + above), rung)

    @staticmethod
    def _place(study: Study, frozen: FrozenTrial) -> int:
        """How many were proposed before this one."""
        return sum(trial.number < frozen.number for trial in proposed(study))

    def _decide(self, study: Study, frozen: FrozenTrial) -> bool:
        """Whether a trial goes on: on its last rung it ends, before it where it is not in the best of those that came so far.

        Asynchronous successive halving (Li et al. 2018, arXiv 1810.05934): who reaches a rung early is compared with few.
        """
        from optuna.trial import TrialState

        reached = frozen.intermediate_values
        if not reached:
            return True
        rung, value = max(reached), reached[max(reached)]
        if rung == len(self.rungs) - 1:
            study.tell(frozen.number, value)
            return False
        others = [
            one.intermediate_values[rung]
            for one in proposed(study)
            if rung in one.intermediate_values and one.number <= frozen.number
        ]
        if sum(other < value for other in others) < max(1, len(others) // self.goal.factor):
            return True
        study.tell(frozen.number, state=TrialState.PRUNED)
        return False

    def _tried(self, trials: Sequence[FrozenTrial]) -> list[Tried]:
        found: dict[str, Tried] = {}
        for trial in trials:
            student = candidate(*trial.user_attrs["student"])
            wers = {self.rungs[rung]: trial.user_attrs[f"wer {rung}"] for rung in trial.intermediate_values}
            if student and wers:
                known = found[student.name].wers if student.name in found else {}
                found[student.name] = Tried(student, {**known, **wers})
        return list(found.values())


def proposed(study: Study) -> list[FrozenTrial]:
    """The trials that have their name, in their order."""
    return [trial for trial in study.get_trials(deepcopy=False) if "name" in trial.user_attrs]


def winner(tried: Sequence[Tried], goal: Goal, costs: Callable[[Candidate], Mapping[str, float]]) -> Tried | None:
    """Of the students that were trained in full the one with the least cost within the WER; then the lowest WER. None: there is none."""
    full = goal.rungs[-1]
    good = [one for one in tried if one.wers.get(full, math.inf) <= goal.within]
    return min(good, key=lambda one: (costs(one.student)[goal.by], one.wers[full]), default=None)


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (cost, WER) those that no other one beats in both, by rising cost."""
    best: list[tuple[float, float]] = []
    for cost, wer in sorted(set(points)):
        if not best or wer < best[-1][1]:
            best.append((cost, wer))
    return best


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Spearman's: of the ranks, ties sharing the mean of theirs; None for fewer than three, or where all are alike."""

    def ranks(values: Sequence[float]) -> list[float]:
        return [sum(theirs < own for theirs in values) + sum(theirs == own for theirs in values) / 2 for own in values]

    first, second = ranks(one), ranks(other)
    if len(first) < 3 or len(set(first)) < 2 or len(set(second)) < 2:
        return None
    middle = sum(first) / len(first)
    a, b = [value - middle for value in first], [value - middle for value in second]
    both = sum(x * y for x, y in zip(a, b, strict=True))
    return both / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
