"""Students of one size and different families, distilled by the same teacher: what they get wrong, and what they cost.

    python pipelines/shapes/measure.py --seeds 6

Runs what is missing and prints the tables; what was trained is kept in runs/taxonomy, whose data, teachers and targets are used where they
are there, and the same command goes on after an interruption. README.md beside this file says what the columns mean.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

sys.path.append(str(Path(__file__).parents[1] / "taxonomy"))
sys.path.append(str(Path(__file__).parent))
from arms import Arm, stages_of, with_own_start
from streaming import streaming
from tables import each, paired, verdict

from asr_kd.config.load import build, load_yaml
from asr_kd.errors import UserError
from asr_kd.files import read_json
from asr_kd.models.acoustic import load_checkpoint
from asr_kd.models.settings import STREAMING, ModelSettings
from asr_kd.training.speed import made_up_batch, step_speed

HERE = Path(__file__).parent
TASK = "strong"
#: the student of the task that learns soft targets; each shape takes its place, and its start's
STUDENT = Arm("soft")
#: utterances, and frames of each, in the batch on which the training is timed
TIMED = (9, 105)


def read_shapes(file: Path = HERE / "shapes.yaml") -> dict[str, ModelSettings]:
    """The networks of the table by name; a UserError for settings that do not fit each other, or a network that does not stream."""
    shapes = {name: build(ModelSettings, settings, f"{file}: {name}") for name, settings in load_yaml(file).items()}
    for name, shape in shapes.items():
        if shape.kind not in STREAMING:
            raise UserError(
                f"{file}: {name}: {shape.kind} does not stream, and speed is that of a stream; take {', '.join(STREAMING)}"
            )
    return shapes


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Attributes:
        root: folder of all tasks.
        shapes: networks by name; the others are compared with the first.
        rates: learning rates that each is trained with.
        variables: in place of those of the task's file.
    """

    root: Path
    shapes: Mapping[str, ModelSettings]
    rates: tuple[float, ...]
    seeds: range
    variables: Mapping[str, Any]

    def run(self, seed: int) -> Path:
        """Folder of a seed."""
        return self.root / TASK / f"seed{seed}"

    def development(self, shape: str, rate: float) -> tuple[float, float]:
        """Development WER and CTC loss, means of the seeds."""
        folders = [self.run(seed) / student(shape, rate) for seed in self.seeds]
        said = [read_json(folder / "best" / "checkpoint.json")["training"] for folder in folders]
        wer, loss = (statistics.mean(one[f"development_{name}"] for one in said) for name in ("wer", "loss"))
        return wer, loss

    def rate(self, shape: str) -> float:
        """The learning rate with the lowest development WER over the seeds; then the lowest loss."""
        return min(self.rates, key=lambda rate: self.development(shape, rate))

    def stages(self, seed: int, report: bool = False) -> dict[str, Any]:
        """The task's own stages of a seed, and a start and a student of each shape and learning rate; or with it the report of the chosen ones."""
        lead, run = f"{TASK}-{seed}-", "${run}/" + f"{TASK}/seed{seed}"
        found = stages_of(TASK, seed, [(STUDENT, None)], self.variables)
        like = found.pop(lead + STUDENT.stage(None))["settings"]
        for shape, model in self.shapes.items():
            for rate in self.rates:
                settings = {
                    **copy.deepcopy(like),
                    "model": model.model_dump(),
                    "output": f"{run}/{student(shape, rate)}",
                }
                settings["phases"][0]["learning_rate"] = rate
                found |= with_own_start(found, lead, f"{student(shape, rate)}-start", settings)
        if report:
            systems = {shape: f"{run}/{student(shape, self.rate(shape))}" for shape in self.shapes}
            settings = {
                "systems": {"teacher": f"{run}/teacher", **systems}, "audio": "${run}/" + f"{TASK}/data/test",
                "output": f"{run}/shapes", "teacher": "teacher", "bootstrap": 0, "threads": 1,
            }  # fmt: skip
            found[lead + "shapes"] = {"verb": "eval", "settings": settings}
        return found

    def do(self, jobs: int, report: bool = False) -> None:
        """Run what is missing of all seeds; SystemExit where a stage fails."""
        stages: dict[str, Any] = {}
        for seed in self.seeds:
            stages |= self.stages(seed, report)
        self.root.mkdir(parents=True, exist_ok=True)
        file, variables = self.root / "shapes.yaml", {"run": str(self.root), "jobs": jobs}
        file.write_text(yaml.safe_dump({"variables": variables, "stages": stages}, sort_keys=False), encoding="utf-8")
        done = subprocess.run([sys.executable, "-m", "asr_kd.cli", "run", str(file)], check=False)
        if done.returncode:
            raise SystemExit(done.returncode)


def student(shape: str, rate: float) -> str:
    """Name of a training, and of its folder."""
    return f"shape-{shape}-{rate:g}"


def print_tables(asked: Comparison) -> None:
    """What was tried on development audio, and a row for each shape: from the seeds' reports, and from its speed, measured now."""
    reports = [read_json(asked.run(seed) / "shapes" / "report.json")["systems"] for seed in asked.seeds]
    wers = {name: [report[name]["wer"] for report in reports] for name in ("teacher", *asked.shapes)}
    first = next(iter(asked.shapes))
    print(f"\n| shape | development WER % of each learning rate, mean of {len(reports)} | chosen |\n|---|---|---|")
    for shape in asked.shapes:
        tried = ", ".join(f"{rate:g}: {100 * asked.development(shape, rate)[0]:.2f}" for rate in asked.rates)
        print(f"| {shape} | {tried} | {asked.rate(shape):g} |")
    print(
        f"\n| shape | parameters | test WER %, mean of {len(reports)} | each seed | against {first}, points | which shows | "
        "look-ahead, ms: most / mean | real-time factor: batches / stream | training, audio hours an hour |\n|---|---|---|---|---|---|---|---|---|"
    )
    torch.set_num_threads(1)
    for name, own in wers.items():
        told, points, shown = reports[0][name], "–", "–"
        factor = statistics.median(report[name]["real_time_factor"] for report in reports)
        ahead, factors, speed = "all / all", f"{factor:.5f} / –", "–"
        if name in asked.shapes:
            features = load_checkpoint(asked.run(asked.seeds[0]) / student(name, asked.rate(name))).features
            model, batch = asked.shapes[name], made_up_batch(features, told["units"], *TIMED)
            streamed, wait = streaming(model, features, told["units"])
            ahead, factors = f"{told['lookahead_ms']} / {wait:.0f}", f"{factor:.5f} / {streamed:.5f}"
            frames = step_speed(model, features, told["units"], torch.device("cpu"), batch)
            speed = f"{frames * features.frame_ms / 1000:,.0f}"
        if name not in ("teacher", first):
            mean, half = paired(own, wers[first])
            points = f"{100 * mean:+.2f}" + (f" ± {100 * half:.2f}" if half is not None else "")
            shown = verdict(mean, half, statistics.mean(wers[first]))
        cells = [name, f"{told['parameters']:,}", f"{100 * statistics.mean(own):.2f}", each(own), points, shown]
        print("| " + " | ".join([*cells, ahead, factors, speed]) + " |", flush=True)


def main() -> None:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", help="of shapes.yaml; all without it. The first one there comes along")
    parser.add_argument("--rates", nargs="+", type=float, default=[0.001, 0.003], help="learning rates to choose from")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--passes", type=int, help="in place of the task's: for a quick look, with another --output")
    parser.add_argument("--jobs", type=int, default=2, help="trainings side by side, one thread each")
    parser.add_argument("--output", default="runs/taxonomy")
    given = parser.parse_args()
    try:
        shapes = read_shapes()
        if unknown := set(given.shapes or ()) - set(shapes):
            parser.error(f"--shapes: {min(unknown)} is not in shapes.yaml; it has {', '.join(shapes)}")
        wanted = {next(iter(shapes)), *(given.shapes or shapes)}
        kept = {name: model for name, model in shapes.items() if name in wanted}
        variables = {} if given.passes is None else {"passes": given.passes}
        asked = Comparison(Path(given.output), kept, tuple(given.rates), range(given.seeds), variables)
        asked.do(given.jobs)
        asked.do(1, report=True)  # one at a time: speed is measured
        print_tables(asked)
    except UserError as error:
        print(f"measure: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
