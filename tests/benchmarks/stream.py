"""Utterances a second that are read, with their soft targets: ours, WebDataset (3 members a sample) and Lhotse Shar.

    python tests/benchmarks/stream.py [--utterances 800] [--turns 9] [--json]

All hold the same: the embedded digits in strings of 3.5 s at 16 kHz, and generated soft targets over 3,183 units, the 20 best of a
frame; 200 utterances a shard, on the local disk. All are read in one process and one thread, and take turns. Three contents:

- `features`: float16, 64 × 3 numbers every 30 ms. Ours: the cache of features and the soft-target shards.
- `sound`: from FLAC to the waveform. Ours: the audio shards and the soft-target shards.
- `sound to features`: the same, and then features by our front end, in all of them.

Ours gives a trainer's examples, shuffled and in batches of like length (`sound`, which no trainer asks for, in the order of the
shards), and checks what it always does: the SHA-256 of every audio shard, of its soft targets and that they answer each other, the CRC of
every soft target. The others' shards are as their own writers make them: features or FLAC, units (uint16) and log-probabilities
(float16), rectangles of 20 a frame; three `.npy` (or FLAC) members of a WebDataset sample, three fields of Shar beside its
manifest of cuts. They are read in order and unchecked. Whoever reads, every array is gone through once, as for a batch.

A second is one of the processor: the files are in memory, nothing waits, and what else the machine does hardly counts.
`utterances_per_second` is the median of the turns; `ratio_to_best_peer` the median of the ratios within a turn, then the lowest
and the highest.
"""

from __future__ import annotations

import argparse
import functools
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
from generated import write_sets
from tables import print_rows

from asr_kd.audio.decode import decode
from asr_kd.audio.features import Frontend
from asr_kd.audio.settings import FeatureSettings
from asr_kd.shards.tarset import Sample, read_checked, read_index, read_shard
from asr_kd.targets.posteriors import SparsePosteriors
from asr_kd.targets.store import read_target_shard
from asr_kd.training.settings import TrainSettings
from asr_kd.training.sources import Cursor, Source
from asr_kd.units import Units

try:
    import lhotse
    import webdataset
    from lhotse.audio.backend import LibsndfileBackend, audio_backend
    from lhotse.shar import SharWriter
except ImportError as error:
    raise SystemExit(f"{error}; install what is compared with here: pip install -e '.[peers]'") from None

DIGITS = Path(__file__).parents[2] / "data_manifests" / "digits"
FEATURES = FeatureSettings()
UNITS, KEPT, SECONDS, SHARD, RECORDINGS = 3183, 20, 3.5, 200, 12

#: what a reader gives of each utterance: features or waveform, and the arrays of the soft targets
Read = Iterator[tuple[np.ndarray, ...]]


class ManyUnits(Units):
    """Units of which only the number and the hash are looked at."""

    hash = "0123456789abcdef"
    size = UNITS


@dataclass
class Utterance:
    """The same content for all: FLAC, features float16 [frames, 192], soft targets."""

    key: str
    flac: bytes
    seconds: float
    features: np.ndarray
    target: SparsePosteriors

    @property
    def rectangles(self) -> tuple[np.ndarray, np.ndarray]:
        """Units uint16 and log-probabilities float16, both [frames, 20]."""
        units, probs = self.target.padded(KEPT)
        with np.errstate(divide="ignore"):
            return units.astype(np.uint16), np.log(probs).astype(np.float16)


def posteriors(frames: int, rng: np.random.Generator) -> SparsePosteriors:
    """Of a teacher that moves smoothly through 16 dimensions, in which every unit has its direction."""
    steps = rng.standard_normal((frames + 4, 16))
    path = sum(weight * steps[place : place + frames] for place, weight in enumerate((0.2, 0.5, 0.6, 0.5, 0.2)))
    logits = torch.from_numpy(path @ rng.standard_normal((16, UNITS)) * 1.6).float()
    return SparsePosteriors.from_dense(logits.log_softmax(1), KEPT, 0.999)


def utterances(count: int) -> Iterator[Utterance]:
    rng = np.random.default_rng(0)
    recordings = [sample for info in read_index(DIGITS) for sample in read_shard(DIGITS / info.name)]
    sounds = [decode(sample.audio, sample.key, FEATURES.sample_rate, 60.0)[0] for sample in recordings[::10]]
    frontend, pool = Frontend(FEATURES), posteriors(20_000, rng)
    for number in range(count):
        waveform = np.concatenate([sounds[place] for place in rng.integers(len(sounds), size=RECORDINGS)])
        waveform = waveform[: round(SECONDS * FEATURES.sample_rate)]
        flac = io.BytesIO()
        soundfile.write(flac, waveform, FEATURES.sample_rate, format="FLAC", subtype="PCM_16")
        heard = decode(flac.getvalue(), "", None, 60.0)[0]
        features = frontend.compute(heard)
        begin = int(rng.integers(pool.frames - len(features)))
        target = pool[begin : begin + len(features)]
        yield Utterance(f"u{number:06d}", flac.getvalue(), len(heard) / FEATURES.sample_rate, features, target)


def in_shards(content: list[Utterance]) -> Iterator[list[Utterance]]:
    return (content[start : start + SHARD] for start in range(0, len(content), SHARD))


def write_ours(folder: Path, content: list[Utterance]) -> None:
    shards = (
        [(Sample(one.key, one.flac, "flac", {"seconds": one.seconds}), one.target) for one in part]
        for part in in_shards(content)
    )
    write_sets(folder, shards, FEATURES, ManyUnits.hash, KEPT)


def write_webdataset(folder: Path, content: list[Utterance], sound: bool) -> None:
    folder.mkdir()
    for number, part in enumerate(in_shards(content)):
        with webdataset.TarWriter(str(folder / f"shard-{number:06d}.tar")) as writer:
            for one in part:
                units, log_probs = one.rectangles
                first = {"flac": one.flac} if sound else {"features.npy": one.features}
                writer.write({"__key__": one.key, **first, "units.npy": units, "log_probs.npy": log_probs})


def write_shar(folder: Path, content: list[Utterance], sound: bool) -> None:
    folder.mkdir()
    first = {"recording": "flac"} if sound else {"frames": "numpy"}
    with SharWriter(str(folder), {**first, "units": "numpy", "log_probs": "numpy"}, SHARD) as writer:
        for one in content:
            units, log_probs = one.rectangles
            cut = lhotse.MonoCut(one.key, 0, one.seconds, 0)
            cut = cut.attach_tensor("units", units).attach_tensor("log_probs", log_probs)
            if sound:
                cut.recording = lhotse.Recording.from_bytes(one.flac, one.key)
            writer.write(cut if sound else cut.attach_tensor("frames", one.features))


def arrays(target: SparsePosteriors) -> tuple[np.ndarray, ...]:
    return target.counts, target.units, target.log_probs, target.tail


def ours(folder: Path, cache: Path | None) -> Read:
    source = {"audio": str(folder / "audio"), "targets": str(folder / "targets"), "soft": 1.0}
    settings = TrainSettings.model_validate({
        "output": "-", "units": "-", "development": "-", "phases": [{"sources": [source], "passes": 1}],
        "feature_cache": cache and str(cache),
    })  # fmt: skip
    for batch, _ in Source(settings, 0, 0, ManyUnits.__new__(ManyUnits)).batches(0, Cursor(), 1):
        for example in batch:
            assert example.targets is not None
            yield example.features, *arrays(example.targets)


def ours_sound(folder: Path) -> Read:
    for info in read_index(folder / "audio"):
        targets = dict(read_target_shard(folder / "targets" / info.name)[1])
        for sample in read_checked(folder / "audio", info):
            yield decode(sample.audio, sample.key, None, 60.0)[0], *arrays(targets[sample.key])


def from_webdataset(folder: Path, sound: bool) -> Read:
    flac = webdataset.handle_extension("flac", lambda data: soundfile.read(io.BytesIO(data), dtype="float32")[0])
    shards = sorted(map(str, folder.iterdir()))
    for sample in webdataset.WebDataset(shards, shardshuffle=False).decode(flac):
        yield sample["flac" if sound else "features.npy"], sample["units.npy"], sample["log_probs.npy"]


def from_shar(folder: Path, sound: bool) -> Read:
    with audio_backend(LibsndfileBackend()):
        for cut in lhotse.CutSet.from_shar(in_dir=str(folder)):
            first = cut.load_audio()[0] if sound else cut.load_frames()
            yield first, cut.load_units(), cut.load_log_probs()


def featured(read: Callable[[Path, bool], Read], folder: Path, sound: bool) -> Read:
    frontend = Frontend(FEATURES)
    for waveform, *rest in read(folder, sound):
        yield frontend.compute(waveform), *rest


def speed(read: Callable[[], Read], count: int) -> float:
    start, seen = time.process_time(), 0
    for parts in read():
        for part in parts:
            part.astype(np.float32)
        seen += 1
    assert seen == count
    return count / (time.process_time() - start)


def rows(content: str, readers: dict[str, Callable[[], Read]], count: int, turns: int) -> list[dict[str, object]]:
    """The first of the readers is ours."""
    for read in readers.values():  # caches are filled before it counts
        speed(read, count)
    speeds = [{name: speed(read, count) for name, read in readers.items()} for _ in range(turns)]
    peers = list(readers)[1:]
    table: list[dict[str, object]] = []
    for name in readers:
        ratios = [turn[name] / max(turn[peer] for peer in peers) for turn in speeds]
        table.append({
            "name": f"{name}, {content}",
            "utterances_per_second": round(statistics.median(turn[name] for turn in speeds)),
            "ratio_to_best_peer": round(statistics.median(ratios), 2),
            "lowest": round(min(ratios), 2),
            "highest": round(max(ratios), 2),
        })  # fmt: skip
    return table


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--utterances", type=int, default=800)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        content = list(utterances(arguments.utterances))
        write_ours(folder / "ours", content)
        for sound in (False, True):
            write_webdataset(folder / f"webdataset-{sound}", content, sound)
            write_shar(folder / f"shar-{sound}", content, sound)
        del content
        part = functools.partial
        readers = {
            "features": {
                "asr_kd": part(ours, folder / "ours", folder / "cache"),
                "WebDataset": part(from_webdataset, folder / "webdataset-False", False),
                "Lhotse Shar": part(from_shar, folder / "shar-False", False),
            },
            "sound": {
                "asr_kd": part(ours_sound, folder / "ours"),
                "WebDataset": part(from_webdataset, folder / "webdataset-True", True),
                "Lhotse Shar": part(from_shar, folder / "shar-True", True),
            },
            "sound to features": {
                "asr_kd": part(ours, folder / "ours", None),
                "WebDataset": part(featured, from_webdataset, folder / "webdataset-True", True),
                "Lhotse Shar": part(featured, from_shar, folder / "shar-True", True),
            },
        }
        table = [
            row for what, each in readers.items() for row in rows(what, each, arguments.utterances, arguments.turns)
        ]
    print_rows(table, arguments.json)


if __name__ == "__main__":
    main()
