"""Frames a second of a student's training: the bare step, and the step fed by the stream.

    python tests/benchmarks/trainer.py runs/digits [--steps 150] [--device cuda] [--json]

For the digits' student of a finished run of the pipeline, and for a network of the paper's size (5×768 LSTM, 3,183 units) on
the same audio with drawn soft targets. `bare step`: batches that are in memory already; `trainer`: the same batches as
the stream makes them, from cached features, in a process (loader_workers=1) or a thread; `trainer, decoding`: features computed
from the audio as well. They take turns.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tables import print_rows

from asr_kd.allocator import keep_freed_memory
from asr_kd.config.load import build, load_yaml
from asr_kd.distillation.batch import Batch
from asr_kd.distillation.knowledge import Lesson, Pupil, Task, lesson_of
from asr_kd.models.acoustic import build_model, pick_device
from asr_kd.models.settings import ModelSettings
from asr_kd.shards.stream import ShardInput, load_features
from asr_kd.shards.tarset import read_index
from asr_kd.targets.posteriors import SparsePosteriors
from asr_kd.targets.store import Statistics, read_metadata, write_target_shard
from asr_kd.training.batches import PhaseStream
from asr_kd.training.distributed.exchange import Exchange
from asr_kd.training.distributed.ranks import Ranks
from asr_kd.training.feed import ready_batches
from asr_kd.training.settings import TrainSettings
from asr_kd.training.step import Learner, make_optimizer, step
from asr_kd.units import Units, load_units

PAPER = ModelSettings(layers=5, size=768)
PAPER_UNITS = 3183


class ManyUnits(Units):
    """Units of which only the number and the hash are looked at."""

    hash = "0123456789abcdef"
    size = PAPER_UNITS


def drawn_targets(settings: TrainSettings, folder: Path, shards: int) -> None:
    """Soft targets over the paper's number of units for the first shards, with 20 kept of a frame."""
    source = settings.phases[0].sources[0]
    rng = np.random.default_rng(0)
    folder.mkdir()
    for info in read_index(source.audio)[:shards]:
        wanted = ShardInput(
            folder=source.audio, features=settings.features, max_seconds=60.0, cache=settings.feature_cache
        )
        pairs = []
        for item in load_features(wanted, info).items:
            logits = torch.from_numpy(3 * rng.standard_normal((len(item.features), PAPER_UNITS), np.float32))
            pairs.append((item.key, SparsePosteriors.from_dense(logits.log_softmax(1), 20)))
        frames = sum(target.frames for _, target in pairs)
        old = read_metadata(Path(str(source.targets)) / info.name)
        values = old.statistics.model_dump() | {"utterances": len(pairs), "frames": frames}
        metadata = old.model_copy(update={
            "units_hash": ManyUnits.hash, "num_units": PAPER_UNITS, "tail_prior": None, "quarantined": {}, "members": None,
            "statistics": Statistics(**values),
        })  # fmt: skip
        write_target_shard(folder / info.name, metadata, pairs)


def batches(settings: TrainSettings, units: Units) -> Iterator[Batch]:
    stream = PhaseStream(settings, 0, units)
    return (batch for batch in stream.batches(stream.start(), 0) if batch is not None)


def timed(learner: Learner, fed: Iterable[Batch]) -> float:
    """Frames a second."""
    fed, lessons = iter(fed), lessons_of(learner.settings)
    first = next(fed)  # what is set up once a phase stays out of it
    frames, start = 0, time.perf_counter()
    for batch in itertools.chain([first], fed):
        step(learner, batch, lessons, 1e-4)
        frames += batch.frames
    return frames / (time.perf_counter() - start)


def networks(run: str, steps: int, paper_steps: int) -> Iterator[tuple[str, TrainSettings, Units, list[Batch]]]:
    """Each network's name, settings, units and its first batches, while a cache of all features is there."""
    settings = build(TrainSettings, load_yaml(Path(run) / "settings" / "student-distilled.yaml"), "settings")
    source = settings.phases[0].sources[0]
    one = settings.phases[0].model_copy(update={"sources": [source]})
    with tempfile.TemporaryDirectory() as folder:
        digits = settings.model_copy(update={"feature_cache": str(Path(folder) / "features"), "phases": [one]})
        units = load_units(settings.units)
        yield "digits student, 2×96", digits, units, list(itertools.islice(batches(digits, units), steps))
        drawn_targets(digits, Path(folder) / "targets", len(read_index(source.audio)))
        framewise = source.model_copy(update={"targets": str(Path(folder) / "targets"), "sequences": None})
        paper = one.model_copy(update={"sources": [framewise]})
        large = digits.model_copy(update={"phases": [paper], "model": PAPER, "missing_mass": "ghost"})
        units = ManyUnits.__new__(ManyUnits)
        yield "the paper's size, 5×768", large, units, list(itertools.islice(batches(large, units), paper_steps))


def learner_of(settings: TrainSettings, units: Units, device: torch.device) -> Learner:
    """A learner with drawn weights."""
    network = build_model(settings.model, settings.features.dimension, units.size).to(device)
    pupil = Pupil(network)
    ranks = Ranks(device=device)
    return Learner(settings, pupil, make_optimizer(pupil, settings), Exchange(pupil, ranks))


def lessons_of(settings: TrainSettings) -> list[Lesson]:
    """What is learned of the sources of the first phase."""
    task = Task(None, settings.features, settings.model, settings.missing_mass)
    return [lesson_of(source, task) for source in settings.phases[0].sources]


def rows(
    name: str, settings: TrainSettings, units: Units, held: list[Batch], device: torch.device
) -> list[dict[str, Any]]:
    """The four speeds of one network; the median of three turns of each."""
    learner = learner_of(settings, units, device)
    beside = settings.model_copy(update={"loader_workers": 1})
    plain = beside.model_copy(update={"feature_cache": None})

    def fed(settings: TrainSettings) -> Iterator[Batch]:
        stream = PhaseStream(settings, 0, units)
        with closing(ready_batches(stream, stream.start(), 0)) as ready:
            yield from (batch for batch in itertools.islice(ready, len(held)) if batch)

    timed(learner, held[:5])
    ways = {"trainer, in a thread": settings, "trainer": beside, "trainer, decoding": plain}
    speeds: dict[str, list[float]] = {name: [] for name in ("bare step", *ways)}
    for _ in range(3):
        speeds["bare step"].append(timed(learner, held))
        for kind, way in ways.items():
            speeds[kind].append(timed(learner, fed(way)))
    middle = {kind: sorted(values)[1] for kind, values in speeds.items()}
    return [
        {"model": name, "name": kind, "frames_per_second": round(speed), "ratio_to_bare_step": round(speed / middle["bare step"], 3)}
        for kind, speed in middle.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--paper-steps", type=int, default=6)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    keep_freed_memory()  # as `train` does
    torch.set_num_threads(1)
    device = pick_device(arguments.device)
    table: list[dict[str, Any]] = []
    for network in networks(arguments.run, arguments.steps, arguments.paper_steps):
        table += rows(*network, device)
    print_rows(table, arguments.json)


if __name__ == "__main__":
    main()
