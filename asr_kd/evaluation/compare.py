"""`eval --compare A B …`: the systems of earlier reports side by side, where their figures may be compared at all."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from asr_kd.errors import UserError
from asr_kd.evaluation import formats
from asr_kd.evaluation.earlier import Earlier, file_of, read_report
from asr_kd.evaluation.gate import Gate
from asr_kd.evaluation.paired import Side, paired


def compare(paths: Sequence[str], gate: Gate | None = None) -> bool:
    """Print the systems of the reports (folders, or the files) as one table; whether the condition is true of them.

    Reports are called A, B … in their order; a condition calls a system that several of them hold `A.name`. Systems of the
    same name are tested utterance by utterance where the lines of both reports lie beside them.

    Raises:
        UserError: when a report cannot be read, or they do not go together: another normaliser, other test data.
    """
    letters = string.ascii_uppercase
    if len(paths) > len(letters):
        raise UserError(f"--compare: takes {len(letters)} reports at most, {len(paths)} were given")
    read = {letter: read_report(path) for letter, path in zip(letters, paths, strict=False)}
    reports = {letter: report for letter, (report, _) in read.items()}
    first = reports["A"]
    for path, other in zip(paths, reports.values(), strict=True):
        for called, mine, theirs in (
            ("text normaliser", first.normalizer, other.normalizer),
            ("test data", first.data.hash, other.data.hash),
            ("number of scored utterances", first.data.utterances, other.data.utterances),
        ):
            if mine != theirs:
                raise UserError(
                    f"{path}: cannot be compared with {paths[0]}, because its {called} is not the same ({theirs}, not {mine}); "
                    "evaluate both alike"
                )
    figures = {"systems": _names({letter: whole for letter, (_, whole) in read.items()})}
    if gate:
        gate.check_names(figures["systems"])
    print("\n".join(f"{letter}: {path}" for letter, path in zip(reports, paths, strict=True)))
    data = first.data
    print(f"{data.utterances:,} utterances, {data.words:,} words ({data.hash}); normaliser {first.normalizer}\n")
    decoders = {letter: formats.decoder(report.settings) for letter, report in reports.items()}
    if len(set(decoders.values())) > 1:
        said = "; ".join(f"{letter}: {decoding}" for letter, decoding in decoders.items())
        print(f"Decoded in different ways, which a difference may come from: {said}\n")
    print(comparison(reports))
    lines = [file_of(path).parent / "utterances.jsonl" for path in paths]
    sides = [Side(letter, report, path) for (letter, report), path in zip(reports.items(), lines, strict=True)]
    for side in sides[1:]:
        print(f"\n{_tests(sides[0], side)}")
    if len({report.alignment for report in reports.values()}) > 1:
        print(
            "\nThese reports aligned words in different ways (version 1 with fewest edits, later ones as NIST sclite), "
            "so substitutions, deletions and insertions may differ by that alone."
        )
    return gate.judge(figures) if gate else False


def _tests(first: Side, second: Side) -> str:
    """What is sure of the differences of two reports, and what that rests on."""
    found = paired(first, second)
    between = f"{second.letter} against {first.letter}"
    if isinstance(found, str):
        return (
            f"{between}: unpaired, for {found}. Only the intervals above can be compared: apart they show a difference, "
            "overlapping they show nothing, since the two err on the same utterances."
        )
    pairs, basis = found
    rows = [["difference in WER", "points", "95 % interval", "p, bootstrap", "p, MAPSSWE", "at 5 %"]]
    for pair in pairs:
        rows.append([
            f"{pair.a} − {pair.b}".replace("|", "\\|"), formats.points(pair.difference),
            " to ".join(map(formats.points, pair.interval)) if pair.interval else formats.NOTHING,
            formats.p_value(pair.p_bootstrap), formats.p_value(pair.mapsswe.p), formats.said_of_pair(pair),
        ])  # fmt: skip
    return (
        f"{between}: paired, for both reports' utterances.jsonl hold the same utterances under the same normaliser "
        f"(MAPSSWE, and paired bootstrap with {basis})\n\n{formats.table(rows)}"
    )


def _names(reports: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The figures of every system as `A.name`, and by its name alone where one report holds it."""
    every = [(letter, name, one) for letter, report in reports.items() for name, one in report["systems"].items()]
    held = Counter(name for _, name, _ in every)
    found = {f"{letter}.{name}": one for letter, name, one in every}
    return found | {name: one for _, name, one in every if held[name] == 1 and name not in found}


def comparison(reports: Mapping[str, Earlier]) -> str:
    """The systems of all reports as a table, each beside the system of that name in the first report."""
    first = next(iter(reports))
    rows = [["system", "WER", "95 % interval", f"WER relative to {first}", "sub", "del", "ins", "CER", "SER"]]
    rows[0] += ["WER relative to teacher", "gap recovered", "parameters", "size", "RTF", "RTF / teacher"]
    for letter, report in reports.items():
        for name, one in report.systems.items():
            before = reports[first].systems.get(name) if letter != first else None
            rows.append([
                f"{letter} {name}".replace("|", "\\|"), formats.percent(one.wer), formats.span(one.interval),
                formats.change(one.wer / before.wer - 1 if before and before.wer else None),
                *(formats.known(edits, "{:,}".format) for edits in (one.substitutions, one.deletions, one.insertions)),
                formats.known(one.cer, formats.percent), formats.known(one.ser, formats.percent),
                formats.change(one.relative_change_to_teacher), formats.share(one.gap_recovered),
                formats.known(one.parameters, "{:,}".format), formats.known(one.size_bytes, formats.size),
                formats.known(one.real_time_factor, "{:.5f}".format), formats.ratio(one.real_time_factor_to_teacher),
            ])  # fmt: skip
    return formats.table(rows)
