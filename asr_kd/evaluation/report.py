"""The WER report for people: verdict, Markdown table, one self-contained HTML page; all drawn from the JSON report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from asr_kd.evaluation.charts import Bar, Curve, learning_curves, percent, wer_bars
from asr_kd.files import Place, write_json, write_whole

FORMAT, VERSION = "asr_kd-report", 2
COLORS = 8
SPEAKERS_SHOWN = 40
NOTHING = "–"


def write_report(folder: Place, report: dict[str, Any]) -> None:
    """Write report.md, report.html and, last, report.json."""
    with write_whole(folder / "report.md", "w") as file:
        file.write(render_markdown(report))
    with write_whole(folder / "report.html", "w") as file:
        file.write(render_html(report))
    write_json(folder / "report.json", report)


def render_markdown(report: dict[str, Any]) -> str:
    """Verdict, table and origin, to paste into a page."""
    data, bootstrap = report["data"], report["bootstrap"]
    left_out = f", {data['quarantined']:,} left out" if data["quarantined"] else ""
    origin = (
        f"{data['utterances']:,} utterances{left_out}, {data['words']:,} words, {data['seconds'] / 3600:.2f} hours "
        f"(`{data['audio']}`, {data['hash']}); normaliser {report['normalizer']}; decoder {decoder(report)}; "
        f"{intervals_note(bootstrap)}; real-time factor of front end and network on {report['device']}, "
        f"{threads(report)}."
    )
    return f"# WER report\n\n{report['verdict']}\n\n{system_table(report)}\n\n{origin}\n"


def system_table(report: dict[str, Any]) -> str:
    """The systems as a Markdown table that is also easy to read in a terminal."""
    head = ["system", "WER", "95 % interval", "sub", "del", "ins", "vs baseline", "vs teacher", "gap recovered"]
    head += ["parameters", "size", "look-ahead", "RTF", "RTF / teacher"]
    rows = [head]
    for name, system in report["systems"].items():
        rows.append([
            name.replace("|", "\\|"), percent(system["wer"]), span(system["interval"]),
            *(f"{system[kind]:,}" for kind in ("substitutions", "deletions", "insertions")),
            change(system["relative_change_to_baseline"]), change(system["relative_change_to_teacher"]),
            share(system["gap_recovered"]), f"{system['parameters']:,}", size(system["size_bytes"]),
            lookahead(system["lookahead_ms"]), f"{system['real_time_factor']:.5f}",
            ratio(system["real_time_factor_to_teacher"]),
        ])  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = []
    for row in rows:
        cells = [f"{cell:{'>' if column else '<'}{widths[column]}}" for column, cell in enumerate(row)]
        lines.append(f"| {' | '.join(cells)} |")
    # figures to the right
    rule = ["-" * (width - 1) + (":" if column else "-") for column, width in enumerate(widths)]
    return "\n".join([lines[0], f"| {' | '.join(rule)} |", *lines[1:]])


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


# How figures are written. A figure that is not defined is a dash.


def change(value: float | None) -> str:
    """Relative change: `-0.123` → `−12.3 %`."""
    if value is None:
        return NOTHING
    text = f"{100 * value:+.1f} %"
    return ("0.0 %" if text in ("+0.0 %", "-0.0 %") else text).replace("-", "−")


def share(value: float | None) -> str:
    """`0.834` → `83 %`."""
    return NOTHING if value is None else f"{100 * value:.0f} %".replace("-", "−")


def span(bounds: list[float] | None) -> str:
    """An interval of fractions in percent."""
    return NOTHING if bounds is None else f"{100 * bounds[0]:.2f} – {100 * bounds[1]:.2f}"


def changes(bounds: list[float] | None) -> str:
    """An interval of relative changes or shares in percent."""
    return "" if bounds is None else f"{100 * bounds[0]:.0f} to {100 * bounds[1]:.0f}".replace("-", "−")


def ratio(value: float | None) -> str:
    """`0.25` → `0.25 ×`."""
    return NOTHING if value is None else f"{value:.2f} ×"


def size(count: int) -> str:
    """Bytes in decimal units."""
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def lookahead(value: int | None) -> str:
    """Milliseconds; None is the whole utterance."""
    return "utterance" if value is None else f"{value:,} ms"


def decoder(report: dict[str, Any]) -> str:
    """The decoder in words."""
    settings = report["settings"]
    return f"prefix beam search, beam {settings['beam']}" if settings["decoder"] == "beam" else "greedy"


def threads(report: dict[str, Any]) -> str:
    """The thread count in words."""
    count = report["settings"]["threads"]
    return "one thread" if count == 1 else f"{count} threads"


def intervals_note(bootstrap: dict[str, Any]) -> str:
    """How the intervals came about, and when to distrust them."""
    if not bootstrap["resamples"]:
        return "no intervals (bootstrap=0)"
    crude = ", which is few: the intervals are crude" if bootstrap["number"] < 20 else ""
    return (
        f"95 % intervals from {bootstrap['resamples']:,} bootstrap resamples of {bootstrap['number']:,} "
        f"{bootstrap['blocks']}{crude}"
    )


def render_html(report: dict[str, Any]) -> str:
    """One page that needs nothing else: style, pictures and all. Every text in it is escaped."""
    systems = report["systems"]
    series = {name: f"s{index % COLORS}{' dashed' * (index >= COLORS)}" for index, name in enumerate(systems)}
    ranked = sorted(systems, key=lambda name: systems[name]["wer"])
    roles = ("baseline", "teacher")
    notes = {report[role]: role for role in roles if report[role] not in (None, role)}
    bars = [
        Bar(name, series[name], systems[name]["wer"], _pair(systems[name]["interval"]), notes.get(name, ""))
        for name in ranked
    ]
    curves = [
        Curve(
            name,
            series[name],
            [point["audio_hours"] for point in system["curve"]],
            [point["development_wer"] for point in system["curve"]],
        )
        for name, system in systems.items()
        if system["curve"]
    ]
    speakers = sorted({speaker for system in systems.values() for speaker in system["speakers"]})
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(
        percent=percent, change=change, changes=changes, share=share, span=span, size=size, lookahead=lookahead,
        ratio=ratio,
    )  # fmt: skip
    return environment.get_template("report.html").render(
        report=report,
        systems=systems,
        series=series,
        notes=notes,
        ranked=ranked,
        bars=wer_bars(bars),
        curves=learning_curves(curves) if curves else None,
        curve_names=[curve.name for curve in curves],
        speakers=speakers[:SPEAKERS_SHOWN],
        speakers_left=len(speakers[SPEAKERS_SHOWN:]),
        highest=max([one["wer"] or 0.0 for system in systems.values() for one in system["speakers"].values()] or [0.0]),
        decoder=decoder(report),
        threads=threads(report),
        intervals=intervals_note(report["bootstrap"]),
    )


def _pair(bounds: list[float] | None) -> tuple[float, float] | None:
    return None if bounds is None else (bounds[0], bounds[1])
