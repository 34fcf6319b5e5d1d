"""What it wins to keep freed memory (`asr_kd/allocator.py`): the label command and training steps, by turns with and without.

    python tests/benchmarks/allocator.py runs/digits [--turns 5] [--steps 100] [--paper-steps 3] [--json]

For the teacher and the unlabelled audio of a finished run of the pipeline, and the networks of trainer.py. Every turn is a process of
its own: what the C library was told it cannot be told to forget. Medians of the turns, the ratio that of the ratios within a turn;
`faults`: pages that the kernel had to hand out, cleared, in millions; `peak_megabytes`: what the process took at its height.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import step
import torch
from children import usage_of
from label_throughput import copied
from tables import print_rows
from trainer import learner_of, networks

KEEPS = {"kept": True, "given back": False}
#: as the command, with an allocator that is left as it is
GIVES_BACK = (
    "from asr_kd import allocator, cli; allocator.keep_freed_memory = lambda: None; raise SystemExit(cli.main())"
)


def label(run: Path, audio: Path, keeps: bool) -> dict[str, float]:
    """The label job of a finished run."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "targets"
        program = ["-m", "asr_kd.cli"] if keeps else ["-c", GIVES_BACK]
        settings = [f"teacher={run / 'teacher'}", f"audio={audio}", f"output={output}", "device=cpu"]
        used = usage_of([sys.executable, *program, "label", *settings])
        took = json.loads((output / "timing.json").read_text())
        return figures(took["frames_per_second"], used)


def figures(frames_per_second: float, used: resource.struct_rusage) -> dict[str, float]:
    return {
        "frames_per_second": frames_per_second,
        "faults": used.ru_minflt / 1e6,
        "peak_megabytes": used.ru_maxrss / 1024,
    }


def train(run: Path, steps: int, paper_steps: int, keeps: bool) -> dict[str, dict[str, float]]:
    """Training steps of both networks, by their names."""
    command = [sys.executable, __file__, str(run), "--steps", str(steps), "--paper-steps", str(paper_steps), "--train"]
    done = subprocess.run([*command, *["--keep"] * keeps], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def trained(run: str, steps: int, paper_steps: int) -> dict[str, dict[str, float]]:
    """The same, in this process."""
    found = {}
    for name, settings, units, held in networks(run, steps, paper_steps):
        learner = learner_of(settings, units, torch.device("cpu"))
        step.speed(learner, held[:2], 1)  # the first time pays for what is set up once
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        frames_per_second = step.speed(learner, held, 1)
        used = resource.getrusage(resource.RUSAGE_SELF)
        found[name] = figures(frames_per_second, used) | {"faults": (used.ru_minflt - before) / 1e6}
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--copies", type=int, default=4, help="of the unlabelled audio")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--paper-steps", type=int, default=3)
    parser.add_argument("--train", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--keep", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.train:
        if not arguments.keep:
            step.keep_freed_memory = lambda: None
        print(json.dumps(trained(arguments.run, arguments.steps, arguments.paper_steps)))
        return
    run, turns = Path(arguments.run), list[dict[str, dict[str, Any]]]()
    with tempfile.TemporaryDirectory() as folder:
        audio = copied(run / "data" / "unlabelled", arguments.copies, Path(folder) / "audio")
        for _ in range(arguments.turns):
            turns.append({
                way: {"label": label(run, audio, keeps), **train(run, arguments.steps, arguments.paper_steps, keeps)}
                for way, keeps in KEEPS.items()
            })  # fmt: skip
    rows: list[dict[str, Any]] = []
    for job in turns[0]["kept"]:
        ratios = [
            turn["kept"][job]["frames_per_second"] / turn["given back"][job]["frames_per_second"] for turn in turns
        ]
        for way in KEEPS:
            middle = {key: statistics.median(turn[way][job][key] for turn in turns) for key in turns[0][way][job]}
            rows.append({
                "job": job, "freed memory": way, "frames_per_second": round(middle["frames_per_second"]),
                "kept / given back": round(statistics.median(ratios), 3) if way == "kept" else None,
                "faults": round(middle["faults"], 3), "peak_megabytes": round(middle["peak_megabytes"]),
            })  # fmt: skip
    print_rows(rows, arguments.json)


if __name__ == "__main__":
    main()
