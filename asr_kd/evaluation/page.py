"""The report as one HTML page that needs nothing else: style, script, pictures, audio and every utterance in it.

Its policy forbids the browser to load anything or to run any script but the page's own, whatever a text holds; all texts
are escaped as well. The parts are report.html, macros.html, report.css and report.js beside this file.
"""

from __future__ import annotations

import base64
import hashlib
import inspect
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from asr_kd.evaluation import charts, formats
from asr_kd.evaluation.samples import Evidence
from asr_kd.evaluation.schema import Report, Slices
from asr_kd.evaluation.settings import EvalSettings
from asr_kd.evaluation.slices import OTHERS, SLICE_WORDS
from asr_kd.evaluation.utterances import Packed, edits_of
from asr_kd.evaluation.verdict import below_it, ranked, roles_of, student

HERE = Path(__file__).parent
COLORS = 8
LEADING = 3  # systems that are compared side by side where all would be too many
MANY = 15  # pairs of systems that are all seen at once
#: a condition that is a noise at a signal-to-noise ratio, such as `babble 10 dB`; that without any is `clean`
NOISE = re.compile(r"(?P<noise>.*[^ _-])[ _-]+?(?P<ratio>[-−]?\d+(\.\d+)?)[ _-]?dB", re.IGNORECASE)
DRAWN, LISTED = 10, 60  # values of a field that are drawn, and that are listed


def render_html(report: Report, packed: Packed, evidence: Evidence) -> Iterator[str]:
    """The page, piece by piece, so that all its utterances (`packed`) are held once; `evidence` is of the report's samples."""
    script, style = ((HERE / name).read_text(encoding="utf-8") for name in ("report.js", "report.css"))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    # every function that writes a figure is a filter of the template
    environment.filters.update(dict(inspect.getmembers(formats, inspect.isfunction)))
    environment.filters.update(count=lambda value: f"{value:,}", edits=edits_of, json=json.dumps)
    series = {name: f"s{index % COLORS}{' dashed' * (index >= COLORS)}" for index, name in enumerate(report.systems)}
    lead, about = leading(report), student(report)
    for_script = {
        "systems": {name: {"series": series[name], "shown": name in lead} for name in report.systems},
        "baseline": report.baseline, "student": about, "sets": len(report.sets),
    }  # fmt: skip
    # JSON that cannot end the element that holds it, nor begin another
    data = json.dumps(for_script).replace("<", "\\u003c").replace("&", "\\u0026")
    return environment.get_template("report.html").generate(
        report=report, systems=report.systems, settings=report.settings.model_dump(), below=below_it(report),
        series=series, notes=_notes(report), ranked=ranked(report), student=about, lead=lead,
        lead_pairs=[pair for pair in report.pairs if {pair.a, pair.b} <= set(lead)], many=MANY,
        lead_legend=[(name, "") for name in lead], **_charts(report, series), slices=_pictures(report, series, lead),
        noises=_noises(report, series), legend_of_all=[(name, "") for name in report.systems],
        named_slices=formats.named_slices(report), listed=LISTED, slice_words=SLICE_WORDS, others=OTHERS,
        heat=charts.heat_maps(evidence.pictures) if evidence.pictures else None, evidence=evidence, packed=packed,
        first_line=lambda group: next(iter(group.values())), fields=["set", "speaker", *searchable(report)], command=command(report.settings),
        decoder=formats.decoder(report.settings), threads=formats.threads(report.settings.threads),
        intervals=formats.intervals_note(report.bootstrap), data=Markup(data), script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(), style=Markup(style),
    )  # fmt: skip


def _notes(report: Report) -> dict[str, str]:
    """The role of each system that has one and is not named after it."""
    return {name: role for role, name in roles_of(report).items() if name != role}


def _charts(report: Report, series: dict[str, str]) -> dict[str, Any]:
    """The pictures of whole systems and their legends, by their names in the template."""
    best, systems, notes = ranked(report), report.systems, _notes(report)
    bars = {
        name: charts.Bar(name, series[name], one.wer, one.interval, notes.get(name, ""))
        for name, one in systems.items()
    }
    curves = [
        charts.Curve(name, series[name], [(at.audio_hours, at.development_wer) for at in one.curve])
        for name, one in systems.items()
        if one.curve
    ]
    hours = [(one.unlabelled_hours, bars[name]) for name, one in systems.items() if one.unlabelled_hours is not None]
    calibrated = [(name, series[name], found.bins) for name in best if (found := systems[name].calibration)]
    return {
        "bars": charts.wer_bars([bars[name] for name in best]),
        "curves": charts.learning_curves(curves) if curves else None,
        "curves_legend": [(curve.name, f": best {charts.best_of(curve)}") for curve in curves],
        "hours": charts.wer_against_hours(hours) if len({amount for amount, _ in hours}) > 1 else None,
        "hours_legend": [(one.name, f": {amount:.4g} h") for amount, one in hours],
        "calibration": charts.reliability(calibrated) if calibrated else None,
        "calibrated": [name for name, _, _ in calibrated],
        "calibration_legend": [(name, "") for name, _, _ in calibrated],
    }


def _pictures(report: Report, series: dict[str, str], lead: list[str]) -> list[tuple[Slices, int, Markup]]:
    """The slices of each field, how many of them are drawn, and the picture."""
    pictures = []
    for one in report.slices:
        values = [value for value in one.values if value.words]
        if not one.bands and len(values) > DRAWN:
            values = sorted(values, key=lambda value: -value.words)[:DRAWN]
        rows = []
        for value in values:
            found = [(name, value.systems[name]) for name in lead]
            bars = [charts.Bar(name, series[name], at.wer, at.interval) for name, at in found if at.wer is not None]
            if bars:
                rows.append(charts.Row(formats.named(value.value), value.words, bars))
        if rows:
            pictures.append((one, len(rows), charts.slice_dots(one.field, rows)))
    return pictures


def _noises(report: Report, series: dict[str, str]) -> list[tuple[str, Markup]]:
    """For each kind of noise that was heard at two signal-to-noise ratios or more: its name, and the picture."""
    heard: dict[str, list[tuple[float | None, list[charts.Bar]]]] = {}
    clean: list[tuple[float | None, list[charts.Bar]]] = []
    for value in next((one.values for one in report.slices if one.field == "condition"), []):
        systems = value.systems.items()
        bars = [charts.Bar(name, series[name], at.wer, at.interval) for name, at in systems if at.wer is not None]
        found = NOISE.fullmatch(value.value or "")
        if found and bars:
            heard.setdefault(found["noise"], []).append((float(found["ratio"].replace("−", "-")), bars))
        elif value.value == "clean" and bars:
            clean = [(None, bars)]
    return [(noise, charts.wer_against_noise(noise, [*clean, *at])) for noise, at in heard.items() if len(at) > 1]


def leading(report: Report) -> list[str]:
    """The systems to look at first: baseline, teacher and student, then the best, up to a few."""
    named = [name for name in (report.baseline, report.teacher, student(report)) if name is not None]
    chosen = list(dict.fromkeys([*named, *ranked(report)]))[: max(LEADING, len(set(named)))]
    return [name for name in report.systems if name in chosen]


def drawn(report: Report) -> list[str]:
    """The systems whose posteriors are drawn: the teacher, or else the baseline, and the student."""
    return list(dict.fromkeys(filter(None, (report.teacher or report.baseline, student(report)))))


def searchable(report: Report) -> list[str]:
    """The manifest fields that rows of the page carry: those of the slices whose values are not bands."""
    columns = ("set", "speaker")  # of their own
    return [one.field for one in report.slices if not one.bands and one.field not in columns]


def command(settings: EvalSettings) -> str:
    """The command that makes such a report, for a shell; settings that are left to their defaults are not in it."""
    written = {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for key, value in settings.model_dump(exclude_defaults=True).items()
    }
    return shlex.join(["asr-kd", "eval", *(f"{key}={value}" for key, value in written.items())])
