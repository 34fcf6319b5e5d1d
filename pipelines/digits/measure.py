"""Measure the recipe: the pipeline with several seeds, and the distilled student on a half and a quarter of the unlabelled audio.

    .venv/bin/python pipelines/digits/measure.py --seeds 3

Prints the tables of README.md; everything already measured is kept in runs/ and not run again.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml

from asr_kd.config import FeatureSettings, load_yaml
from asr_kd.files import read_json
from asr_kd.shards.tarset import read_index

SYSTEMS = ("teacher", "student-supervised", "student-pseudo-label", "student-distilled", "student-oracle")
# a smaller part is read more often, so that every student makes the same number of updates
PARTS = {"unlabelled-quarter": 4, "unlabelled-half": 2}


def asr_kd(*words: str) -> None:
    """Run a verb; its output goes to the terminal."""
    print("+ asr-kd", *words, file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "asr_kd.cli", *words], check=True)


def run_folder(seed: int) -> Path:
    """Where a seed's run lies; seed 0 is that of `make digits`."""
    return Path("runs/digits" if seed == 0 else f"runs/digits-seed{seed}")


def train_part(seed: int, part: str) -> None:
    """The distilled student of a seed on a part of the unlabelled audio, whose shards the same targets answer."""
    run = run_folder(seed)
    name = f"student-distilled-{part.removeprefix('unlabelled-')}"
    settings = yaml.safe_load((run / "settings" / "student-distilled.yaml").read_text())
    settings["output"] = str(run / name)
    unlabelled = settings["phases"][0]["sources"][0]
    unlabelled |= {"audio": str(run / "data" / part), "repeat": PARTS[part]}
    file = run / "settings" / f"{name}.yaml"
    file.write_text(yaml.safe_dump(settings, sort_keys=False))
    asr_kd("train", str(file))


def main() -> None:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    seeds = range(parser.parse_args().seeds)
    for seed in seeds:
        asr_kd("run", "pipelines/digits", f"seed={seed}", f"run={run_folder(seed)}")
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda pair: train_part(*pair), [(seed, part) for seed in seeds for part in PARTS]))
    parts: dict[str, list[float]] = {}
    for seed in seeds:
        run = run_folder(seed)
        names = {part: f"student-distilled-{part.removeprefix('unlabelled-')}" for part in PARTS}
        asr_kd("eval", "systems=" + json.dumps({part: str(run / name) for part, name in names.items()}), f"audio={run}/data/test",
               f"output={run}/report-parts")  # fmt: skip
        for part in PARTS:
            parts.setdefault(part, []).append(read_json(run / "report-parts" / "report.json")["systems"][part]["wer"])
    print_tables([read_json(run_folder(seed) / "report" / "report.json")["systems"] for seed in seeds], parts)


def print_tables(reports: list[dict], parts: dict[str, list[float]]) -> None:
    """Markdown, from each seed's `systems`."""
    mean = {name: statistics.mean(report[name]["wer"] for report in reports) for name in SYSTEMS}
    gap = mean["student-supervised"] - mean["teacher"]
    print(
        f"\n| system | WER %, mean of {len(reports)} seeds | each seed | change from supervised | gap recovered | parameters | real-time factor |"
    )
    print("|---|---|---|---|---|---|---|")
    for name in SYSTEMS:
        each = " / ".join(f"{100 * report[name]['wer']:.2f}" for report in reports)
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
            f"| {name} | {100 * mean[name]:.2f} | {each} | {change} | {share} | {reports[0][name]['parameters']:,} | {speed:.4f} |"
        )
    print("\n| unlabelled audio | minutes | distilled student, WER %, mean | each seed |\n|---|---|---|---|")
    rows = {**parts, "unlabelled": [report["student-distilled"]["wer"] for report in reports]}
    for part, values in rows.items():
        minutes = sum(shard.seconds for shard in read_index(run_folder(0) / "data" / part)) / 60
        print(
            f"| {part} | {minutes:.0f} | {100 * statistics.mean(values):.2f} | {' / '.join(f'{100 * value:.2f}' for value in values)} |"
        )
    print(
        "\n| stage of seed 0 | seconds | audio hours | audio hours a second | frames a second |\n|---|---|---|---|---|"
    )
    for stage, seconds, heard in stages(run_folder(0)):
        frames = heard / FeatureSettings().frame_ms * 1000
        print(
            f"| {stage} | {seconds:.0f} | {heard / 3600:.2f} | {heard / 3600 / seconds:.3f} | {frames / seconds:,.0f} |"
        )
    report = read_json(run_folder(0) / "soft-targets" / "report.json")
    print(
        f"\nsoft targets: {report['bytes_per_frame']:.2f} bytes a frame, {report['entries_per_frame']:.2f} units kept a frame"
    )


def stages(run: Path) -> Iterator[tuple[str, float, float]]:
    """(stage, seconds it took, seconds of audio that went through it), in the order of the pipeline."""
    settings = load_yaml("pipelines/digits/pipeline.yaml")
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
