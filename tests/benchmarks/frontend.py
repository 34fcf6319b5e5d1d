"""Utterances a second and core from FLAC to a network's input: python tests/benchmarks/frontend.py [--utterances 400] [--turns 9] [--json]

The embedded digits in strings of 3.5 s at 16 kHz, 200 a shard, on the local disk, read and checked as every job does, in one process and one
thread. What comes of them takes turns:

- `sound`: decoded, and that is all;
- `left to the device`: decoded and kept for a network's device, which is what a loader does where that makes the features;
- `features, numpy`: decoded, and features by the loader;
- `features, torch`: left to the device, which is this CPU, and made there in batches of `--batch-frames` frames.

A second is one of the processor. `ratio_to_sound` is the median of the ratios within a turn, then the lowest and the highest.
`rounded_otherwise` is the share of torch's values that are not numpy's, and `largest_difference` by how much the worst is off.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from tables import print_rows

from asr_kd.audio.batched import Sounds
from asr_kd.audio.decode import decode
from asr_kd.audio.settings import FeatureSettings
from asr_kd.shards.stream import Item, ShardInput, batches_by_length, load_features
from asr_kd.shards.tarset import Sample, read_checked, read_index, read_shard, write_index, write_shard

DIGITS = Path(__file__).parents[2] / "data_manifests" / "digits"
RATE, SECONDS, SHARD, RECORDINGS = 16000, 3.5, 200, 12
KINDS = {"own": FeatureSettings(), "kaldi": FeatureSettings(kind="kaldi", stack=4)}


def write_audio(folder: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    recordings = [sample for info in read_index(DIGITS) for sample in read_shard(DIGITS / info.name)]
    sounds = [decode(sample.audio, sample.key, RATE, 60.0)[0] for sample in recordings[::10]]
    samples = []
    for number in range(count):
        waveform = np.concatenate([sounds[place] for place in rng.integers(len(sounds), size=RECORDINGS)])
        flac = io.BytesIO()
        soundfile.write(flac, waveform[: round(SECONDS * RATE)], RATE, format="FLAC", subtype="PCM_16")
        samples.append(Sample(f"u{number:06d}", flac.getvalue(), "flac", {"seconds": SECONDS}))
    parts = [samples[start : start + SHARD] for start in range(0, count, SHARD)]
    write_index(folder, [write_shard(folder / f"shard-{at:06d}.tar", part) for at, part in enumerate(parts)])


def sound(folder: Path) -> None:
    for info in read_index(folder):
        for sample in read_checked(folder, info):
            decode(sample.audio, sample.key, RATE, 60.0)


def loaded(folder: Path, like: FeatureSettings, deferred: bool) -> list[Item]:
    wanted = ShardInput(folder=str(folder), features=like, max_seconds=60.0, deferred=deferred)
    return [item for info in read_index(folder) for item in load_features(wanted, info).items]


def made(folder: Path, like: FeatureSettings, batch_frames: int) -> list[np.ndarray]:
    """Features float32 [frames, dimension] of every utterance, in the order of the shards."""
    waiting = [item.features for item in loaded(folder, like, True)]
    found: dict[int, np.ndarray] = {}
    for batch in batches_by_length(list(map(len, waiting)), batch_frames):
        rows = Sounds.of([waiting[at] for at in batch]).features(like, torch.device("cpu")).numpy()
        found |= {at: row[: len(waiting[at])] for at, row in zip(batch, rows, strict=True)}
    return [found[at] for at in range(len(waiting))]


def taken(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--utterances", type=int, default=400)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--batch-frames", type=int, default=2000)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_audio(folder, arguments.utterances)
        works: dict[str, Callable[[], Any]] = {"sound": lambda: sound(folder)}
        differences: dict[str, np.ndarray] = {}
        for kind, like in KINDS.items():
            works |= {
                f"left to the device, {kind}": lambda like=like: loaded(folder, like, True),
                f"features, numpy, {kind}": lambda like=like: loaded(folder, like, False),
                f"features, torch, {kind}": lambda like=like: made(folder, like, arguments.batch_frames),
            }
            own = np.concatenate([item.features for item in loaded(folder, like, False)])
            differences[kind] = np.abs(np.concatenate(made(folder, like, arguments.batch_frames)) - own)
        turns = [{name: taken(work) for name, work in works.items()} for _ in range(arguments.turns)]
    table: list[dict[str, Any]] = []
    for name in works:
        ratios = [turn["sound"] / turn[name] for turn in turns]
        off = differences[name.rpartition(" ")[2]] if "torch" in name else None
        table.append({
            "name": name,
            "utterances_per_second": round(arguments.utterances / statistics.median(turn[name] for turn in turns)),
            "ratio_to_sound": round(statistics.median(ratios), 2),
            "lowest": round(min(ratios), 2),
            "highest": round(max(ratios), 2),
            "rounded_otherwise": None if off is None else f"{(off > 0).mean():.2%}",
            "largest_difference": None if off is None else round(float(off.max()), 4),
        })  # fmt: skip
    print_rows(table, arguments.json)


if __name__ == "__main__":
    main()
