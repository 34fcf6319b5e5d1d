"""What makes a training step faster, and where its time goes, on batches in memory.

    python tests/benchmarks/step.py runs/digits [--steps 30] [--paper-steps 2] [--profile] [--json]

For the networks of trainer.py. The ways take turns, three times; the best of each counts. `--profile` prints the operations that
take most of the time in place of the table.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from tables import print_rows
from torch.profiler import ProfilerActivity, profile
from trainer import learner_of, lessons_of, networks

from asr_kd.allocator import keep_freed_memory
from asr_kd.distillation.batch import Batch
from asr_kd.models.acoustic import pick_device
from asr_kd.training.step import Learner, step

#: name: precision, threads, whether torch.compile makes the network
WAYS = {
    "float32": ("float32", 1, False),
    "bfloat16": ("bfloat16", 1, False),
    "float32, compiled": ("float32", 1, True),
    "float32, 2 threads": ("float32", 2, False),
    "bfloat16, 2 threads": ("bfloat16", 2, False),
}


def speed(learner: Learner, held: list[Batch], threads: int) -> float:
    """Frames a second."""
    keep_freed_memory()  # as `train` does
    torch.set_num_threads(threads)
    lessons = lessons_of(learner.settings)
    start = time.perf_counter()
    for batch in held:
        step(learner, batch, lessons, 1e-4)
    return sum(batch.frames for batch in held) / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--paper-steps", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    table: list[dict[str, Any]] = []
    for name, settings, units, held in networks(arguments.run, arguments.steps, arguments.paper_steps):
        learners = {}
        for way, (precision, _, compiled) in WAYS.items():
            learner = learner_of(settings.model_copy(update={"precision": precision}), units, device)
            if compiled:
                learner.exchange.network = torch.compile(learner.pupil, dynamic=True)
            learners[way] = learner
        for way, learner in learners.items():
            speed(learner, held[:2], WAYS[way][1])  # the first time pays for what is set up once
        if arguments.profile:
            with profile(activities=[ProfilerActivity.CPU]) as seen:
                speed(learners["float32"], held, 1)
            print(name, seen.key_averages().table(sort_by="self_cpu_time_total", row_limit=12), sep="\n")
            continue
        best = dict.fromkeys(WAYS, 0.0)
        for _ in range(3):
            for way, learner in learners.items():
                best[way] = max(best[way], speed(learner, held, WAYS[way][1]))
        table += [
            {"model": name, "name": way, "frames_per_second": round(found), "ratio_to_float32": round(found / best["float32"], 2)}
            for way, found in best.items()
        ]  # fmt: skip
    if table:
        print_rows(table, arguments.json)


if __name__ == "__main__":
    main()
