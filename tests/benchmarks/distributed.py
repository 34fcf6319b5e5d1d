"""One student trained by one, two and four processes: bytes that they send, and WER after the same hours of audio.

    python tests/benchmarks/distributed.py runs/digits [--passes 6] [--processes 1 2 4] [--method bmuf] [--json]

Trains the digits' distilled student of a finished run of the pipeline from its start, by every method, in processes that torchrun starts
(one thread each), with the batches of the recipe in each process: N of them hear N batches a step and take an Nth of the steps. The
stream is read in four lanes (or as many as processes, where those are more), so that all hear the same audio. `bytes_sent` is what leaves all processes
together when the collectives run as rings; `wer` is of the best checkpoint, in per cent, on the test set; `development_loss`, CTC's a
frame, of the last. Nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from tables import print_rows

from asr_kd.config.load import build, load_yaml
from asr_kd.models.acoustic import load_checkpoint
from asr_kd.training.development import score_development
from asr_kd.training.settings import DistributedSettings, TrainSettings

LANES = 4
METHODS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "bmuf": {"method": "bmuf"},
    "gtc": {"compression": "threshold"},
    "powersgd": {"compression": "powersgd"},
}


def train(settings: TrainSettings, processes: int) -> None:
    """Train in a job of its own; what it says is shown only if it fails."""
    file = Path(settings.output).with_suffix(".yaml")
    file.write_text(yaml.safe_dump(settings.model_dump()))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [*launcher, "-m", "asr_kd.cli", "train", str(file)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        sys.exit(done.stderr)


def row(method: str, settings: TrainSettings, processes: int, test: str) -> dict[str, Any]:
    """Train, and sum the run up."""
    train(settings, processes)
    lines = [json.loads(line) for line in (Path(settings.output) / "metrics.jsonl").read_text().splitlines()]
    scored = score_development(
        settings.model_copy(update={"development": test, "calibrate_blank": False}), load_checkpoint(settings.output)
    )
    return {
        "method": method,
        "processes": processes,
        "steps": lines[-1]["step"],
        "audio_hours": max(line["audio_hours"] for line in lines),
        "bytes_sent": processes * max(line.get("bytes_sent", 0) for line in lines),
        "development_loss": round(lines[-1]["development_loss"], 5),
        "wer": round(100 * scored.wer, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--passes", type=int, default=6)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--method", action="append", choices=list(METHODS))
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    values = load_yaml(arguments.run / "settings" / "student-distilled.yaml")
    values.pop("distributed", None)  # each row has its own
    settings = build(TrainSettings, values, "settings")
    phases = [phase.model_copy(update={"passes": arguments.passes}) for phase in settings.phases]
    table = []
    with tempfile.TemporaryDirectory() as folder:
        for processes in arguments.processes:
            # alone, a process trains plainly, whatever the method
            for method in arguments.method or METHODS if processes > 1 else ["alone"]:
                run = settings.model_copy(update={
                    "output": str(Path(folder) / f"{method}-{processes}"), "phases": phases, "lanes": max(LANES, *arguments.processes),
                    "distributed": DistributedSettings.model_validate(METHODS.get(method, {})),
                    "evaluate_every": settings.evaluate_every // processes,
                })  # fmt: skip
                table.append(row(method, run, processes, str(arguments.run / "data" / "test")))
    print_rows(table, arguments.json)


if __name__ == "__main__":
    main()
