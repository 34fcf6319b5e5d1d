"""The WER report for people: the Markdown table, drawn from the JSON report; the page is in `page.py`."""

from __future__ import annotations

from functools import partial

from asr_kd.evaluation import formats
from asr_kd.evaluation.page import drawn, render_html, searchable
from asr_kd.evaluation.samples import gather
from asr_kd.evaluation.schema import Interval, Pair, Report
from asr_kd.evaluation.utterances import pack, read_lines
from asr_kd.evaluation.verdict import below_it
from asr_kd.files import Place, write_json, write_whole


def write_report(folder: Place, report: Report) -> None:
    """Write report.md, report.html and, last, report.json.

    Reads `utterances.jsonl` of the folder for the table of the page and, for a few utterances, audio and checkpoints.
    """
    read, wanted = partial(read_lines, folder / "utterances.jsonl"), {one.identity for one in report.samples}
    packed = pack(read, list(report.systems), searchable(report), wanted, report.data.utterances)
    with write_whole(folder / "report.md", "w", make_folder=False) as file:
        file.write(render_markdown(report))
    with write_whole(folder / "report.html", "w", make_folder=False) as file:
        file.writelines(render_html(report, packed, gather(report, drawn(report))))
    write_json(folder / "report.json", report.model_dump(mode="json"), make_folder=False)


def render_markdown(report: Report) -> str:
    """Verdict, table, what is sure, slices and origin, to paste into a page."""
    data, bootstrap = report.data, report.bootstrap
    left_out = f", {data.quarantined:,} left out" if data.quarantined else ""
    audio = ", ".join(f"`{one.audio}`, {one.hash}" for one in report.sets.values())
    origin = (
        f"{data.utterances:,} utterances{left_out}, {data.words:,} words, {data.seconds / 3600:.2f} hours "
        f"({audio}); normaliser {report.normalizer}; decoder {formats.decoder(report.settings)}; "
        f"{formats.intervals_note(bootstrap)}; real-time factor of front end and network on {report.device}, "
        f"{formats.threads(report.settings.threads)}."
    )
    below = map(_escaped, below_it(report))
    parts = ["# WER report", f"**{_escaped(report.verdict)}**", *below, system_table(report)]
    if len(report.sets) > 1:
        parts += ["WER by set, and the mean of the sets:", set_table(report)]
        if report.baseline is not None and len(report.systems) > 1:
            base = _escaped(report.baseline)
            parts += [f"Change on each set against {base}, points, with its 95 % interval:", change_table(report)]
    if report.pairs:
        parts.append("Differences in WER, points (*p* of the paired bootstrap and of MAPSSWE):")
        parts.append("\n".join(f"- {_pair(pair)}" for pair in report.pairs))
    for title, slices in formats.named_slices(report):
        parts.append(f"{_escaped(title)}:")
        parts.append("\n".join(f"- {_escaped(where)}: {figures}" for where, figures in slices))
    return "\n\n".join([*parts, origin]) + "\n"


def _pair(pair: Pair) -> str:
    tests = f"*p* {formats.p_value(pair.p_bootstrap)}, {formats.p_value(pair.mapsswe.p)}"
    names = _escaped(f"{pair.a} − {pair.b}")
    return f"{names}: {_points(pair.difference, pair.interval)}, {tests}: {_escaped(formats.said_of_pair(pair))}"


def _points(difference: float | None, bounds: Interval | None) -> str:
    within = f" ({formats.points(bounds[0])} to {formats.points(bounds[1])})" if bounds else ""
    return f"{formats.points(difference)}{within}"


def _escaped(text: str) -> str:
    """Text that Markdown, and the HTML that Markdown may hold, leaves as it is."""
    for mark in "\\`*[<|":
        text = text.replace(mark, f"\\{mark}")
    return text.replace("\n", " ")


def system_table(report: Report) -> str:
    """The systems as a Markdown table that is also easy to read in a terminal."""
    rows = [["system", "WER", "95 % interval", "sub", "del", "ins", "WER relative to baseline", "to teacher"]]
    rows[0] += ["gap recovered", "parameters", "size", "look-ahead", "RTF", "RTF / teacher"]
    for name, system in report.systems.items():
        rows.append([
            _escaped(name), formats.percent(system.wer), formats.span(system.interval),
            f"{system.substitutions:,}", f"{system.deletions:,}", f"{system.insertions:,}",
            formats.change(system.relative_change_to_baseline), formats.change(system.relative_change_to_teacher),
            formats.share(system.gap_recovered), f"{system.parameters:,}", formats.size(system.size_bytes),
            formats.lookahead(system.lookahead_ms), f"{system.real_time_factor:.5f}",
            formats.ratio(system.real_time_factor_to_teacher),
        ])  # fmt: skip
    return formats.table(rows)


def set_table(report: Report) -> str:
    """WER by set as a Markdown table."""
    rows = [["system", *map(_escaped, report.sets), "mean"]]
    for name, system in report.systems.items():
        rates = [*(system.sets[one].wer for one in report.sets), system.mean_of_sets_wer]
        rows.append([_escaped(name), *(formats.known(rate, formats.percent) for rate in rates)])
    return formats.table(rows)


def change_table(report: Report) -> str:
    """Change of the WER on each set against the baseline as a Markdown table."""
    rows = [["system", *map(_escaped, report.sets)]]
    for name, system in report.systems.items():
        if name != report.baseline:
            changes = [
                (system.sets[one].change_to_baseline, system.sets[one].change_to_baseline_interval)
                for one in report.sets
            ]
            rows.append([_escaped(name), *(_points(change, bounds) for change, bounds in changes)])
    return formats.table(rows)
