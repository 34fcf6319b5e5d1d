"""Size, loss and speed of stored hidden states: python tests/benchmarks/hidden.py AUDIO TEACHER [--tap layer.1] [--hours 0.2] [--json]

AUDIO is a folder of audio shards, TEACHER a checkpoint. `megabytes_an_hour` is of the members, without the tar around them. `lost` is the
squared error as a share of the variance of what is kept; the quantiser is trained on other utterances than it is measured on (the
second half). Writing starts at the teacher's answer of an utterance in memory, reading ends at a row for each frame; both are
beside those of the posteriors (mass 0.999, k 20), which a shard holds too. The best of several passes, one thread.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from tables import print_rows
from torch import Tensor

from asr_kd.audio.blas import one_thread
from asr_kd.labeling.hidden import describe_hidden, kept_hidden
from asr_kd.labeling.settings import LabelSettings
from asr_kd.labeling.shard import load_shard
from asr_kd.models.acoustic import hidden_batches, load_checkpoint
from asr_kd.shards.tarset import read_index
from asr_kd.targets.codec import decode, encode
from asr_kd.targets.hidden import decode_hidden, encode_hidden
from asr_kd.targets.posteriors import SparsePosteriors
from asr_kd.targets.quantiser import Quantiser, fit

PASSES = 3
CODEBOOKS = (1, 2, 4, 8, 16)


def best(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of the fastest of several passes, and what it gives."""
    seconds, found = float("inf"), None
    for _ in range(PASSES):
        start = time.perf_counter()
        found = work()
        seconds = min(seconds, time.perf_counter() - start)
    return seconds, found


@one_thread()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("audio")
    parser.add_argument("teacher")
    parser.add_argument("--tap", default="layer.1")
    parser.add_argument("--hours", type=float, default=0.2)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    teacher, tap = load_checkpoint(arguments.teacher), arguments.tap
    common = {
        "teacher": arguments.teacher,
        "audio": arguments.audio,
        "output": "nowhere",
        "mode": "hidden",
        "taps": [tap],
    }
    answers: list[tuple[Tensor, dict[str, Tensor]]] = []
    wanted = arguments.hours * 3_600_000 / teacher.frame_ms
    for info in read_index(arguments.audio):
        loaded = load_shard(LabelSettings.model_validate(common), teacher, None, info)
        for _, said in hidden_batches(teacher, loaded.features, 2000, [tap]):
            answers += said
        if sum(len(row) for row, _ in answers) >= wanted:
            break
    order = np.random.default_rng(0).permutation(len(answers))
    halves = [[answers[index] for index in order[half::2]] for half in (0, 1)]
    trained_on = np.concatenate([states[tap].numpy() for _, states in halves[0]])
    measured = halves[1]
    frames = sum(len(row) for row, _ in measured)
    hour = 3_600_000 / teacher.frame_ms / frames / 1e6

    write, targets = best(lambda: [encode(SparsePosteriors.from_dense(row, 20, 0.999)) for row, _ in measured])
    read, kept = best(lambda: [decode(data) for data in targets])
    size = sum(map(len, targets))
    rows = [row("posteriors", frames, size, hour, None, write, read)]
    for keep, count in (("events", 0), ("frames", 0), *(("codes", count) for count in CODEBOOKS)):
        quantiser = Quantiser({tap: fit(trained_on, count)}) if count else None
        settings = LabelSettings.model_validate(common | {"keep": keep} | ({"codebooks": count} if count else {}))

        def written(settings: LabelSettings = settings, quantiser: Quantiser | None = quantiser) -> Any:
            found = [
                kept_hidden(settings, states, target, quantiser)
                for (_, states), target in zip(measured, kept, strict=True)
            ]
            return found, [encode_hidden(one.states) for one in found]

        write, (found, data) = best(written)
        size = sum(map(len, data))
        described = describe_hidden(settings, teacher, found, size, quantiser)
        read, _ = best(
            lambda data=data, described=described, quantiser=quantiser: [  # type: ignore[misc]
                decode_hidden(one, described, quantiser=quantiser).of_frames(tap) for one in data
            ]
        )
        name = f"codes, {count} codebooks" if count else keep
        rows.append(row(name, frames, size, hour, described.lost[tap], write, read))
    print_rows(rows, arguments.json)


def row(
    name: str, frames: int, size: int, hour: float, lost: float | None, write: float, read: float
) -> dict[str, Any]:
    return {
        "name": name,
        "bytes_per_frame": round(size / frames, 2),
        "megabytes_an_hour": round(size * hour, 3),
        "lost": None if lost is None else f"{lost:.2g}",
        "write_frames_per_second": round(frames / write),
        "read_frames_per_second": round(frames / read),
    }


if __name__ == "__main__":
    main()
