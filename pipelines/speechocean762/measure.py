"""Measure the recipe over several seeds: what each student makes of the test set, by age and gender, with and without the labelled text's words.

    python pipelines/speechocean762/measure.py --corpus speechocean762 --whisper hf:openai/whisper-base --seeds 6 -- precision=bfloat16

Prints the tables of RESULTS.md. Everything already measured is kept in runs/ and not run again; Whisper hears the audio once, for all seeds. What
follows `--` goes to every run as it is.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from asr_kd.evaluation.utterances import read_lines
from asr_kd.evaluation.wer import character_errors, count_errors
from asr_kd.text import NORMALIZERS

sys.path.insert(0, str(Path(__file__).parents[1] / "taxonomy"))
from tables import paired

#: age from which a speaker is no child
ADULT = 18
#: what Whisper writes, the same for every seed
HEARD = ("corpus", "data", "features", "units", "text", "whisper-test", "whisper-texts", "whisper-labelled", "labelled", "development", "test", "unlabelled")  # fmt: skip
#: name of a column → whether a line of a report counts in it
GROUPS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "all": lambda _: True,
    "children": lambda fields: int(fields["age"]) < ADULT,
    "adults": lambda fields: int(fields["age"]) >= ADULT,
    "female": lambda fields: fields["gender"] == "f",
    "male": lambda fields: fields["gender"] == "m",
}


def folder(seed: int) -> Path:
    """Where a run lies."""
    return Path("runs") / f"speechocean762-seed{seed}"


def take_over(seed: int) -> None:
    """Copy what is the same for every seed from the first run, so that Whisper need not hear it again."""
    run, first = folder(seed), folder(0)
    (run / "stages").mkdir(parents=True, exist_ok=True)
    for path in [*first.iterdir(), *(first / "stages").iterdir()]:
        there = run / path.relative_to(first)
        if path.name.split(".")[0] in HEARD and not there.exists():
            if path.is_dir():
                shutil.copytree(path, there, ignore=shutil.ignore_patterns(".writer"))  # which says who holds the first
            else:
                shutil.copy2(path, there)


def rates(lines: Iterable[tuple[dict[str, Any], str, str]]) -> dict[str, float]:
    """WER of each group, and the character error rate of all: fields, reference and hypothesis of each utterance."""
    rows = [(fields, count_errors(said, heard), character_errors(said, heard)) for fields, said, heard in lines]
    found = {
        name: sum(words.errors for fields, words, _ in rows if counts(fields))
        / max(1, sum(words.words for fields, words, _ in rows if counts(fields)))
        for name, counts in GROUPS.items()
    }
    return found | {"characters": sum(wrong for _, _, (_, wrong) in rows) / sum(whole for _, _, (whole, _) in rows)}


def systems_of(run: Path, report: str) -> dict[str, dict[str, float]]:
    """Rates by system; of the report without a search Whisper's too, which writes text and has no search of ours."""
    lines: dict[str, list[tuple[dict[str, Any], str, str]]] = {}
    said: dict[str, tuple[dict[str, Any], str]] = {}
    for line in read_lines(run / report / "utterances.jsonl"):
        said[line["key"]] = line["fields"], line["reference_scored"]
        lines.setdefault(line["system"], []).append((*said[line["key"]], line["hypothesis_scored"]))
    if report == "report":
        normalize = NORMALIZERS["basic"].apply
        texts = map(json.loads, (run / "whisper-test.jsonl").read_text().splitlines())
        wrote = {one["key"]: normalize(one["text"]) for one in texts}
        whisper = [(fields, reference, wrote.get(key, "")) for key, (fields, reference) in said.items()]
        lines = {"Whisper": whisper, **lines}
    return {name: rates(of_system) for name, of_system in lines.items()}


def against(ours: list[float], theirs: list[float]) -> str:
    """The relative difference over the same seeds, with its 95 % interval."""
    base = statistics.mean(theirs)
    mean, half = paired(ours, theirs)
    told = f"{100 * mean / base:+.1f} %"
    return told if half is None else f"{told} ({100 * (mean - half) / base:+.1f} to {100 * (mean + half) / base:+.1f})"


def print_table(title: str, runs: list[dict[str, dict[str, float]]]) -> None:
    """Systems over the seeds, each against the supervised student."""
    print(f"\n| {title} | WER %, mean of {len(runs)} | each seed | characters | children / adults | female / male | against the supervised student |")  # fmt: skip
    print("|---|---|---|---|---|---|---|")
    for name in runs[0]:
        mean = {group: 100 * statistics.mean(run[name][group] for run in runs) for group in runs[0][name]}
        wers, base = ([run[one]["all"] for run in runs] for one in (name, "student-supervised"))
        each = "–" if name == "Whisper" else " / ".join(f"{100 * wer:.1f}" for wer in wers)
        told = "–" if name == "student-supervised" else against(wers, base)
        print(
            f"| {name} | {mean['all']:.1f} | {each} | {mean['characters']:.1f} | {mean['children']:.1f} / {mean['adults']:.1f} | "
            f"{mean['female']:.1f} / {mean['male']:.1f} | {told} |"
        )


def main() -> None:
    """Run what is missing and print the tables."""
    own = sys.argv[1 : sys.argv.index("--")] if "--" in sys.argv else sys.argv[1:]
    more = sys.argv[sys.argv.index("--") + 1 :] if "--" in sys.argv else []
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--whisper", required=True)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument(
        "--first-seed", type=int, default=0, help="so that several processes can share the seeds, once 0 was there"
    )
    chosen = parser.parse_args(own)
    seeds = range(chosen.first_seed, chosen.seeds)
    for seed in seeds:
        if seed:
            take_over(seed)
        words = ["run", "pipelines/speechocean762", f"corpus={chosen.corpus}", f"whisper={chosen.whisper}", f"run={folder(seed)}", f"seed={seed}"]  # fmt: skip
        subprocess.run([sys.executable, "-m", "asr_kd.cli", *words, *more], check=True)
    for title, report in (("system", "report"), ("with the words and bigrams of the labelled text", "report-lm")):
        print_table(title, [systems_of(folder(seed), report) for seed in seeds])
    print(f"\n{(folder(0) / 'labels' / 'labels.md').read_text()}")


if __name__ == "__main__":
    main()
