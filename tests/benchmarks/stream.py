"""Utterances a second that are read, audio or features with their soft targets: ours, WebDataset and Lhotse Shar.

    python tests/benchmarks/stream.py [--utterances 1600] [--turns 7] [--json]

All hold the same utterances (the embedded digits in strings of 3.5 s, 16 kHz) with the same soft targets (generated, 3,183 units,
the 20 best of a frame), 200 a shard, on the local disk, and read them in one process, one thread, taking turns. Three contents:

- `features + targets`: float16 features, 64 × 3 numbers every 30 ms. Ours: the cache of features and the soft-target shards.
- `sound + targets`: from FLAC to the waveform. Ours: the audio shards and the soft-target shards.
- `sound to features + targets`: the same, and features of the waveform by our front end, in all of them.

Ours gives a trainer's examples, shuffled and in batches of like length (only `sound + targets`, which no trainer reads, comes in the
order of the shards), and checks what it always does: SHA-256 of every audio and target shard, CRC of every target, that they answer
each other. WebDataset has three members a sample and Shar three fields an utterance beside its manifest: features or FLAC, units
(uint16), log-probabilities (float16), uncompressed rectangles of 20 a frame in `.npy`. They check nothing, and nothing is
shuffled. Whoever reads, every array is gone through once, as for a batch.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from tables import print_rows

from asr_kd.audio.decode import decode
from asr_kd.audio.features import Frontend
from asr_kd.config import FeatureSettings, TrainSettings
from asr_kd.shards.tarset import Sample, check_shard, read_index, read_shard, write_index, write_shard
from asr_kd.targets.posteriors import SparsePosteriors
from asr_kd.targets.store import Statistics, TargetMetadata, join, write_target_shard
from asr_kd.training.sources import Cursor, Source
from asr_kd.units import Units

try:
    import lhotse
    import webdataset
    from lhotse.audio.backend import LibsndfileBackend
    from lhotse.shar import SharWriter
except ImportError as error:
    raise SystemExit(f"{error}; what is compared with here is in an extra: pip install -e '.[peers]'") from None

DIGITS = Path(__file__).parents[2] / "data_manifests" / "digits"
FEATURES = FeatureSettings()
UNITS, KEPT, SECONDS, SHARD, RECORDINGS = 3183, 20, 3.5, 200, 8


class ManyUnits(Units):
    """Units of which only the number and the hash are looked at."""

    hash = "0123456789abcdef"
    size = UNITS


@dataclass
class Utterance:
    """The same content for whoever stores it: FLAC, waveform float32 [samples], features float16 [frames, 192], targets."""

    key: str
    flac: bytes
    waveform: np.ndarray
    features: np.ndarray
    target: SparsePosteriors

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Units uint16 and log-probabilities float16, both [frames, 20]."""
        units, probs = self.target.padded(KEPT)
        with np.errstate(divide="ignore"):
            return units.astype(np.uint16), np.log(probs).astype(np.float16)


def posteriors(frames: int, rng: np.random.Generator) -> SparsePosteriors:
    """Of a teacher who moves smoothly through a space of 16 dimensions, in which every unit has its direction."""
    path = rng.standard_normal((frames + 4, 16))
    path = sum(weight * path[place : place + frames] for place, weight in enumerate((0.2, 0.5, 0.6, 0.5, 0.2)))
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
        waveform = decode(flac.getvalue(), "", None, 60.0)[0]
        features = frontend.compute(waveform).astype(np.float16)
        begin = int(rng.integers(pool.frames - len(features)))
        yield Utterance(f"u{number:06d}", flac.getvalue(), waveform, features, pool[begin : begin + len(features)])


def in_shards(content: list[Utterance]) -> Iterator[tuple[int, list[Utterance]]]:
    for number in range(0, len(content), SHARD):
        yield number // SHARD, content[number : number + SHARD]


def write_ours(folder: Path, content: list[Utterance]) -> None:
    (folder / "audio").mkdir(parents=True)
    (folder / "targets").mkdir()
    infos = []
    for number, part in in_shards(content):
        name = f"shard-{number:06d}.tar"
        samples = [Sample(one.key, one.flac, "flac", {"seconds": len(one.waveform) / 16000}) for one in part]
        infos.append(write_shard(folder / "audio" / name, samples))
        lost: dict[str, Any] = dict.fromkeys(Statistics.model_fields, 0.0)
        lost |= {"utterances": len(part), "frames": sum(one.target.frames for one in part)}
        values = {
            "codec": {"version": 2, "levels": 128}, "selection": {"mode": "mass", "k": KEPT, "mass": 0.999},
            "teacher": "0123456789abcdef", "units_hash": ManyUnits.hash, "num_units": UNITS, "frame_ms": FEATURES.frame_ms,
            "features": FEATURES.model_dump(), "audio_sha256": infos[-1].sha256, "quarantined": {}, "statistics": lost,
        }  # fmt: skip
        pairs = ((one.key, one.target) for one in part)
        write_target_shard(folder / "targets" / name, TargetMetadata.model_validate(values), pairs)
    write_index(folder / "audio", infos)


def write_webdataset(folder: Path, content: list[Utterance], sound: bool) -> None:
    folder.mkdir(parents=True)
    for number, part in in_shards(content):
        with webdataset.TarWriter(str(folder / f"shard-{number:06d}.tar")) as writer:
            for one in part:
                units, log_probs = one.arrays
                first = {"flac": one.flac} if sound else {"features.npy": one.features}
                writer.write({"__key__": one.key, **first, "units.npy": units, "log_probs.npy": log_probs})


def write_shar(folder: Path, content: list[Utterance], sound: bool) -> None:
    folder.mkdir(parents=True)
    first = {"recording": "flac"} if sound else {"frames": "numpy"}
    with SharWriter(str(folder), {**first, "units": "numpy", "log_probs": "numpy"}, SHARD, False) as writer:
        for one in content:
            cut = lhotse.MonoCut(one.key, 0, len(one.waveform) / FEATURES.sample_rate, 0)
            if sound:
                cut.recording = lhotse.Recording.from_bytes(one.flac, one.key)
            else:
                cut = cut.attach_tensor("frames", one.features)
            units, log_probs = one.arrays
            writer.write(cut.attach_tensor("units", units).attach_tensor("log_probs", log_probs))


#: what a reader gives: features or waveform, and the arrays of the targets
Read = Iterator[tuple[np.ndarray, ...]]


def arrays(target: SparsePosteriors) -> tuple[np.ndarray, ...]:
    return target.counts, target.units, target.log_probs, target.tail


def ours(folder: Path, cache: Path | None) -> Read:
    source = {"audio": str(folder / "audio"), "targets": str(folder / "targets"), "soft": 1.0}
    settings = TrainSettings.model_validate({
        "output": "", "units": "", "development": "", "phases": [{"sources": [source], "passes": 1}],
        "feature_cache": cache and str(cache),
    })  # fmt: skip
    for batch, _ in Source(settings, 0, 0, ManyUnits.__new__(ManyUnits)).batches(0, Cursor(), 1):
        for example in batch:
            assert example.targets is not None
            yield example.features, *arrays(example.targets)


def ours_sound(folder: Path) -> Read:
    for info in read_index(folder / "audio"):
        check_shard(folder / "audio", info)
        pairs = join(folder / "audio" / info.name, folder / "targets" / info.name, audio_sha256=info.sha256)
        for sample, target in pairs:
            yield decode(sample.audio, sample.key, None, 60.0)[0], *arrays(target)


def from_webdataset(folder: Path, sound: bool) -> Read:
    flac = webdataset.handle_extension("flac", lambda data: soundfile.read(io.BytesIO(data), dtype="float32")[0])
    shards = sorted(map(str, folder.iterdir()))
    for sample in webdataset.WebDataset(shards, shardshuffle=False).decode(flac):
        yield sample["flac" if sound else "features.npy"], sample["units.npy"], sample["log_probs.npy"]


def from_shar(folder: Path, sound: bool) -> Read:
    with lhotse.audio.backend.audio_backend(LibsndfileBackend()):
        for cut in lhotse.CutSet.from_shar(in_dir=str(folder)):
            first = cut.load_audio()[0] if sound else cut.load_frames()
            yield first, cut.load_units(), cut.load_log_probs()


def with_features(read: Read) -> Read:
    frontend = Frontend(FEATURES)
    for waveform, *rest in read:
        yield frontend.compute(waveform).astype(np.float16), *rest


def speed(reader: Callable[[], Read], count: int) -> float:
    """Utterances a second."""
    start, seen = time.perf_counter(), 0
    for parts in reader():
        for part in parts:
            part.astype(np.float32)
        seen += 1
    seconds = time.perf_counter() - start
    assert seen == count
    return count / seconds


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--utterances", type=int, default=1600)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        content = list(utterances(arguments.utterances))
        write_ours(folder / "ours", content)
        for sound in (False, True):
            write_webdataset(folder / f"webdataset-{sound}", content, sound)
            write_shar(folder / f"shar-{sound}", content, sound)
        del content
        own, peers = folder / "ours", ((from_webdataset, "webdataset"), (from_shar, "shar"))
        for what, mine, sound, compute in (
            ("features + targets", lambda: ours(own, folder / "features"), False, False),
            ("sound + targets", lambda: ours_sound(own), True, False),
            ("sound to features + targets", lambda: ours(own, None), True, True),
        ):  # fmt: skip
            readers: dict[str, Callable[[], Read]] = {"asr_kd": mine}
            for read, peer in peers:

                def again(read=read, where=folder / f"{peer}-{sound}", sound=sound, compute=compute):
                    return with_features(read(where, sound)) if compute else read(where, sound)

                readers[{"webdataset": "WebDataset, 3 members", "shar": "Lhotse Shar"}[peer]] = again
            for reader in readers.values():  # nobody's first turn counts: caches are filled in it
                speed(reader, arguments.utterances)
            turns = [
                {reader: speed(read, arguments.utterances) for reader, read in readers.items()}
                for _ in range(arguments.turns)
            ]
            for reader in readers:
                ratios = [
                    turn[reader] / max(speed for other, speed in turn.items() if other != "asr_kd") for turn in turns
                ]
                rows.append({
                    "name": f"{reader}, {what}",
                    "utterances_per_second": round(statistics.median(turn[reader] for turn in turns)),
                    "to_best_peer": round(statistics.median(ratios), 2),
                    "lowest": round(min(ratios), 2),
                    "highest": round(max(ratios), 2),
                })  # fmt: skip
    print_rows(rows, arguments.json)


if __name__ == "__main__":
    main()
