"""What the figures of a report say in words: one sentence on top, and what belongs below it."""

from __future__ import annotations

from typing import Any

from asr_kd.evaluation.figures import SURE, change, changes, percent, share, sureness
from asr_kd.models.origin import won_nothing

Report = dict[str, Any]


def student(report: Report) -> str:
    """The system that the report is about: the named student, else the best one that has no other role, else the best."""
    best = _ranked(report)
    free = [name for name in best if name not in (report["baseline"], report["teacher"])]
    return report["student"] or (free or best)[0]


def verdict(report: Report) -> str:
    """One sentence: the student's word errors against baseline and teacher, how sure that is, or else its WER alone."""
    name, systems = student(report), report["systems"]
    roles: dict[str, str] = {}
    for role in ("baseline", "teacher"):
        if report[role] not in (None, name):
            roles.setdefault(report[role], role)
    if roles:
        against = ", and ".join(_against(report, name, other, role) for other, role in roles.items())
        over = f" over {len(report['sets'])} sets" if len(report["sets"]) > 1 else ""
        return f"{name} ({percent(systems[name]['wer'])} WER{over}) makes {against}."
    one, best = systems[name], _ranked(report)[0]
    counted = f"{percent(one['wer'])} ({one['errors']:,} errors in {one['words']:,} words{_within(one['interval'])})"
    if len(systems) == 1:
        return f"{name} has a WER of {counted}."
    if one["wer"] == systems[best]["wer"]:
        return f"{name} has the lowest WER of {len(systems)} systems, {counted}."
    return f"{name} has a WER of {counted}, where {best}, the best of {len(systems)} systems, has {percent(systems[best]['wer'])}."


def below_it(report: Report) -> list[str]:
    """Sentences that the verdict has no room for.

    Whose training won nothing, the share of the gap, and how the other systems compare with the student.
    """
    name, systems = student(report), report["systems"]
    baseline, teacher = report["baseline"], report["teacher"]
    said = _without_gain(report, name)
    if None not in (baseline, teacher) and baseline != teacher:
        gap = systems[baseline]["wer"] - systems[teacher]["wer"]
        if gap <= 0:
            said.append(
                f"The teacher {teacher} ({percent(systems[teacher]['wer'])}) is no better than the baseline {baseline} "
                f"({percent(systems[baseline]['wer'])}): there is no gap to recover."
            )
        elif name not in (baseline, teacher):
            bounds = systems[name]["gap_recovered_interval"]
            within = f" (95 % interval {changes(bounds)} %)" if bounds else ""
            said.append(
                f"{name} recovers {share(systems[name]['gap_recovered'])}{within} of the {100 * gap:.2f} points of WER "
                f"from {baseline} to {teacher} ({sureness(_pair(report, baseline, teacher))})."
            )
    for role in ("baseline", "teacher"):
        other = report[role]
        if other not in (None, name) and systems[name]["wer"] < systems[other]["wer"]:
            said += _worse_sets(
                systems[name]["sets"], systems[other]["sets"], f"Yet {name} is worse than the {role} in"
            )
    beside: dict[str, list[str]] = {}
    for other in _ranked(report):
        if other not in (name, baseline, teacher):
            beside.setdefault(_beside(report, other, name), []).append(f"{other} ({percent(systems[other]['wer'])})")
    if beside:
        groups = "; ".join(f"{how}: {', '.join(others)}" for how, others in beside.items())
        said.append(f"Against {name}, {groups}.")
    return said


def _without_gain(report: Report, name: str) -> list[str]:
    """The systems that are what they started from, the student first."""
    systems, baseline, said = report["systems"], report["baseline"], []
    for one in sorted(systems, key=lambda other: other != name):
        lost = won_nothing(systems[one])
        same = one == name != baseline and baseline and systems[one]["fingerprint"] == systems[baseline]["fingerprint"]
        if same:
            said.append(
                f"{one} is the baseline {baseline}, with the same weights to the bit{f': {lost}' if lost else ''}."
            )
        elif lost:
            said.append(f"{one}'s training won nothing: {lost}.")
    return said


def _worse_sets(mine: Report, theirs: Report, what: str) -> list[str]:
    """The sets in which a system that is better over all is worse."""
    worse = [
        f"{one} ({percent(mine[one]['wer'])} against {percent(theirs[one]['wer'])})"
        for one in mine
        if None not in (mine[one]["wer"], theirs[one]["wer"]) and mine[one]["wer"] > theirs[one]["wer"]
    ]
    return [f"{what} {', '.join(worse)}."] if worse else []


def _ranked(report: Report) -> list[str]:
    return sorted(report["systems"], key=lambda name: report["systems"][name]["wer"])


def _pair(report: Report, one: str, other: str) -> dict[str, Any]:
    return next(pair for pair in report["pairs"] if {pair["a"], pair["b"]} == {one, other})


def _against(report: Report, name: str, other: str, role: str) -> str:
    mine, theirs = report["systems"][name], report["systems"][other]
    moved, bounds = (mine[f"relative_change_to_{role}{end}"] for end in ("", "_interval"))
    if moved is None:
        much = f"{mine['errors']:,} word errors where"
    elif round(abs(moved), 3) == 0:
        much = "as many word errors as"
    else:
        much = f"{100 * abs(moved):.1f} % {'fewer' if moved < 0 else 'more'} word errors than"
    called = f"the {role}" if other == role else f"the {role} {other}"
    how_sure = sureness(_pair(report, name, other))
    signed = _within(bounds and [*map(change, bounds)])
    return f"{much} {called}{' makes none' if moved is None else ''} ({percent(theirs['wer'])}{signed}, {how_sure})"


def _beside(report: Report, other: str, name: str) -> str:
    """How another system compares with the student."""
    pair = _pair(report, other, name)
    if sureness(pair) != SURE:
        return sureness(pair)
    return f"significantly {'better' if (pair['difference'] < 0) == (pair['a'] == other) else 'worse'}"


def _within(bounds: list[Any] | None) -> str:
    if bounds is None:
        return ""
    low, high = (bound if isinstance(bound, str) else percent(bound) for bound in bounds)
    return f"; 95 % interval {low} to {high}"
