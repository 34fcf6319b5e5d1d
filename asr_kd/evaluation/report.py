"""The WER report for people: verdict and Markdown table, drawn from the JSON report; the page is in `page.py`."""

from __future__ import annotations

from functools import partial
from typing import Any

from asr_kd.evaluation.evidence import gather
from asr_kd.evaluation.figures import (
    change,
    decoder,
    intervals_note,
    lookahead,
    named_slices,
    p_value,
    percent,
    points,
    ratio,
    said_of_pair,
    share,
    size,
    span,
    table,
    threads,
)
from asr_kd.evaluation.page import drawn, render_html, searchable
from asr_kd.evaluation.utterances import pack, read_lines
from asr_kd.files import Place, write_json, write_whole

FORMAT, VERSION = "asr_kd-report", 2


def write_report(folder: Place, report: dict[str, Any]) -> None:
    """Write report.md, report.html and, last, report.json.

    Reads `utterances.jsonl` of the folder for the table of the page and, for a few utterances, audio and checkpoints.
    """
    packed = pack(
        partial(read_lines, folder / "utterances.jsonl"),
        list(report["systems"]),
        searchable(report),
        {(one["set"], one["key"]) for one in report["samples"]},
        report["data"]["utterances"],
    )
    with write_whole(folder / "report.md", "w", make_folder=False) as file:
        file.write(render_markdown(report))
    with write_whole(folder / "report.html", "w", make_folder=False) as file:
        file.write(render_html(report, packed, gather(report, drawn(report))))
    write_json(folder / "report.json", report, make_folder=False)


def render_markdown(report: dict[str, Any]) -> str:
    """Verdict, table, what is sure, slices and origin, to paste into a page."""
    data, bootstrap = report["data"], report["bootstrap"]
    left_out = f", {data['quarantined']:,} left out" if data["quarantined"] else ""
    audio = ", ".join(f"`{one['audio']}`, {one['hash']}" for one in report["sets"].values())
    origin = (
        f"{data['utterances']:,} utterances{left_out}, {data['words']:,} words, {data['seconds'] / 3600:.2f} hours "
        f"({audio}); normaliser {report['normalizer']}; decoder {decoder(report)}; "
        f"{intervals_note(bootstrap)}; real-time factor of front end and network on {report['device']}, "
        f"{threads(report)}."
    )
    parts = ["# WER report", _escaped(report["verdict"]), system_table(report)]
    if report["pairs"]:
        parts.append("Differences in WER, points (*p* of the paired bootstrap and of MAPSSWE):")
        parts.append("\n".join(f"- {_pair(pair)}" for pair in report["pairs"]))
    for title, slices in named_slices(report):
        parts.append(f"{_escaped(title)}:")
        parts.append("\n".join(f"- {_escaped(where)}: {figures}" for where, figures in slices))
    return "\n\n".join([*parts, origin]) + "\n"


def _pair(pair: dict[str, Any]) -> str:
    bounds = f" ({points(pair['interval'][0])} to {points(pair['interval'][1])})" if pair["interval"] else ""
    tests = f"*p* {p_value(pair['p_bootstrap'])}, {p_value(pair['mapsswe']['p'])}"
    names = _escaped(f"{pair['a']} − {pair['b']}")
    return f"{names}: {points(pair['difference'])}{bounds}, {tests}: {_escaped(said_of_pair(pair))}"


def _escaped(text: str) -> str:
    """Text that Markdown, and the HTML that Markdown may hold, leaves as it is."""
    for mark in "\\`*[<|":
        text = text.replace(mark, f"\\{mark}")
    return text.replace("\n", " ")


def system_table(report: dict[str, Any]) -> str:
    """The systems as a Markdown table that is also easy to read in a terminal."""
    head = ["system", "WER", "95 % interval", "sub", "del", "ins", "vs baseline", "vs teacher", "gap recovered"]
    head += ["parameters", "size", "look-ahead", "RTF", "RTF / teacher"]
    rows = [head]
    for name, system in report["systems"].items():
        rows.append([
            _escaped(name), percent(system["wer"]), span(system["interval"]),
            *(f"{system[kind]:,}" for kind in ("substitutions", "deletions", "insertions")),
            change(system["relative_change_to_baseline"]), change(system["relative_change_to_teacher"]),
            share(system["gap_recovered"]), f"{system['parameters']:,}", size(system["size_bytes"]),
            lookahead(system["lookahead_ms"]), f"{system['real_time_factor']:.5f}",
            ratio(system["real_time_factor_to_teacher"]),
        ])  # fmt: skip
    return table(rows)


def verdict(report: dict[str, Any]) -> str:
    """What the figures say, in a sentence or three; says so where a share or a change is undefined or uncertain."""
    systems, baseline, teacher = report["systems"], report["baseline"], report["teacher"]
    ranked = sorted(systems, key=lambda name: systems[name]["wer"])
    others = [name for name in ranked if name not in (baseline, teacher)]
    others.sort(key=lambda name: name != report["student"])  # stable: the student, then from the best on

    def rated(name: str) -> str:
        return f"{name} ({percent(systems[name]['wer'])})"

    if baseline is None or ranked == [baseline]:
        best = systems[ranked[0]]
        counted = f"{best['errors']:,} errors in {best['words']:,} words"
        return f"{_lowest(ranked, systems)}: {counted}{_within(best['interval'])}."
    first, parts = systems[baseline], []
    if teacher is not None and teacher != baseline:
        points = 100 * (first["wer"] - systems[teacher]["wer"])
        if points <= 0:
            parts.append(f"{rated(teacher)} is no better than {rated(baseline)}: there is no gap to recover.")
        elif others:
            shares = [f"{name} recovers {share(systems[name]['gap_recovered'])}" for name in others]
            parts.append(
                f"Of the {points:.2f} points of WER between {rated(baseline)} and {rated(teacher)}, {_listed(shares)}."
            )
    for name in others or [one for one in ranked if one != baseline]:
        moved, bounds = (systems[name][f"relative_change_to_baseline{end}"] for end in ("", "_interval"))
        if moved is None:
            parts.append(f"{baseline} makes no errors, so no relative change is defined.")
            break
        if bounds is None or bounds == [0.0, 0.0]:
            sure = ""
        elif bounds[0] <= 0 <= bounds[1]:
            sure = f", within chance{_within(bounds, signed=True)}"
        else:
            sure = _within(bounds, signed=True)
        parts.append(f"{rated(name)} makes {_fewer(moved)} {baseline}{sure}.")
        if len(others) > 1:
            # the table has the rest
            break
    return " ".join(parts)


def _lowest(ranked: list[str], systems: dict[str, Any]) -> str:
    wer = percent(systems[ranked[0]]["wer"])
    if len(ranked) == 1:
        return f"{ranked[0]} has a WER of {wer}"
    return f"{ranked[0]} has the lowest WER of {len(ranked)} systems, {wer}"


def _fewer(moved: float) -> str:
    if round(abs(moved), 3) == 0:
        return "as many word errors as"
    return f"{100 * abs(moved):.1f} % {'fewer' if moved < 0 else 'more'} word errors than"


def _within(bounds: list[float] | None, signed: bool = False) -> str:
    if bounds is None:
        return ""
    low, high = (change(bound) if signed else percent(bound) for bound in bounds)
    return f" (95 % interval {low} to {high})"


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
