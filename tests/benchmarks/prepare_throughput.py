"""The prepare job against decoding alone: python tests/benchmarks/prepare_throughput.py [--workers 1 2] [--detectors energy silero] [--sample-rate 8000] [--json]

A manifest of `--files` made-up FLAC files of 16 kHz is prepared with each number of workers; and one of `--recordings` of `--minutes` each, utterances of the
embedded digits with pauses between them, is cut at the pauses that each of the detectors finds. Decoding alone is what the job does to a file before it
keeps it: read it, decode it (a recording block by block, once), convert it to `--sample-rate`; in one process. All take turns, `--passes` times; the
medians count, of the speeds and of the ratios within a turn. A ratio is to decoding alone in as many processes as there are workers, if cores do not
share anything; that of CPU seconds, of all processes of the job, says the same of a machine that others use too. Audio hours of recordings are with
their pauses.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile
from segments import compose
from tables import print_rows

from asr_kd.audio.decode import native_blocks, read_audio
from asr_kd.audio.recording import BLOCK
from asr_kd.audio.waveform import streamed
from asr_kd.shards.prepare import prepare
from asr_kd.shards.settings import PrepareSettings

RATE = 16000
DIGITS = Path(__file__).parents[2] / "data_manifests" / "digits"


def write_files(folder: Path, files: int) -> float:
    """Files of noise that comes and goes, of 2 to 15 s, and a manifest; returns their seconds in all."""
    rng, total = np.random.default_rng(0), 0.0
    with open(folder / "list.jsonl", "w") as manifest:
        for number in range(files):
            seconds = rng.uniform(2, 15)
            loud = np.interp(np.arange(int(seconds * RATE)) / RATE, np.arange(17), rng.uniform(0, 0.1, 17))
            soundfile.write(folder / f"u{number}.flac", loud * rng.normal(0, 1, len(loud)).clip(-3, 3), RATE)
            manifest.write(json.dumps({"audio": f"u{number}.flac", "text": "what was said"}) + "\n")
            total += seconds
    return total


def write_recordings(folder: Path, recordings: int, minutes: float) -> float:
    """The same recording under several names, and a manifest; returns their seconds in all."""
    compose(DIGITS, minutes / 60, (3, 7), 20.0, folder / "r0.flac")
    for number in range(1, recordings):
        os.link(folder / "r0.flac", folder / f"r{number}.flac")
    lines = (json.dumps({"audio": f"r{number}.flac"}) + "\n" for number in range(recordings))
    (folder / "list.jsonl").write_text("".join(lines))
    return recordings * float(soundfile.info(folder / "r0.flac").duration)


def decode_files(paths: Iterable[Path], sample_rate: int | None) -> None:
    for path in paths:
        read_audio(path.read_bytes(), path.name, sample_rate, 60.0)


def decode_recordings(paths: Iterable[Path], sample_rate: int | None) -> None:
    for path in paths:
        blocks = native_blocks(path, path.name, BLOCK)
        for _ in streamed(blocks, sample_rate, path.name) if sample_rate else blocks:
            pass


def job(folder: Path, **settings: Any) -> None:
    """The whole job, the checks of the manifest and the start of its processes among it."""
    with tempfile.TemporaryDirectory() as output, contextlib.redirect_stdout(io.StringIO()):
        values = {"manifest": str(folder / "list.jsonl"), "output": f"{output}/shards", **settings}
        prepare(PrepareSettings.model_validate(values))


class Took(NamedTuple):
    """Seconds of work: on the clock, and of the CPU in this process and those that it started and that have ended."""

    wall: float
    cpu: float


def took(work: Callable[[], None]) -> Took:
    began, before = time.perf_counter(), sum(os.times()[:4])
    work()
    return Took(time.perf_counter() - began, sum(os.times()[:4]) - before)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--files", type=int, default=4000)
    parser.add_argument("--recordings", type=int, default=4)
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--detectors", nargs="*", default=["energy", "silero"])
    parser.add_argument("--sample-rate", type=int)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rate = arguments.sample_rate
    with tempfile.TemporaryDirectory() as name:
        files, recordings = Path(name) / "files", Path(name) / "recordings"
        for folder in (files, recordings):
            folder.mkdir()
        audio = {
            files: write_files(files, arguments.files),
            recordings: write_recordings(recordings, arguments.recordings, arguments.minutes),
        }
        # of each: the audio, how many processes, and the work; decoding alone comes first of each audio
        work: dict[str, tuple[Path, int, Callable[[], None]]] = {}
        work["decoding alone"] = files, 1, functools.partial(decode_files, sorted(files.glob("*.flac")), rate)
        for workers in arguments.workers:
            made = functools.partial(job, files, sample_rate=rate, workers=workers, samples_per_shard=100)
            work[f"prepare, workers={workers}"] = files, workers, made
        some = sorted(recordings.glob("*.flac"))
        work["recordings, decoding alone"] = recordings, 1, functools.partial(decode_recordings, some, rate)
        for detector in arguments.detectors:
            for workers in arguments.workers:
                segment = {"detector": detector, "recordings_per_shard": 1}
                made = functools.partial(job, recordings, sample_rate=rate, workers=workers, segment=segment)
                work[f"prepare segment, {detector}, workers={workers}"] = recordings, workers, made
        turns = [{name: took(do) for name, (_, _, do) in work.items()} for _ in range(arguments.passes)]
    rows: list[dict[str, Any]] = []
    for name, (folder, workers, _) in work.items():
        alone = next(one for one, (same, _, _) in work.items() if same == folder)
        median = statistics.median(turn[name].wall for turn in turns)
        ratio = statistics.median(turn[alone].wall / (workers * turn[name].wall) for turn in turns)
        of_cpu = statistics.median(turn[alone].cpu / turn[name].cpu for turn in turns)
        rows.append(
            {
                "name": name,
                "files_per_second": round(arguments.files / median) if folder == files else None,
                "audio_hours_per_hour": round(audio[folder] / median),
                "ratio_to_decoding": round(ratio, 3),
                "ratio_of_cpu": round(of_cpu, 3),
            }
        )
    print_rows(rows, arguments.json)


if __name__ == "__main__":
    main()
