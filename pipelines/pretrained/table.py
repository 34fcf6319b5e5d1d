"""A teacher's texts beside the systems of a report → a table, all counted alike.

    python pipelines/pretrained/table.py --report REPORT --teacher TEACHER.jsonl --output FOLDER

`eval` decodes posteriors; Whisper and Moonshine have none. What they wrote of the test set (`transcribe`) is normalised, aligned and
counted here as the report does it. `boundaries` are the errors that are gone when spaces are: "nsv ht" for "n s v h t".
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterable
from pathlib import Path

from asr_kd.errors import UserError
from asr_kd.evaluation.formats import percent, table
from asr_kd.evaluation.wer import Edit, ErrorCounts, align, counts_of
from asr_kd.files import read_json, read_text, write_json, write_whole
from asr_kd.shards.manifest import read_transcripts
from asr_kd.text import NORMALIZERS


def of_boundaries(edits: Iterable[Edit]) -> int:
    """Errors between two words that are right, where both sides have the same letters in the same order."""
    count = 0
    for right, group in itertools.groupby(edits, lambda edit: edit.kind == "equal"):
        stretch = list(group)
        said, heard = ("".join(part or "" for part in side) for side in list(zip(*stretch, strict=True))[1:])
        count += len(stretch) if not right and said == heard else 0
    return count


def figures(pairs: Iterable[tuple[str, str]]) -> dict[str, float]:
    """Of one system: reference and hypothesis of each utterance, as they are compared."""
    counts, boundaries = ErrorCounts(), 0
    for reference, hypothesis in pairs:
        edits = align(reference, hypothesis)
        counts, boundaries = counts + counts_of(edits), boundaries + of_boundaries(edits)
    return {
        "wer": counts.rate, "words": counts.words, "substitutions": counts.substitutions, "deletions": counts.deletions,
        "insertions": counts.insertions, "boundaries": boundaries,
    }  # fmt: skip


def systems_of(report: Path, teacher: Path) -> dict[str, list[tuple[str, str]]]:
    """Of the teacher and of each system of the report, reference and hypothesis of every utterance of the report.

    Raises:
        UserError: when a file is missing or is not what its name says, or the teacher heard another set.
    """
    kind = read_json(report / "report.json", "report")["settings"]["normalizer"]
    wrote = read_transcripts(teacher)  # silence is not in it
    references: dict[str, str] = {}
    systems: dict[str, list[tuple[str, str]]] = {"teacher": []}
    for line in read_text(report / "utterances.jsonl", "utterances of the report").splitlines():
        one = json.loads(line)
        references[one["key"]] = one["reference_scored"]
        systems.setdefault(one["system"], []).append((one["reference_scored"], one["hypothesis_scored"]))
    if not references.keys() & wrote.keys():
        raise UserError(f"{teacher}: has no text of any utterance of {report}; transcribe the set of the report")
    normalize = NORMALIZERS[kind].apply
    systems["teacher"] = [(said, normalize(wrote.get(key, ""))) for key, said in references.items()]
    return systems


def main() -> None:
    """Write table.json and table.md."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("report", "teacher", "output"):
        parser.add_argument(f"--{name}", required=True, type=Path)
    chosen = parser.parse_args()
    try:
        found = {name: figures(pairs) for name, pairs in systems_of(chosen.report, chosen.teacher).items()}
        rows = [["system", "WER", "sub / del / ins", "of them word boundaries alone"]]
        for name, one in found.items():
            kinds = " / ".join(str(one[kind]) for kind in ("substitutions", "deletions", "insertions"))
            rows.append([name, percent(one["wer"]), kinds, str(one["boundaries"])])
        chosen.output.mkdir(parents=True, exist_ok=True)
        write_json(chosen.output / "table.json", found)
        with write_whole(chosen.output / "table.md", "w") as file:
            file.write(table(rows) + "\n")
    except UserError as error:
        sys.exit(f"pipelines/pretrained/table.py: {error}")
    print(table(rows))


if __name__ == "__main__":
    main()
