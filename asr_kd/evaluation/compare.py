"""`eval --compare A B …`: the systems of earlier reports side by side, where their figures may be compared at all."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import Any

from asr_kd.errors import UserError
from asr_kd.evaluation.figures import (
    change,
    decoder,
    p_value,
    percent,
    points,
    ratio,
    said_of_pair,
    share,
    size,
    span,
    table,
)
from asr_kd.evaluation.gate import Gate
from asr_kd.evaluation.paired import Side, paired
from asr_kd.files import Place, place, read_json

FORMAT, VERSIONS = "asr_kd-report", (1, 2)
# what must be the same: key, and what it is called
SAME = {"normalizer": "text normaliser", "data.hash": "test data", "data.utterances": "number of scored utterances"}


def compare(paths: Sequence[str], gate: Gate | None = None) -> bool:
    """Print the systems of the reports as one table.

    Reports are called A, B … in the order of `paths` (folders of reports, or the files); a condition calls a system that
    several of them hold `A.name`.

    Systems of the same name are tested utterance by utterance where the lines of both reports lie beside them.

    Returns:
        whether the condition is true of them.

    Raises:
        UserError: when a report cannot be read, or they do not go together: another normaliser, other test data.
    """
    if len(paths) > len(string.ascii_uppercase):
        raise UserError(f"--compare: takes {len(string.ascii_uppercase)} reports at most, {len(paths)} were given")
    reports = {letter: read_report(path) for letter, path in zip(string.ascii_uppercase, paths, strict=False)}
    _check_comparable(dict(zip(reports, paths, strict=True)), reports)
    merged = {"systems": _names(reports)}
    if gate:
        gate.check_names(merged["systems"])
    print("\n".join(f"{letter}: {path}" for letter, path in zip(reports, paths, strict=True)))
    first = next(iter(reports.values()))
    data = first["data"]
    print(
        f"{data['utterances']:,} utterances, {data['words']:,} words ({data['hash']}); normaliser {first['normalizer']}\n"
    )
    decoders = {letter: decoder(report) for letter, report in reports.items()}
    if len(set(decoders.values())) > 1:
        said = "; ".join(f"{letter}: {decoding}" for letter, decoding in decoders.items())
        print(f"Decoded in different ways, which a difference may come from: {said}\n")
    print(comparison(reports))
    sides = [
        Side(letter, reports[letter], _folder(path) / "utterances.jsonl")
        for letter, path in zip(reports, paths, strict=True)
    ]
    for other in sides[1:]:
        print(f"\n{_tests(sides[0], other)}")
    if len({report.get("alignment") for report in reports.values()}) > 1:
        print(
            "\nThese reports aligned words in different ways (version 1 with fewest edits, version 2 as NIST sclite), "
            "so substitutions, deletions and insertions may differ by that alone."
        )
    return gate.judge(merged) if gate else False


def read_report(path: str) -> dict[str, Any]:
    """The report in a folder, or of a file.

    Raises:
        UserError: when there is none that this version reads.
    """
    file = place(path) if path.endswith(".json") else place(path) / "report.json"
    report = read_json(file, "report")
    if not isinstance(report, dict) or report.get("format") != FORMAT:
        raise UserError(f"{file}: is no WER report; give folders that `asr-kd eval` wrote")
    if report.get("version") not in VERSIONS:
        raise UserError(
            f"{file}: is of version {report.get('version')}; this asr-kd reads {VERSIONS[0]} to {VERSIONS[-1]}"
        )
    try:
        known = [value_at(report, key) for key in SAME]
        known += [(one["wer"] + 0, one["interval"]) for one in report["systems"].values()]
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{file}: is damaged; make the report again") from None
    return report


def _folder(path: str) -> Place:
    return place(path).parent if path.endswith(".json") else place(path)


def _tests(first: Side, second: Side) -> str:
    """What is sure of the differences of two reports, and what that rests on."""
    found = paired(first, second)
    between = f"{second.letter} against {first.letter}"
    if isinstance(found, str):
        return (
            f"{between}: unpaired, for {found}. Only the intervals above can be compared: apart they show a difference, "
            "overlapping they show nothing, since the two err on the same utterances."
        )
    rows = [["difference in WER", "points", "95 % interval", "p, bootstrap", "p, MAPSSWE", "at 5 %"]]
    for pair in found.pairs:
        rows.append([
            f"{pair['a']} − {pair['b']}".replace("|", "\\|"), points(pair["difference"]),
            " to ".join(map(points, pair["interval"])) if pair["interval"] else "–", p_value(pair["p_bootstrap"]),
            p_value(pair["mapsswe"]["p"]), said_of_pair(pair),
        ])  # fmt: skip
    return (
        f"{between}: paired, for both reports' utterances.jsonl hold the same utterances under the same normaliser "
        f"(MAPSSWE, and paired bootstrap with {found.basis})\n\n{table(rows)}"
    )


def _check_comparable(paths: Mapping[str, str], reports: Mapping[str, dict[str, Any]]) -> None:
    first, *others = reports
    for other in others:
        for key, called in SAME.items():
            one, two = value_at(reports[first], key), value_at(reports[other], key)
            if one != two:
                raise UserError(
                    f"{paths[other]}: cannot be compared with {paths[first]}, because its {called} is not the same ({two}, not {one}); "
                    "evaluate both alike"
                )


def _names(reports: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Every system as `A.name`, and by its name alone where one report holds it."""
    found = {f"{letter}.{name}": one for letter, report in reports.items() for name, one in report["systems"].items()}
    held = [name for report in reports.values() for name in report["systems"]]
    for report in reports.values():
        found |= {name: one for name, one in report["systems"].items() if held.count(name) == 1 and name not in found}
    return found


def comparison(reports: Mapping[str, dict[str, Any]]) -> str:
    """The systems of all reports as a table, each beside the system of that name in the first report."""
    first = next(iter(reports))
    rows = [["system", "WER", "95 % interval", f"WER relative to {first}", "sub", "del", "ins", "CER", "SER"]]
    rows[0] += ["WER relative to teacher", "gap recovered", "parameters", "size", "RTF", "RTF / teacher"]
    for letter, report in reports.items():
        for name, one in report["systems"].items():
            before = reports[first]["systems"].get(name) if letter != first else None
            moved = one["wer"] / before["wer"] - 1 if before and before["wer"] else None
            rows.append([
                f"{letter} {name}".replace("|", "\\|"), percent(one["wer"]), span(one["interval"]), change(moved),
                *(_known(one, kind, "{:,}".format) for kind in ("substitutions", "deletions", "insertions")),
                _known(one, "cer", percent), _known(one, "ser", percent),
                _known(one, "relative_change_to_teacher", change), _known(one, "gap_recovered", share),
                _known(one, "parameters", "{:,}".format), _known(one, "size_bytes", size),
                _known(one, "real_time_factor", "{:.5f}".format), _known(one, "real_time_factor_to_teacher", ratio),
            ])  # fmt: skip
    return table(rows)


def _known(one: dict[str, Any], key: str, written: Any) -> str:
    value = one.get(key)
    return "–" if value is None else written(value)


def value_at(report: dict[str, Any], key: str) -> Any:
    """A figure by its keys joined with dots."""
    value: Any = report
    for part in key.split("."):
        value = value[part]
    return value
