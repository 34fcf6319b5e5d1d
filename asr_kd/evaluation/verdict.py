"""What the figures of a report say in words: one sentence on top, and what belongs below it."""

from __future__ import annotations

from collections.abc import Mapping

from asr_kd.evaluation.formats import SURE, change, changes, percent, share, sureness
from asr_kd.evaluation.schema import Interval, Pair, Report
from asr_kd.evaluation.settings import EvalSettings
from asr_kd.models.origin import won_nothing


def student_of(roles: EvalSettings | Report, rates: Mapping[str, float]) -> str:
    """The system that a report is about: the named student, else the best one that has no other role, else the best."""
    best = sorted(rates, key=lambda name: rates[name])
    free = [name for name in best if name not in (roles.baseline, roles.teacher)]
    return roles.student or (free or best)[0]


def student(report: Report) -> str:
    """The same of a report."""
    return student_of(report, {name: one.wer for name, one in report.systems.items()})


def verdict(report: Report) -> str:
    """One sentence: the student's word errors against baseline and teacher, how sure that is, or else its WER alone."""
    name, systems = student(report), report.systems
    roles: dict[str, str] = {}
    for role, other in roles_of(report).items():
        if other != name:
            roles.setdefault(other, role)
    if roles:
        against = ", and ".join(_against(report, name, other, role) for other, role in roles.items())
        over = f" over {len(report.sets)} sets" if len(report.sets) > 1 else ""
        return f"{name} ({percent(systems[name].wer)} WER{over}) makes {against}."
    one, best = systems[name], ranked(report)[0]
    counted = f"{percent(one.wer)} ({one.errors:,} errors in {one.words:,} words{_within(one.interval)})"
    if len(systems) == 1:
        return f"{name} has a WER of {counted}."
    if one.wer == systems[best].wer:
        return f"{name} has the lowest WER of {len(systems)} systems, {counted}."
    return f"{name} has a WER of {counted}, where {best}, the best of {len(systems)} systems, has {percent(systems[best].wer)}."


def below_it(report: Report) -> list[str]:
    """Whose training won nothing, the share of the gap, and how the other systems compare with the student."""
    name, systems = student(report), report.systems
    baseline, teacher = report.baseline, report.teacher
    said = _without_gain(report, name)
    if baseline is not None and teacher is not None and baseline != teacher:
        gap = systems[baseline].wer - systems[teacher].wer
        if gap <= 0:
            said.append(
                f"The teacher {teacher} ({percent(systems[teacher].wer)}) is no better than the baseline {baseline} "
                f"({percent(systems[baseline].wer)}): there is no gap to recover."
            )
        elif name not in (baseline, teacher):
            bounds = systems[name].gap_recovered_interval
            within = f" (95 % interval {changes(bounds)} %)" if bounds else ""
            said.append(
                f"{name} recovers {share(systems[name].gap_recovered)}{within} of the {100 * gap:.2f} points of WER "
                f"from {baseline} to {teacher} ({sureness(_pair(report, baseline, teacher))})."
            )
    for role, other in roles_of(report).items():
        rates = [(one, mine.wer, systems[other].sets[one].wer) for one, mine in systems[name].sets.items()]
        worse = [
            f"{one} ({percent(mine)} against {percent(theirs)})"
            for one, mine, theirs in rates
            if mine is not None and theirs is not None and mine > theirs
        ]
        if worse and systems[name].wer < systems[other].wer:
            said.append(f"Yet {name} is worse than the {role} in {', '.join(worse)}.")
    beside: dict[str, list[str]] = {}
    for other in ranked(report):
        if other not in (name, baseline, teacher):
            pair = _pair(report, other, name)
            better = "better" if (pair.difference < 0) == (pair.a == other) else "worse"
            how = f"significantly {better}" if sureness(pair) == SURE else sureness(pair)
            beside.setdefault(how, []).append(f"{other} ({percent(systems[other].wer)})")
    if beside:
        groups = "; ".join(f"{how}: {', '.join(others)}" for how, others in beside.items())
        said.append(f"Against {name}, {groups}.")
    return said


def _without_gain(report: Report, name: str) -> list[str]:
    """The systems that are what they started from, the student first."""
    systems, baseline, said = report.systems, report.baseline, []
    for one in sorted(systems, key=lambda other: other != name):
        start = systems[one].started_from
        lost = start and won_nothing({"started_from": start.model_dump()})
        same = one == name != baseline and baseline and systems[one].fingerprint == systems[baseline].fingerprint
        if same:
            why = f": {lost}" if lost else ""
            said.append(f"{one} is the baseline {baseline}, with the same weights to the bit{why}.")
        elif lost:
            said.append(f"{one}'s training won nothing: {lost}.")
    return said


def ranked(report: Report) -> list[str]:
    """The systems, the best first."""
    return sorted(report.systems, key=lambda name: report.systems[name].wer)


def roles_of(report: Report) -> dict[str, str]:
    """The systems that are baseline and teacher, by role."""
    roles = {"baseline": report.baseline, "teacher": report.teacher}
    return {role: name for role, name in roles.items() if name is not None}


def _pair(report: Report, one: str, other: str) -> Pair:
    return next(pair for pair in report.pairs if {pair.a, pair.b} == {one, other})


def _against(report: Report, name: str, other: str, role: str) -> str:
    mine, theirs = report.systems[name], report.systems[other]
    moved, bounds = (getattr(mine, f"relative_change_to_{role}{kind}") for kind in ("", "_interval"))
    if moved is None:
        much = f"{mine.errors:,} word errors where"
    elif round(abs(moved), 3) == 0:
        much = "as many word errors as"
    else:
        much = f"{100 * abs(moved):.1f} % {'fewer' if moved < 0 else 'more'} word errors than"
    called = f"the {role}" if other == role else f"the {role} {other}"
    told = f"{percent(theirs.wer)}{_moved_within(bounds)}, {sureness(_pair(report, name, other))}"
    return f"{much} {called}{' makes none' if moved is None else ''} ({told})"


def _within(bounds: Interval | None) -> str:
    return f"; 95 % interval {percent(bounds[0])} to {percent(bounds[1])}" if bounds else ""


def _moved_within(bounds: Interval | None) -> str:
    """The interval of a relative change: a sign beside "fewer" would say it twice, so there is one only where it spans zero."""
    if not bounds:
        return ""
    if bounds[0] <= 0 <= bounds[1]:
        return f"; 95 % interval {change(bounds[0])} to {change(bounds[1])}"
    least, most = sorted(100 * abs(bound) for bound in bounds)
    return f"; 95 % interval {least:.1f} to {most:.1f} % {'fewer' if bounds[1] < 0 else 'more'}"
