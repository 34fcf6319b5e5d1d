"""The label job against its teacher alone: python tests/benchmarks/label_throughput.py AUDIO TEACHER [--json]

AUDIO is a folder of audio shards, TEACHER a checkpoint. The bare forward pass runs over features that are in memory already,
in the batches of the job, as long as the job takes. Both take turns, `--passes` times; the medians count, of the speeds and of the ratios
within a turn. Only ratios are worth comparing.
The job labels `--copies` of the set: while the first shard is decoded and the last one encoded nothing overlaps, and in a
job that runs for days that is nothing, in one of a few shards it is some per cent. `peak_megabytes` is what its process took at its
height, the libraries included.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from children import usage_of
from tables import print_rows

from asr_kd.allocator import keep_freed_memory
from asr_kd.labeling.load import Loaded
from asr_kd.labeling.settings import LabelSettings
from asr_kd.labeling.shard import load_shard
from asr_kd.models.acoustic import Checkpoint, build_model, infer_batches, load_checkpoint, pick_device, save_checkpoint
from asr_kd.models.settings import ModelSettings
from asr_kd.shards.tarset import read_index, write_index

SET = ("teacher", "audio", "device", "threads", "batch_frames", "loader_workers")


def forward(teacher: Checkpoint, shards: list[Loaded], batch_frames: int) -> float:
    """Seconds of the teacher's forward passes alone."""
    start = time.perf_counter()
    for loaded in shards:
        for _ in infer_batches(teacher, loaded.features, batch_frames):
            pass
    return time.perf_counter() - start


def job(settings: LabelSettings) -> tuple[float, float]:
    """Seconds of the whole job, run as a user runs it, as it says itself, and megabytes at its height."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "targets"
        words = [f"{name}={getattr(settings, name)}" for name in SET]
        command = [sys.executable, "-m", "asr_kd.cli", "label", *words, f"output={output}"]
        took = usage_of(command)
        return float(json.loads((output / "timing.json").read_text())["seconds"]), took.ru_maxrss / 1024


def fresh(teacher: str, shape: str, folder: Path) -> str:
    """A bidirectional LSTM of this shape with drawn weights, and the units and features of the teacher."""
    own = load_checkpoint(teacher)
    layers, size = map(int, shape.split("x"))
    settings = ModelSettings(kind="blstm", layers=layers, size=size)
    torch.manual_seed(0)
    save_checkpoint(
        folder, build_model(settings, own.features.dimension, own.units.size), own.units, own.features, settings
    )
    return str(folder)


def copied(audio: Path, copies: int, folder: Path) -> Path:
    """The set so many times over, under other names."""
    folder.mkdir()
    infos = []
    for copy in range(copies):
        for info in read_index(audio):
            name = f"{Path(info.name).stem}-{copy}.tar"
            (folder / name).symlink_to((audio / info.name).resolve())
            infos.append(dataclasses.replace(info, name=name))
    write_index(folder, infos)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("audio")
    parser.add_argument("teacher")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-frames", type=int, default=4000)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--loader-workers", type=int, default=0)
    parser.add_argument("--copies", type=int, default=4)
    parser.add_argument("--blstm", metavar="LAYERSxSIZE", help="time a network of this shape in place of the teacher's")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    keep_freed_memory()  # as the job does
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.blstm:
            arguments.teacher = fresh(arguments.teacher, arguments.blstm, Path(folder) / "teacher")
        measure(arguments)


def measure(arguments: argparse.Namespace) -> None:
    """Time, and print the rows."""
    settings = LabelSettings(
        teacher=arguments.teacher, audio=arguments.audio, output="-", device=arguments.device, threads=arguments.threads,
        batch_frames=arguments.batch_frames, loader_workers=arguments.loader_workers,
    )  # fmt: skip
    teacher = load_checkpoint(arguments.teacher, pick_device(arguments.device))
    ready = settings.model_copy(update={"features_on": "loader"})
    shards = [load_shard(ready, teacher, None, info) for info in read_index(arguments.audio)]
    frames = sum(len(item) for loaded in shards for item in loaded.features)
    forward(teacher, shards[:1], arguments.batch_frames)  # the first time pays for what is set up once
    bare, whole, peaks = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        several = copied(Path(arguments.audio), arguments.copies, Path(folder) / "audio")
        for _ in range(arguments.passes):
            bare.append(forward(teacher, shards * arguments.copies, arguments.batch_frames) / arguments.copies)
            seconds, peak = job(settings.model_copy(update={"audio": str(several)}))
            whole.append(seconds / arguments.copies)
            peaks.append(peak)
    ratio = statistics.median(one / other for one, other in zip(bare, whole, strict=True))
    rows: list[dict[str, Any]] = [
        {
            "name": "bare forward",
            "frames_per_second": round(frames / statistics.median(bare)),
            "ratio_to_bare_forward": 1.0,
            "peak_megabytes": None,
        },
        {
            "name": "label job",
            "frames_per_second": round(frames / statistics.median(whole)),
            "ratio_to_bare_forward": round(ratio, 3),
            "peak_megabytes": round(max(peaks)),
        },
    ]
    print_rows(rows, arguments.json)


if __name__ == "__main__":
    main()
