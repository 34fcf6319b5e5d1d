"""Measure the recipe: the pipeline with several seeds, and the distilled student on parts of the audio and other soft targets.

    .venv/bin/python pipelines/digits/measure.py --seeds 6
    .venv/bin/python pipelines/digits/measure.py --seeds 0 --schedule-seeds 3   # other orders of the same audio
    .venv/bin/python pipelines/digits/measure.py --seeds 0 --average-seeds 3    # other averages of the weights
    .venv/bin/python pipelines/digits/measure.py --seeds 0 --noise-seeds 6      # noise on the student's side

Prints the tables of README.md and RESULTS.md; everything already measured is kept in runs/ and not run again.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parent))
from noisy import compared, print_conditions, with_noise

from asr_kd.audio.settings import FeatureSettings
from asr_kd.config.load import load_yaml
from asr_kd.files import read_json
from asr_kd.shards.tarset import read_index

RECIPE = Path("pipelines/digits/pipeline.yaml")
SYSTEMS = ("teacher", "student-supervised", "student-pseudo-label", "student-distilled", "student-oracle")
# a smaller part is read more often, so that every student makes the same number of updates
PARTS = {"quarter": 4, "half": 2}
# other ways to keep soft targets, by settings of `label`; the recipe's own is the default, mass 0.999 with k 20
MODES: dict[str, dict[str, Any]] = {
    "mass-0.9": {"mass": 0.9},
    "top-20": {"mode": "top_k"},
    "top-1": {"mode": "top_k", "k": 1},
    "sampled-5": {"mode": "sampled", "draws": 5},
    "sampled-20": {"mode": "sampled", "draws": 20},
}
# what is made of a student's weights; without `ema_decay` they are those of single steps
AVERAGES: dict[str, dict[str, Any]] = {
    "none": {"ema_decay": 0.0},
    "ema": {"ema_decay": 0.99},
    "last-5": {"ema_decay": 0.0, "average": {"last": 5}},
    "best-5": {"ema_decay": 0.0, "average": {"best": 5}},
}
AVERAGED = ("student-supervised", "student-distilled")


def run_folder(seed: int) -> Path:
    """Where a seed's run lies; seed 0 is that of `make digits`."""
    return Path("runs/digits" if seed == 0 else f"runs/digits-seed{seed}")


def measured_pipeline(modes: bool) -> dict[str, Any]:
    """The recipe, and behind it the distilled student on parts of the unlabelled audio and, if asked, on other soft targets."""
    pipeline = load_yaml(RECIPE)
    stages = pipeline["stages"]

    def student(name: str, kind: str = "student-distilled", **unlabelled: Any) -> None:
        stage = copy.deepcopy(stages[kind])
        stage["settings"]["output"] = "${run}/" + f"{kind}-{name}"
        stage["settings"]["phases"][0]["sources"][0] |= unlabelled
        stages[f"{kind}-{name}"] = stage

    for part, times in PARTS.items():
        student(part, audio="${run}/data/unlabelled-" + part, repeat=times)
    for mode, settings in MODES.items() if modes else ():
        label = copy.deepcopy(stages["soft-targets"])
        label["settings"] |= {"output": "${run}/soft-targets-" + mode, **settings}
        stages[f"soft-targets-{mode}"] = label
        student(mode, targets=label["settings"]["output"])
    if modes:
        stages |= with_noise(stages)
        stages["report-conditions"] = compared("${run}/report-conditions")
    report = copy.deepcopy(stages["report"])
    systems = {name: "${run}/student-distilled-" + name for name in [*PARTS, *(MODES if modes else ())]}
    report["settings"] = {"systems": systems, "audio": "${run}/data/test", "output": "${run}/report-variants"}
    stages["report-variants"] = report
    return pipeline


def noise_pipeline() -> dict[str, Any]:
    """The recipe's students with and without noise, less what the comparison does not need."""
    pipeline = load_yaml(RECIPE)
    stages = {name: stage for name, stage in pipeline["stages"].items() if name not in ("student-oracle", "report")}
    stages |= {**with_noise(stages), "report-conditions": compared("${run}/report-conditions")}
    return {**pipeline, "stages": stages}


def schedules(phase: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Settings of students that hear what the recipe's hears, each source as often, in another order.

    Args:
        phase: the recipe's only one.
    """
    unlabelled, labelled = phase["sources"]
    passes, repeat = phase["passes"], labelled["repeat"]
    # every frame by itself: chunks cannot learn whole transcripts
    by_frames = {name: value for name, value in unlabelled.items() if name != "sequences"}

    def hear(passes: int, *sources: dict[str, Any], **rule: Any) -> dict[str, Any]:
        return {**phase, "sources": list(sources), "passes": passes, **rule}

    def often(times: int) -> dict[str, Any]:
        return {**labelled, "repeat": times}

    chunked = hear(passes // 2, by_frames, chunks={"frames": 32, "left": 16, "right": 8})
    # a quarter of what is heard of the labelled audio
    at_the_end = hear(passes, often(repeat // 4), learning_rate=0.001)
    even = {"warmup": 0.0, "final_rate": 1.0}
    return {
        "labelled-first": {"phases": [hear(passes, often(repeat)), hear(passes, unlabelled)]},
        "unlabelled-first": {"phases": [hear(passes, unlabelled), hear(passes, often(repeat))]},
        "sub-epochs": {
            "cycles": passes,
            "cycle_decay": 0.8,
            "phases": [hear(1, unlabelled, **even), hear(1, often(repeat), **even)],
        },
        "frames-then-sequences": {
            "phases": [hear(passes // 2, by_frames), hear(passes // 2, unlabelled, often(2 * repeat))]
        },
        "chunked-then-full": {"phases": [chunked, hear(passes // 2, unlabelled, often(2 * repeat))]},
        "batches-then-labelled": {"phases": [hear(passes, unlabelled, often(repeat * 3 // 4)), at_the_end]},
        "chunked-then-full-then-labelled": {
            "phases": [chunked, hear(passes // 2, unlabelled, often(repeat * 3 // 2)), at_the_end]
        },
    }


def of_students(pipeline: dict[str, Any], students: dict[str, dict[str, Any]], report: str) -> dict[str, Any]:
    """The stages that students need, the students (name: settings of `train`) and a report about them."""
    needed = ("data", "units", "student-supervised", "alignment", "teacher", "soft-targets", "student-distilled")
    stages = {name: pipeline["stages"][name] for name in needed}
    for name, settings in students.items():
        stages[name] = {"verb": "train", "settings": {**settings, "output": "${run}/" + name}}
    systems = {name: "${run}/" + name for name in ["student-distilled", *students]}
    settings = {"systems": systems, "audio": "${run}/data/test", "output": "${run}/" + report}
    return {**pipeline, "stages": {**stages, report: {"verb": "eval", "settings": settings}}}


def schedules_pipeline() -> dict[str, Any]:
    """The distilled student with other schedules."""
    pipeline = load_yaml(RECIPE)
    recipe = pipeline["stages"]["student-distilled"]["settings"]
    students = {
        f"student-distilled-{name}": {**recipe, **other} for name, other in schedules(recipe["phases"][0]).items()
    }
    return of_students(pipeline, students, "report-schedules")


def averages_pipeline() -> dict[str, Any]:
    """The supervised and the distilled student with other averages of their weights, each scored every 50 steps."""
    pipeline = load_yaml(RECIPE)
    students = {
        f"{kind}-{name}": {**pipeline["stages"][kind]["settings"], "evaluate_every": 50, **average}
        for kind in AVERAGED
        for name, average in AVERAGES.items()
    }
    return of_students(pipeline, students, "report-averages")


def measure(seed: int, pipeline: dict[str, Any], name: str) -> None:
    """Run what is missing of a seed."""
    file = run_folder(seed) / f"{name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(pipeline, sort_keys=False))
    words = ["run", str(file), f"seed={seed}", f"run={run_folder(seed)}"]
    subprocess.run([sys.executable, "-m", "asr_kd.cli", *words], check=True)


def main() -> None:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--first-seed", type=int, default=0, help="so that several processes can share the seeds; above 0 no tables"
    )
    parser.add_argument("--mode-seeds", type=int, default=3, help="seeds in which other soft targets are tried too")
    parser.add_argument("--schedule-seeds", type=int, default=0, help="seeds in which other schedules are tried")
    parser.add_argument(
        "--average-seeds", type=int, default=0, help="seeds in which other averages of weights are tried"
    )
    parser.add_argument("--noise-seeds", type=int, default=0, help="seeds in which students hear noise")
    arguments = parser.parse_args()
    first, seeds = arguments.first_seed, range(arguments.first_seed, arguments.seeds)
    tried = range(first, min(arguments.mode_seeds, arguments.seeds))
    for seed in seeds:
        measure(seed, measured_pipeline(seed in tried), "measured")
    for seed in range(first, arguments.schedule_seeds):
        measure(seed, schedules_pipeline(), "schedules")
    for seed in range(first, arguments.average_seeds):
        measure(seed, averages_pipeline(), "averages")
    for seed in range(first, arguments.noise_seeds):
        measure(seed, noise_pipeline(), "noise")
    if first:
        return  # a run from seed 0 on prints them all, when they are there
    if seeds:
        systems = [read_json(run_folder(seed) / "report" / "report.json")["systems"] for seed in seeds]
        variants = [read_json(run_folder(seed) / "report-variants" / "report.json")["systems"] for seed in seeds]
        print_systems(systems)
        print_parts(systems, variants)
        print_stages()
        if tried:
            print_modes(tried, systems, variants)
            print_conditions([run_folder(seed) / "report-conditions" for seed in tried])
    if arguments.noise_seeds:
        print_conditions([run_folder(seed) / "report-conditions" for seed in range(arguments.noise_seeds)])
    if arguments.schedule_seeds:
        names = [
            "",
            *(
                f"-{name}"
                for name in schedules(load_yaml(RECIPE)["stages"]["student-distilled"]["settings"]["phases"][0])
            ),
        ]
        print_students(
            [f"student-distilled{name}" for name in names], "report-schedules", range(arguments.schedule_seeds)
        )
    if arguments.average_seeds:
        names = [f"{kind}-{name}" for kind in AVERAGED for name in AVERAGES]
        print_students(names, "report-averages", range(arguments.average_seeds))


def print_systems(reports: list[dict[str, Any]]) -> None:
    """The table of systems, from each seed's `systems`."""
    mean = {name: statistics.mean(report[name]["wer"] for report in reports) for name in SYSTEMS}
    gap = mean["student-supervised"] - mean["teacher"]
    print(
        f"\n| system | WER %, mean of {len(reports)} seeds | each seed | change from supervised | gap recovered | parameters | real-time factor |"
    )
    print("|---|---|---|---|---|---|---|")
    for name in SYSTEMS:
        wers = each([report[name]["wer"] for report in reports])
        change = (
            f"{100 * (mean[name] / mean['student-supervised'] - 1):+.0f} %" if name != "student-supervised" else "–"
        )
        share = (
            f"{100 * (mean['student-supervised'] - mean[name]) / gap:.0f} %"
            if gap > 0 and name not in ("teacher", "student-supervised")
            else "–"
        )
        speed = statistics.mean(report[name]["real_time_factor"] for report in reports)
        print(
            f"| {name} | {100 * mean[name]:.2f} | {wers} | {change} | {share} | {reports[0][name]['parameters']:,} | {speed:.4f} |"
        )


def print_parts(reports: list[dict[str, Any]], variants: list[dict[str, Any]]) -> None:
    """WER by the amount of unlabelled audio; and the points that `asr-kd plan` reads."""
    print("\n| unlabelled audio | minutes | distilled student, WER %, mean | each seed |\n|---|---|---|---|")
    rows = {f"unlabelled-{part}": [report[part]["wer"] for report in variants] for part in PARTS}
    points = []
    for part, values in {**rows, "unlabelled": [report["student-distilled"]["wer"] for report in reports]}.items():
        seconds = sum(shard.seconds for shard in read_index(run_folder(0) / "data" / part))
        print(f"| {part} | {seconds / 60:.0f} | {100 * statistics.mean(values):.2f} | {each(values)} |")
        points += [{"hours": seconds / 3600, "wer": wer, "seed": seed} for seed, wer in enumerate(values)]
    file = Path("runs/digits-amounts.jsonl")
    file.write_text("".join(json.dumps(point) + "\n" for point in points))
    print(f"\nasr-kd plan measured={file} … extrapolates them, if they follow its law")


def print_stages() -> None:
    """What each stage of seed 0 took."""
    print(
        "\n| stage of seed 0 | seconds | audio hours | audio hours a second | frames a second |\n|---|---|---|---|---|"
    )
    for stage, seconds, heard in stages(run_folder(0)):
        frames = heard / FeatureSettings().frame_ms * 1000
        print(
            f"| {stage} | {seconds:.0f} | {heard / 3600:.2f} | {heard / 3600 / seconds:.3f} | {frames / seconds:,.0f} |"
        )


def print_modes(seeds: range, reports: list[dict[str, Any]], variants: list[dict[str, Any]]) -> None:
    """Bytes, divergence and the student's WER by what was kept of the teacher; sizes and divergence of seed 0."""
    print(
        f"\n| soft targets | units kept a frame | bytes a frame | KL, nat | WER %, mean of {len(seeds)} seeds | each seed |"
        "\n|---|---|---|---|---|---|"
    )
    for mode in ["mass-0.999", *MODES]:
        folder = "soft-targets" if mode not in MODES else f"soft-targets-{mode}"
        report = read_json(run_folder(0) / folder / "report.json")
        values = [
            (variants[seed][mode] if mode in MODES else reports[seed]["student-distilled"])["wer"] for seed in seeds
        ]
        kl = "–" if report["mean_kl"] is None else f"{report['mean_kl']:.5f}"
        print(
            f"| {mode} | {report['entries_per_frame']:.2f} | {report['bytes_per_frame']:.2f} | {kl} | "
            f"{100 * statistics.mean(values):.2f} | {each(values)} |"
        )


def print_students(names: list[str], report: str, seeds: range) -> None:
    """WER of students on the development set, by which each chose its checkpoint, and on the test set."""
    print(
        f"\n| student | steps | audio hours | development WER %, mean of {len(seeds)} seeds | each seed | test WER %, mean | each seed |"
        "\n|---|---|---|---|---|---|---|"
    )
    reports = [read_json(run_folder(seed) / report / "report.json")["systems"] for seed in seeds]
    for name in names:
        development = [
            read_json(run_folder(seed) / name / "best" / "checkpoint.json")["training"]["development_wer"]
            for seed in seeds
        ]
        lines = [json.loads(line) for line in (run_folder(0) / name / "metrics.jsonl").read_text().splitlines()]
        last = [line for line in lines if "audio_hours" in line][-1]
        test = [one[name]["wer"] for one in reports]
        print(
            f"| {name} | {last['step']:,} | {last['audio_hours']:.2f} | {100 * statistics.mean(development):.2f} | "
            f"{each(development)} | {100 * statistics.mean(test):.2f} | {each(test)} |"
        )


def each(values: list[float]) -> str:
    """Every seed's WER in per cent."""
    return " / ".join(f"{100 * value:.2f}" for value in values)


def stages(run: Path) -> Iterator[tuple[str, float, float]]:
    """(stage, seconds it took, seconds of audio that went through it), in the order of the pipeline."""
    settings = load_yaml(RECIPE)
    spoken = {name: sum(shard.seconds for shard in read_index(run / "data" / name)) for name in ("unlabelled", "test")}
    for stage, description in settings["stages"].items():
        seconds = read_json(run / "stages" / f"{stage}.json")["seconds"]
        if description["verb"] == "train":
            last = (run / stage / "metrics.jsonl").read_text().splitlines()[-1]
            yield stage, seconds, 3600 * json.loads(last)["audio_hours"]
        elif description["verb"] == "label":
            yield stage, seconds, 3600 * read_json(run / stage / "report.json")["audio_hours"]
        elif description["verb"] == "transcribe":
            yield stage, seconds, spoken["unlabelled"]
        elif description["verb"] == "eval":
            yield stage, seconds, spoken["test"] * len(SYSTEMS)


if __name__ == "__main__":
    main()
