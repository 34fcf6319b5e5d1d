"""The report as one HTML page that needs nothing else: style, script, pictures, audio and every utterance in it.

Its policy forbids the browser to load anything or to run any script but the page's own, whatever a text holds; all texts
are escaped as well. The parts are report.html, report.css and report.js beside this file.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from asr_kd.evaluation import figures
from asr_kd.evaluation.charts import (
    Bar,
    Curve,
    Slice,
    best_of,
    heat_maps,
    learning_curves,
    reliability,
    slice_dots,
    wer_against_hours,
    wer_bars,
)
from asr_kd.evaluation.evidence import Evidence
from asr_kd.evaluation.settings import EvalSettings
from asr_kd.evaluation.slices import OTHERS, SLICE_WORDS
from asr_kd.evaluation.utterances import Group, Packed, edits_of
from asr_kd.evaluation.verdict import below_it, student
from asr_kd.evaluation.wer import Edit

HERE = Path(__file__).parent
COLORS = 8
#: systems that are compared side by side where all would be too many
LEADING = 3
#: pairs of systems that are all seen at once
MANY = 15
#: values of a field that are drawn, and that are listed
DRAWN, LISTED = 10, 60


def render_html(report: dict[str, Any], packed: Packed, evidence: Evidence) -> Iterator[str]:
    """The page, piece by piece: all its utterances are held once.

    Args:
        report: as in report.json.
        packed: every utterance, and the lines of the report's samples.
        evidence: audio of the samples, and pictures.
    """
    systems = report["systems"]
    series = {name: f"s{index % COLORS}{' dashed' * (index >= COLORS)}" for index, name in enumerate(systems)}
    ranked = sorted(systems, key=lambda name: systems[name]["wer"])
    notes = {report[role]: role for role in ("baseline", "teacher") if report[role] not in (None, role)}
    lead = leading(report)

    def bar(name: str, one: dict[str, Any]) -> Bar:
        bounds = one["interval"]
        return Bar(name, series[name], one["wer"], bounds and (bounds[0], bounds[1]), notes.get(name, ""))

    curves = [
        Curve(
            name, series[name], [point["audio_hours"] for point in system["curve"]],
            [point["development_wer"] for point in system["curve"]],
        )
        for name, system in systems.items()
        if system["curve"]
    ]  # fmt: skip
    hours = [
        (one["unlabelled_hours"], bar(name, one))
        for name, one in systems.items()
        if one["unlabelled_hours"] is not None
    ]
    calibrated = [
        (name, series[name], systems[name]["calibration"]["bins"]) for name in ranked if systems[name]["calibration"]
    ]
    pictures = []
    for one in report["slices"]:
        values = [value for value in one["values"] if value["words"]]
        if not one["bands"] and len(values) > DRAWN:
            values = sorted(values, key=lambda value: -value["words"])[:DRAWN]
        drawn = [
            Slice(
                figures.named(value["value"]), value["words"],
                [bar(name, value["systems"][name]) for name in lead if _finite(value["systems"][name]["wer"])],
            )
            for value in values
        ]  # fmt: skip
        drawn = [one for one in drawn if one.bars]
        if drawn:
            pictures.append((one, len(drawn), slice_dots(one["field"], drawn)))

    script, style = ((HERE / name).read_text(encoding="utf-8") for name in ("report.js", "report.css"))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(
        {name: getattr(figures, name) for name in figures.__all__},
        count=lambda value: f"{value:,}",
        edits=edits_of,
        as_edits=lambda alignment: [Edit(*one) for one in alignment],
        json=json.dumps,
    )
    return environment.get_template("report.html").generate(
        report=report,
        below=below_it(report),
        systems=systems,
        series=series,
        notes=notes,
        ranked=ranked,
        student=student(report),
        lead=lead,
        lead_pairs=[pair for pair in report["pairs"] if {pair["a"], pair["b"]} <= set(lead)],
        many=MANY,
        lead_legend=[(name, "") for name in lead],
        bars=wer_bars([bar(name, systems[name]) for name in ranked]),
        curves=learning_curves(curves) if curves else None,
        curves_legend=[(curve.name, f": best {best_of(curve)}") for curve in curves],
        hours=wer_against_hours(hours) if len({amount for amount, _ in hours}) > 1 else None,
        hours_legend=[(one.name, f": {amount:.4g} h") for amount, one in hours],
        slices=pictures,
        named_slices=figures.named_slices(report),
        listed=LISTED,
        slice_words=SLICE_WORDS,
        others=OTHERS,
        calibration=reliability(calibrated) if calibrated else None,
        calibrated=[name for name, _, _ in calibrated],
        calibration_legend=[(name, "") for name, _, _ in calibrated],
        heat=heat_maps(evidence.pictures) if evidence.pictures else None,
        evidence=evidence,
        packed=packed,
        first_line=_first_line,
        fields=["set", "speaker", *searchable(report)],
        command=command(report["settings"]),
        decoder=figures.decoder(report),
        threads=figures.threads(report),
        intervals=figures.intervals_note(report["bootstrap"]),
        data=Markup(
            _for_script(
                {
                    "systems": {name: {"series": series[name], "shown": name in lead} for name in systems},
                    "baseline": report["baseline"],
                    "student": student(report),
                    "sets": len(report["sets"]),
                }
            )
        ),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style=Markup(style),
    )


def leading(report: dict[str, Any]) -> list[str]:
    """The systems to look at first: baseline, teacher and student, then the best, up to a few."""
    systems = report["systems"]
    named = [name for name in (report["baseline"], report["teacher"], student(report)) if name is not None]
    best = sorted(systems, key=lambda name: systems[name]["wer"])
    chosen = list(dict.fromkeys([*named, *best]))[: max(LEADING, len(set(named)))]
    return [name for name in systems if name in chosen]


def drawn(report: dict[str, Any]) -> list[str]:
    """The systems whose posteriors are drawn: the teacher, or else the baseline, and the student."""
    first = report["teacher"] or report["baseline"]
    return list(dict.fromkeys(name for name in (first, student(report)) if name is not None))


def searchable(report: dict[str, Any]) -> list[str]:
    """The manifest fields that rows of the page carry: those of the slices whose values are not bands."""
    own = ("set", "speaker")  # columns of their own
    return [one["field"] for one in report["slices"] if not one["bands"] and one["field"] not in own]


def command(settings: dict[str, Any]) -> str:
    """The command that makes such a report, for a shell; settings that are left to their defaults are not in it."""
    words = ["asr-kd", "eval"]
    for key, value in settings.items():
        known = EvalSettings.model_fields.get(key)
        if known is None or known.is_required() or value != known.get_default(call_default_factory=True):
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            words.append(f"{key}={text}")
    return shlex.join(words)


def _for_script(value: Any) -> str:
    """JSON that cannot end the element that holds it, nor begin another."""
    return json.dumps(value).replace("<", "\\u003c").replace("&", "\\u0026")


def _first_line(group: Group) -> dict[str, Any]:
    return next(iter(group.values()))


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
