"""Measure what long recordings lose against utterances as given: in the cuts, the labels, the students, and in what is recognised of them.

    python pipelines/long/measure.py --corpus an4 --seeds 3 -- precision=bfloat16

Teacher, supervised start and the student of utterances as given are those of pipelines/an4, taken over where its measure.py trained them.
Prints the tables of RESULTS.md; what is measured is kept in runs/ and not run again. What follows `--` goes to every run as it is.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "an4"))
import score
from measure import RECIPE, each, folder, measure, paired, systems

from asr_kd.config.load import load_yaml
from asr_kd.evaluation.wer import ErrorCounts
from asr_kd.shards.manifest import read_transcripts

#: what is heard besides the utterances, as arguments of compose.py
CONDITIONS: dict[str, list[Any]] = {
    "clean": ["--snr", 40],
    "noise": ["--snr", 15],
    "between": ["--snr", 40, "--stretches"],
}
#: who says where the recordings are cut: the reference, or a detector
CUTS: dict[str, dict[str, Any]] = {
    "truth": {},
    "silero": {"detector": "silero"},
    "wide": {"detector": "silero", "padding": 0.4, "min_pause": 0.8},
    "energy": {"detector": "energy"},
}
STUDENTS = ("clean-truth", "clean-silero", "between-silero")
#: of AN4's recipe: what nothing here needs
UNUSED = ("pseudo-labels", "student-pseudo-label", "student-oracle", "test-conditions", "report", "report-conditions")
GIVEN, BASES = "student-distilled", ("teacher", "student-supervised")
PASSES = 30  # as many as the student of utterances as given makes, whose 18.4 hours are 30 times both sets


def recordings(name: str, condition: str, seconds: float) -> dict[str, Any]:
    """Stages that compose the set `name` in a condition and cut it by everyone; with seconds, for the test, by the reference and Silero, with text, and uncut."""
    made, arguments = f"{name}-{condition}", ["--manifest", f"${{run}}/corpus/{name}.jsonl", "--seed", "${seed}"]
    if name == "unlabelled":
        arguments += ["--texts", "${run}/corpus/unlabelled-oracle.jsonl"]
    output = f"${{run}}/long/{made}"
    arguments += CONDITIONS[condition]
    composed = {"file": "pipelines/long/compose.py", "output": output, "arguments": arguments}
    stages: dict[str, Any] = {f"long-{made}": {"verb": "script", "settings": composed}}
    for cut, segment in CUTS.items():
        if seconds and cut not in ("truth", "silero"):
            continue
        listed = {"manifest": f"{output}/recordings.jsonl", "segment": segment} if segment else {"manifest": f"{output}/reference.jsonl"}  # fmt: skip
        silent = {} if cut == "truth" and seconds else {"drop_text": True}
        settings = {**listed, **silent, "output": f"{output}-{cut}"}
        stages[f"long-{made}-{cut}"] = {"verb": "prepare", "settings": settings}
    if seconds:
        settings = {"manifest": f"{output}/recordings.jsonl", "output": f"{output}-uncut", "max_seconds": seconds}
        stages[f"long-{made}-uncut"] = {"verb": "prepare", "settings": settings}
    return stages


def stages(pipeline: dict[str, Any], students: Sequence[str], longest: float = 1200.0) -> dict[str, Any]:
    """The recipe with everything that is measured; `longest`: seconds of a recording that is recognised as it is."""
    found = {name: stage for name, stage in copy.deepcopy(pipeline["stages"]).items() if name not in UNUSED}
    lists, given = found["teacher-lists"]["settings"], found[GIVEN]["settings"]
    for condition in CONDITIONS:
        found |= recordings("unlabelled", condition, 0)
        for cut in CUTS:
            pieces = f"${{run}}/long/unlabelled-{condition}-{cut}"
            settings = {**lists, "audio": pieces, "output": f"{pieces}.jsonl"}
            found[f"lists-{condition}-{cut}"] = {"verb": "transcribe", "settings": settings}
    for student in students:
        settings = copy.deepcopy(given) | {"output": f"${{run}}/student-{student}"}
        phase, pieces = settings["phases"][0], f"${{run}}/long/unlabelled-{student}"
        phase["sources"][0] |= {"audio": pieces, "transcripts": f"{pieces}.jsonl"}
        phase |= {"passes": PASSES, "hours_at_least": 0}
        found[f"student-{student}"] = {"verb": "train", "settings": settings}
    heard = {name: f"${{run}}/{name}" for name in tested(students)}
    sets = {"given": "${run}/data/test"}
    for condition in CONDITIONS:
        found |= recordings("test", condition, longest)
        sets |= {f"{condition}-{cut}": f"${{run}}/long/test-{condition}-{cut}" for cut in ("truth", "uncut")}
        for name, checkpoint in heard.items():
            audio = f"${{run}}/long/test-{condition}-silero"
            settings = {"checkpoint": checkpoint, "audio": audio, "output": f"{audio}-{name}.jsonl"}
            found[f"heard-{condition}-{name}"] = {"verb": "transcribe", "settings": settings}
    settings = {"systems": heard, "audio": sets, "output": "${run}/report-long", "max_seconds": longest, "bootstrap": 0}
    found["report-long"] = {"verb": "eval", "settings": settings}
    return found


def tested(students: Sequence[str]) -> list[str]:
    """The systems of the tables."""
    return [*BASES, GIVEN, *(f"student-{name}" for name in students)]


def groups(run: Path, name: str, condition: str, cut: str) -> tuple[list[score.Group], dict[str, str]]:
    """Utterances and pieces of a composed set, and the texts by key."""
    reference = run / "long" / f"{name}-{condition}"
    said, texts = score.read_reference(reference)
    return score.grouped(said, score.read_pieces(reference.with_name(f"{reference.name}-{cut}"), reference)), texts


def row(*cells: Any) -> None:
    """Print a row of a table."""
    print("| " + " | ".join(map(str, cells)) + " |")


def head(*cells: str) -> None:
    """Print the head of a table."""
    print()
    row(*cells)
    print("|---" * len(cells) + "|")


def print_cuts(runs: Sequence[Path]) -> None:
    """What the detectors find: means over the runs."""
    head("recordings", "detector", "pieces an utterance", *(f"{kind} %" for kind in score.KINDS[:-1]), "speech left out %", "not speech, of what is kept %", "empty pieces: pauses, stretches", "seconds of these", "piece begins before its speech, s (5, 50, 95 %)", "ends behind it")  # fmt: skip
    for condition in CONDITIONS:
        for cut in CUTS:
            found = []
            for run in runs:
                between = score.lines(run / "long" / f"unlabelled-{condition}" / "between.jsonl")
                spans = [score.Span(one["recording"], one["start"], one["end"], one["kind"]) for one in between]
                group = groups(run, "unlabelled", condition, cut)[0]
                found.append((score.cuts_of(group, spans), sum(len(one.utterances) for one in group)))

            def mean(value: Callable[[score.Cuts], float], found: list[tuple[score.Cuts, int]] = found) -> float:
                return statistics.mean(value(one) for one, _ in found)

            bounds = [[seconds for one, _ in found for seconds in getattr(one, name)] for name in ("starts", "ends")]
            spread = [statistics.quantiles(values, n=20) for values in bounds]
            row(
                condition, cut, f"{statistics.mean(one.pieces / count for one, count in found):.2f}",
                *(f"{100 * mean(lambda one, kind=kind: one.share[kind]):.1f}" for kind in score.KINDS[:-1]),  # type: ignore[misc]
                f"{100 * mean(lambda one: one.left_out / one.speech):.1f}",
                f"{100 * mean(lambda one: one.kept / (one.kept + one.speech - one.left_out)):.0f}",
                f"{mean(lambda one: one.empty.get('pause', 0)):.0f}, {mean(lambda one: sum(one.empty.values()) - one.empty.get('pause', 0)):.0f}",
                f"{mean(lambda one: one.empty_seconds):.0f}",
                *(f"{one[0]:.2f}, {one[9]:.2f}, {one[18]:.2f}" for one in spread),
            )  # fmt: skip


def total(counts: dict[str, ErrorCounts]) -> float:
    """The word error rate over all kinds of groups."""
    return sum(counts.values(), ErrorCounts()).rate


def print_labels(runs: Sequence[Path]) -> None:
    """Errors in the teacher's labels, of utterances as given and of pieces."""
    head("recordings", "cut by", "WER %, mean", "each seed", "against as given", *(f"{kind}: WER %, words" for kind in score.KINDS[:-1]), "words in empty pieces")  # fmt: skip
    given = []
    for run in runs:
        told = read_transcripts(run / "corpus" / "unlabelled-oracle.jsonl")
        said = read_transcripts(run / "teacher-lists.jsonl")
        every = [
            score.count_errors(score.NORMALIZE(text), score.NORMALIZE(said.get(key, ""))) for key, text in told.items()
        ]
        given.append(sum(every, ErrorCounts()).rate)
    row("as given", "–", f"{100 * statistics.mean(given):.1f}", each(given), *["–"] * 8)
    for condition in CONDITIONS:
        for cut in CUTS:
            found = []
            for run in runs:
                group, texts = groups(run, "unlabelled", condition, cut)
                found.append(score.errors_of(group, texts, read_transcripts(run / "long" / f"unlabelled-{condition}-{cut}.jsonl")))  # fmt: skip
            wers, kinds = [total(one) for one in found], []
            for kind in score.KINDS[:-1]:
                own = sum((one[kind] for one in found if kind in one), ErrorCounts())
                kinds.append(f"{100 * own.rate:.1f}, {own.words / len(runs):.0f}" if own.words else "–")
            empty = sum((one["empty"] for one in found if "empty" in one), ErrorCounts())
            row(condition, cut, f"{100 * statistics.mean(wers):.1f}", each(wers), paired(wers, given), *kinds, f"{empty.insertions / len(runs):.0f}")  # fmt: skip


def print_systems(runs: Sequence[Path], students: Sequence[str]) -> None:
    """Errors on the test set as given, and in long recordings of it: utterance by utterance, cut by the detector, and uncut."""
    reports = [systems(run, "report-long") for run in runs]
    names = tested(students)
    given = {name: [one[name]["sets"]["given"]["wer"] for one in reports] for name in names}
    head("system", "WER %, mean", "each seed", f"against {GIVEN}")
    for name in names:
        row(name, f"{100 * statistics.mean(given[name]):.1f}", each(given[name]), "–" if name == GIVEN else paired(given[name], given[GIVEN]))  # fmt: skip
    ways = ("by utterance", "cut", "uncut")
    head("system", "as given", *(f"{condition}, {way}" for condition in CONDITIONS for way in ways))
    for name in names:
        cells = []
        for condition in CONDITIONS:
            cut = []
            for run in runs:
                group, texts = groups(run, "test", condition, "silero")
                heard = read_transcripts(run / "long" / f"test-{condition}-silero-{name}.jsonl")
                cut.append(total(score.errors_of(group, texts, heard)))
            single, uncut = ([one[name]["sets"][f"{condition}-{how}"]["wer"] for one in reports] for how in ("truth", "uncut"))  # fmt: skip
            cells += [f"{100 * statistics.mean(values):.1f}" for values in (single, cut, uncut)]
        row(name, f"{100 * statistics.mean(given[name]):.1f}", *cells)


def main() -> None:
    """Run what is missing and print the tables."""
    own = sys.argv[1 : sys.argv.index("--")] if "--" in sys.argv else sys.argv[1:]
    more = sys.argv[sys.argv.index("--") + 1 :] if "--" in sys.argv else []
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0, help="so that several processes can share the seeds")
    parser.add_argument("--students", nargs="*", default=list(STUDENTS), metavar="CONDITION-CUT")
    chosen = parser.parse_args(own)
    if wrong := set(chosen.students) - {f"{condition}-{cut}" for condition in CONDITIONS for cut in CUTS}:
        parser.error(f"--students: {wrong.pop()} is no condition and cut, such as {STUDENTS[0]}")
    pipeline, seeds = load_yaml(RECIPE), range(chosen.first_seed, chosen.seeds)
    for seed in seeds:
        recipe = {"variables": pipeline["variables"], "stages": stages(pipeline, chosen.students)}
        measure(recipe, folder(seed), [f"corpus={chosen.corpus}", f"seed={seed}", *more])
    runs = [folder(seed) for seed in seeds]
    print_cuts(runs)
    print_labels(runs)
    print_systems(runs, chosen.students)


if __name__ == "__main__":
    main()
