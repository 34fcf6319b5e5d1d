"""Measure the recipe: several seeds, other conditions, and what each part of it is worth.

    python pipelines/an4/measure.py --corpus an4 --seeds 6
    python pipelines/an4/measure.py --corpus an4 --seeds 0 --conditions bpe half double digits --condition-seeds 2
    python pipelines/an4/measure.py --corpus an4 --seeds 0 --parts-seeds 3
    python pipelines/an4/measure.py --corpus an4 --seeds 0 --amount-seeds 3 --other speechocean762/unlabelled
    python pipelines/an4/measure.py --corpus an4 --seeds 0 --noise-seeds 6

Prints the tables of RESULTS.md. Everything already measured is kept in runs/ and not run again. What follows `--` goes to every
run as it is, e.g. `-- precision=bfloat16`.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "digits"))
from noisy import T95, compared, print_conditions, with_noise

from asr_kd.config.load import load_yaml
from asr_kd.files import read_json
from asr_kd.shards.tarset import read_index

RECIPE = Path("pipelines/an4/pipeline.yaml")
SYSTEMS = ("teacher", "student-supervised", "student-pseudo-label", "student-distilled", "student-oracle")
# condition → variables of the pipeline; `digits` is another corpus
CONDITIONS: dict[str, list[str]] = {
    "bpe": ["units=bpe", "units_size=100"],
    "half": ["labelled_minutes=5"],
    "double": ["labelled_minutes=20"],
    "digits": ["units=unigram", "units_size=27"],
}
#: of the unlabelled speakers, and by what their number is divided
PARTS = {"quarter": 4, "half": 2}


def digits(pipeline: dict[str, Any]) -> dict[str, Any]:
    """The recipe on the spoken digits: their data in place of the corpus, and all else as it is."""
    made = {"verb": "script", "settings": {"file": "pipelines/digits/compose.py", "output": "${run}/data", "arguments": ["--source", "data_manifests/digits"]}}  # fmt: skip
    stages = {name: stage for name, stage in pipeline["stages"].items() if stage["verb"] != "prepare" and name not in ("corpus", "test-conditions")}  # fmt: skip
    told = yaml.safe_dump({**pipeline, "stages": {"data": made, **stages}}, sort_keys=False)
    pipeline = yaml.safe_load(
        told.replace("${run}/corpus/unlabelled-oracle.jsonl", "${run}/data/unlabelled-oracle.jsonl")
    )
    for stage in pipeline["stages"].values():
        if stage["verb"] == "train":
            stage["settings"]["features"] = {"sample_rate": 8000}
    return dict(pipeline)


def parts(pipeline: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Students that hear what the distilled one hears, as often, and learn something else of it: name → stages."""
    whole = pipeline["stages"]["student-pseudo-label"]["settings"]

    def learn(**learned: Any) -> dict[str, Any]:
        settings = copy.deepcopy(whole)
        source = settings["phases"][0]["sources"][0]
        for name in ("ctc", "transcripts"):
            source.pop(name)
        source |= learned
        return settings

    def soft(**learned: Any) -> dict[str, Any]:
        return learn(targets="${run}/soft-targets", soft=1.0, **learned)

    lists = "${run}/teacher-lists.jsonl"
    students = {
        "best-of-lists": learn(transcripts=lists, ctc=1.0),
        "calibrated-lists": learn(transcripts=lists, soft=1.0, sequences={"temperature": 3.0}),
        "draws-of-frames": soft(sequences={}),
        "spikes": soft(spikes={}),
        "frames": soft(),
    }
    needed: dict[str, dict[str, Any]] = {
        "soft-targets": {"verb": "label", "settings": {"teacher": "${run}/teacher", "audio": "${run}/data/unlabelled", "output": "${run}/soft-targets"}},
    }  # fmt: skip
    for name, settings in students.items():
        needed[f"student-{name}"] = {"verb": "train", "settings": {**settings, "output": "${run}/student-" + name}}
    return needed


def with_parts(pipeline: dict[str, Any]) -> dict[str, Any]:
    """The recipe, and behind it the students of `parts` with a report about them."""
    report = copy.deepcopy(pipeline["stages"]["report"])
    more = parts(pipeline)
    names = [
        "student-pseudo-label",
        "student-distilled",
        *(name for name, stage in more.items() if stage["verb"] == "train"),
    ]
    report["settings"] = {
        "systems": {name: "${run}/" + name for name in names},
        "audio": "${run}/data/test",
        "output": "${run}/report-parts",
        "baseline": "student-pseudo-label",
    }
    return {**pipeline, "stages": {**pipeline["stages"], **more, "report-parts": report}}


def with_noisy(pipeline: dict[str, Any]) -> dict[str, Any]:
    """The recipe without oracle, and behind it the students that hear noise, all in one report by condition."""
    left_out = ("student-oracle", "report", "report-conditions")  # the clean test set is one of the conditions
    stages = {name: stage for name, stage in pipeline["stages"].items() if name not in left_out}
    stages |= {**with_noise(stages), "report-noise": compared("${run}/report-noise")}
    return {**pipeline, "stages": stages}


def without_oracle(pipeline: dict[str, Any]) -> dict[str, Any]:
    """The recipe less the student that shows what there is to win."""
    stages = {name: stage for name, stage in copy.deepcopy(pipeline["stages"]).items() if name != "student-oracle"}
    for report in ("report", "report-conditions"):
        systems = stages[report]["settings"]["systems"]
        stages[report]["settings"]["systems"] = {name: one for name, one in systems.items() if name != "student-oracle"}
    return {**pipeline, "stages": stages}


def amounts(pipeline: dict[str, Any], run: Path, other: str | None, texts: str | None = None) -> dict[str, Any]:
    """The recipe's distilled student on parts of the unlabelled audio, by speaker, and with audio of another corpus beside all of it.

    All hear as many hours. The parts are nested: each holds the speakers of the smaller ones.

    Args:
        run: in which the manifest of the unlabelled audio is.
        other: manifest of the other corpus, if there is one.
        texts: what somebody else says of its audio, as `transcribe` writes it, for one student more that learns this.
    """
    rows = [json.loads(line) for line in (run / "corpus" / "unlabelled.jsonl").read_text().splitlines()]
    speakers = list(dict.fromkeys(row["speaker"] for row in rows))
    stages, whole = copy.deepcopy(pipeline["stages"]), pipeline["stages"]["student-distilled"]["settings"]
    students = ["student-supervised"]

    def add(name: str, *sources: dict[str, Any], **more: Any) -> None:
        settings = copy.deepcopy(whole) | {"output": "${run}/" + name, **more}
        settings["phases"][0]["sources"][:1] = sources
        stages[name] = {"verb": "train", "settings": settings}
        students.append(name)

    lists = whole["phases"][0]["sources"][0]
    for part, divisor in PARTS.items():
        some, path = set(speakers[: len(speakers) // divisor]), run / f"unlabelled-{part}.jsonl"
        kept = [
            {**row, "audio": str((run / "corpus" / row["audio"]).resolve())} for row in rows if row["speaker"] in some
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in kept))
        audio = f"${{run}}/data/unlabelled-{part}"
        stages[f"unlabelled-{part}"] = {"verb": "prepare", "settings": {"manifest": "${run}/" + path.name, "output": audio, "drop_text": True}}  # fmt: skip
        add(f"student-{part}", {**lists, "audio": audio})
    students.append("student-distilled")
    if other:
        audio, lists_of_other = "${run}/data/other", "${run}/other-lists.jsonl"
        transcribe = copy.deepcopy(stages["teacher-lists"]["settings"]) | {"audio": audio, "output": lists_of_other}
        stages["other"] = {"verb": "prepare", "settings": {"manifest": other, "output": audio, "drop_text": True}}
        stages["other-lists"] = {"verb": "transcribe", "settings": transcribe}
        add("student-other", lists, {**lists, "audio": audio, "transcripts": lists_of_other})
        if texts:
            told = {"audio": audio, "transcripts": texts, "ctc": 1.0, "augment": lists["augment"]}
            add("student-other-texts", lists, told, max_bad_share=0.1)  # of what they leave out
    wanted = ("corpus", "labelled", "development", "test", "unlabelled", *(f"unlabelled-{part}" for part in PARTS), "units", "teacher-units", "teacher", "text", "teacher-lists", "other", "other-lists")  # fmt: skip
    report = {"systems": {name: "${run}/" + name for name in students}, "audio": "${run}/data/test", "output": "${run}/report-amounts", "baseline": "student-supervised"}  # fmt: skip
    kept = {name: stage for name, stage in stages.items() if name in wanted or name in students}
    return {**pipeline, "stages": {**kept, "report-amounts": {"verb": "eval", "settings": report}}}


def folder(seed: int, condition: str = "") -> Path:
    """Where a run lies."""
    return Path("runs") / "-".join(["an4", *([condition] if condition else []), f"seed{seed}"])


def measure(pipeline: dict[str, Any], run: Path, variables: list[str]) -> None:
    """Run what is missing."""
    file = run / "measured.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(pipeline, sort_keys=False))
    words = ["run", str(file), f"run={run}", *variables]
    subprocess.run([sys.executable, "-m", "asr_kd.cli", *words], check=True)


def systems(run: Path, report: str = "report") -> dict[str, Any]:
    """The systems of a run's report."""
    return dict(read_json(run / report / "report.json")["systems"])


def each(values: list[float]) -> str:
    """Every seed's WER in per cent."""
    return " / ".join(f"{100 * value:.1f}" for value in values)


def paired(ours: list[float], theirs: list[float]) -> str:
    """The relative difference of two systems over the same seeds, with its 95 % interval by the t distribution."""
    base = statistics.mean(theirs)
    differences = [(one - other) / base for one, other in zip(ours, theirs, strict=True)]
    mean = 100 * statistics.mean(differences)
    if len(differences) < 2:
        return f"{mean:+.1f} %"
    half = 100 * T95[len(differences) - 2] * statistics.stdev(differences) / math.sqrt(len(differences))
    return f"{mean:+.1f} % ({mean - half:+.1f} to {mean + half:+.1f})"


def print_table(title: str, runs: list[dict[str, Any]], names: list[str]) -> None:
    """Systems over the seeds of one condition, each against the pseudo-label student."""
    wers = {name: [run[name]["wer"] for run in runs if name in run] for name in names}
    names = [name for name in names if wers[name]]
    print(f"\n| {title} | WER %, mean of {len(runs)} | each seed | sub / del / ins, mean | against the pseudo-label student | gap recovered |")  # fmt: skip
    print("|---|---|---|---|---|---|")
    mean = {name: statistics.mean(wers[name]) for name in names}
    for name in names:
        counts = [statistics.mean(run[name][kind] for run in runs if name in run) for kind in ("substitutions", "deletions", "insertions")]  # fmt: skip
        rival = [run["student-pseudo-label"]["wer"] for run in runs if name in run]
        against = "–" if name == "student-pseudo-label" else paired(wers[name], rival)
        gap = mean.get("student-supervised", 0.0) - mean.get("teacher", 0.0)
        share = f"{100 * (mean['student-supervised'] - mean[name]) / gap:.0f} %" if gap > 0 and "student-" in name and name != "student-supervised" else "–"  # fmt: skip
        print(f"| {name} | {100 * mean[name]:.1f} | {each(wers[name])} | {' / '.join(f'{count:.0f}' for count in counts)} | {against} | {share} |")  # fmt: skip


def print_amounts(seeds: range) -> None:
    """WER by hours of unlabelled audio; and the points that `asr-kd plan` reads."""
    runs = [systems(folder(seed), "report-amounts") for seed in seeds]
    sets = {**{f"student-{part}": f"unlabelled-{part}" for part in PARTS}, "student-distilled": "unlabelled"}
    hours = {"student-supervised": 0.0} | {
        name: read_index(str(folder(seeds[0]) / "data" / audio)).seconds / 3600 for name, audio in sets.items()
    }
    title = f"| student | hours without text | WER %, mean of {len(runs)} | each seed | against all of it |"
    print(f"\n{title}\n|---|---|---|---|---|")
    whole = [run["student-distilled"]["wer"] for run in runs]
    for name in [*hours, *(name for name in runs[0] if name not in hours)]:
        wers = [run[name]["wer"] for run in runs]
        against = "–" if name == "student-distilled" else paired(wers, whole)
        beside = {
            "student-other": " and the other corpus",
            "student-other-texts": " and the other corpus with its texts",
        }
        heard = f"{hours.get(name, hours['student-distilled']):.2f}{beside.get(name, '')}"
        print(f"| {name} | {heard} | {100 * statistics.mean(wers):.1f} | {each(wers)} | {against} |")
    file = Path("runs/an4-amounts.jsonl")
    points = [
        {"hours": hours[name], "wer": run[name]["wer"], "seed": seed}
        for name in hours if hours[name] for seed, run in zip(seeds, runs, strict=True)
    ]  # fmt: skip
    file.write_text("".join(json.dumps(point) + "\n" for point in points))
    print(f"\nasr-kd plan measured={file} … extrapolates them, if they follow its law")


def main() -> None:
    """Run what is missing and print the tables."""
    own = sys.argv[1 : sys.argv.index("--")] if "--" in sys.argv else sys.argv[1:]
    more = sys.argv[sys.argv.index("--") + 1 :] if "--" in sys.argv else []
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--first-seed", type=int, default=0, help="so that several processes can share the seeds")
    parser.add_argument("--oracle-seeds", type=int, default=6, help="seeds with the oracle student too")
    parser.add_argument("--conditions", nargs="*", default=[], choices=list(CONDITIONS))
    parser.add_argument("--condition-seeds", type=int, default=1)
    parser.add_argument("--parts-seeds", type=int, default=0, help="seeds in which the parts are measured one by one")
    parser.add_argument(
        "--amount-seeds", type=int, default=0, help="seeds in which parts of the unlabelled audio are learned"
    )
    parser.add_argument("--other", help="manifest of another corpus, whose audio is learned beside it then")
    parser.add_argument(
        "--other-texts", help="what somebody else says of that audio (transcribe), for one student more"
    )
    parser.add_argument("--noise-seeds", type=int, default=0, help="seeds in which students hear noise")
    chosen = parser.parse_args(own)
    if chosen.other_texts and not chosen.other:
        parser.error("--other-texts are of the audio of --other; name its manifest")
    pipeline, corpus = load_yaml(RECIPE), [f"corpus={chosen.corpus}"]
    seeds = range(chosen.first_seed, chosen.seeds)
    for seed in seeds:
        recipe = pipeline if seed < chosen.oracle_seeds else without_oracle(pipeline)
        measure(recipe, folder(seed), [*corpus, f"seed={seed}", *more])
    for condition in chosen.conditions:
        recipe = without_oracle(digits(pipeline) if condition == "digits" else pipeline)
        for seed in range(chosen.first_seed, chosen.condition_seeds):
            measure(recipe, folder(seed, condition), [*corpus, f"seed={seed}", *CONDITIONS[condition], *more])
    for seed in range(chosen.first_seed, chosen.parts_seeds):
        measure(with_parts(pipeline), folder(seed), [*corpus, f"seed={seed}", *more])
    for seed in range(chosen.first_seed, chosen.amount_seeds):
        run, words = folder(seed), [*corpus, f"seed={seed}", *more]
        if not (run / "corpus" / "unlabelled.jsonl").exists():
            stages = {"corpus": pipeline["stages"]["corpus"]}
            measure({**pipeline, "stages": stages}, run, words)
        measure(amounts(pipeline, run, chosen.other, chosen.other_texts), run, words)
    for seed in range(chosen.first_seed, chosen.noise_seeds):
        measure(with_noisy(pipeline), folder(seed), [*corpus, f"seed={seed}", *more])
    if seeds:
        print_table("system", [systems(folder(seed)) for seed in seeds], list(SYSTEMS))
    for condition in chosen.conditions:
        runs = [systems(folder(seed, condition)) for seed in range(chosen.first_seed, chosen.condition_seeds)]
        print_table(condition, runs, list(SYSTEMS))
    if chosen.parts_seeds:
        runs = [systems(folder(seed, ""), "report-parts") for seed in range(chosen.first_seed, chosen.parts_seeds)]
        print_table("student", runs, list(runs[0]))
    if chosen.amount_seeds:
        print_amounts(range(chosen.first_seed, chosen.amount_seeds))
    if chosen.noise_seeds:
        print_conditions([folder(seed) / "report-noise" for seed in range(chosen.first_seed, chosen.noise_seeds)])


if __name__ == "__main__":
    main()
