"""Whether the trainer's memory grows with the data: python tests/benchmarks/stream_memory.py [--utterances 100000] [--json]

A stream of short utterances is generated, 100 a shard, 20 a speaker, and a tiny network trained on it for one pass: soft targets,
their shards' priors, transcripts in a file, features computed from the sound. For each row a fresh process reads so many of the
utterances; its memory is the most that it ever had, `grown` what this is more than in the first row.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile
from generated import write_sets
from tables import print_rows

from asr_kd.audio.decode import decode
from asr_kd.audio.features import Frontend
from asr_kd.audio.settings import FeatureSettings
from asr_kd.shards.index import ShardInfo
from asr_kd.shards.manifest import write_transcripts
from asr_kd.shards.settings import UnitsSettings
from asr_kd.shards.tarset import Sample, write_index
from asr_kd.shards.texts import train_units
from asr_kd.targets.posteriors import SparsePosteriors
from asr_kd.training.settings import TrainSettings
from asr_kd.units import Units, load_units

FEATURES = FeatureSettings(sample_rate=8000, mels=16)
SHARD, SPEAKER, SOUNDS, TEXT = 100, 20, 64, "abba"


def sounds(units: Units) -> list[tuple[bytes, float, SparsePosteriors]]:
    """FLAC, seconds and soft targets of utterances of 0.3 to 0.7 s."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(SOUNDS):
        waveform = 0.1 * rng.standard_normal(rng.integers(2400, 5600))
        flac = io.BytesIO()
        soundfile.write(flac, waveform, FEATURES.sample_rate, format="FLAC")
        frames = len(Frontend(FEATURES).compute(decode(flac.getvalue(), "", None, 60.0)[0]))
        logits = rng.standard_normal((frames, units.size))
        log_probs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        target = SparsePosteriors.from_dense(log_probs.astype(np.float32), 3)
        made.append((flac.getvalue(), len(waveform) / FEATURES.sample_rate, target))
    return made


def shards(units: Units, utterances: int) -> Iterator[list[tuple[Sample, SparsePosteriors]]]:
    pool = sounds(units)
    for first in range(0, utterances, SHARD):
        pairs = []
        for number in range(first, min(first + SHARD, utterances)):
            flac, seconds, target = pool[number % SOUNDS]
            fields = {"seconds": seconds, "speaker": f"speaker-{number // SPEAKER:06d}", "text": TEXT}
            pairs.append((Sample(f"utterance-{number:08d}", flac, "flac", fields), target))
        yield pairs


def generate(folder: Path, utterances: int) -> list[ShardInfo]:
    (folder / "text.txt").write_text(TEXT)
    train_units(
        UnitsSettings(source=str(folder / "text.txt"), output=str(folder / "units"), kind="char", size=8),
    )
    units = load_units(str(folder / "units"))
    write_sets(folder / "development", shards(units, 20), FEATURES, units.hash, 3)
    return write_sets(folder, shards(units, utterances), FEATURES, units.hash, 3)


def part(folder: Path, infos: list[ShardInfo], utterances: int) -> Path:
    """The first of the utterances as a set of its own."""
    small = folder / f"first-{utterances}"
    small.mkdir()
    for info in infos[: utterances // SHARD]:
        (small / info.name).symlink_to(folder / "audio" / info.name)
    write_index(small, infos[: utterances // SHARD])
    write_transcripts(folder / f"{small.name}.jsonl", ((f"utterance-{n:08d}", TEXT) for n in range(utterances)))
    return small


def train(folder: Path, name: str) -> None:
    """One pass; prints the most memory that the process ever had."""
    from asr_kd.training.trainer import train

    source = {
        "audio": str(folder / name), "targets": str(folder / "targets"), "soft": 1.0, "ctc": 0.1,
        "transcripts": str(folder / f"{name}.jsonl"), "augment": {"time_masks": 1},
    }  # fmt: skip
    train(TrainSettings.model_validate({
        "output": str(folder / f"run-{name}"), "units": str(folder / "units"),
        "development": str(folder / "development" / "audio"), "phases": [{"sources": [source], "passes": 1}],
        "features": FEATURES.model_dump(), "model": {"layers": 1, "size": 16}, "missing_mass": "prior",
        "batch_frames": 500, "evaluate_every": 100, "device": "cpu",
    }))  # fmt: skip
    print(json.dumps({"megabytes": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)}))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--utterances", type=int, default=100_000)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--train", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        train(Path(arguments.train[0]), arguments.train[1])
        return
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        infos = generate(folder, arguments.utterances)
        for utterances in (arguments.utterances // 100, arguments.utterances // 10, arguments.utterances):
            small = part(folder, infos, utterances)
            command = [sys.executable, __file__, "--train", str(folder), small.name]
            said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1]
            megabytes = json.loads(said)["megabytes"]
            read = infos[: utterances // SHARD]
            rows.append({
                "utterances": utterances, "speakers": utterances // SPEAKER, "shards": len(read),
                "audio_hours": round(sum(info.seconds for info in read) / 3600, 1),
                "megabytes": megabytes, "grown": megabytes - rows[0]["megabytes"] if rows else 0,
            })  # fmt: skip
    print_rows(rows, arguments.json)


if __name__ == "__main__":
    main()
