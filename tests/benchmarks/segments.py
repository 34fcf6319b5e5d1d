"""An hour of speech and pauses through `prepare` with segment: python tests/benchmarks/segments.py [AUDIO] [--hours 1] [--json]

Utterances (3 to 7 of the embedded digits; with AUDIO, a folder of shards, those of it) stand in random order in one FLAC, with pauses of 0.7 to
4 s between them, and pink noise over all of it, so many dB below the speech. For each detector: seconds of one core to listen (decoding and resampling are
within them) and for all of `prepare`, the share of utterances of which nothing was kept, the share of their seconds that was left out, the
share of the pauses that was, and the memory that listening added.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from tables import print_rows

from asr_kd.audio.decode import decode, read_blocks
from asr_kd.audio.vad import RATE, Silero, track
from asr_kd.shards.prepare import prepare
from asr_kd.shards.settings import PrepareSettings
from asr_kd.shards.tarset import read_index, read_shard

PAUSE, WITHIN = (0.7, 4.0), 0.3  # seconds between utterances, and at most between what is joined to one


def pink(rng: np.random.Generator, count: int, rate: int) -> np.ndarray:
    """Noise of power 1 whose power falls with the frequency, from 20 Hz on; a minute of it, again and again."""
    spectrum = np.fft.rfft(rng.normal(size=60 * rate))
    spectrum /= np.sqrt(np.maximum(np.fft.rfftfreq(60 * rate, 1 / rate), 20.0))
    noise = np.fft.irfft(spectrum)
    return np.resize(noise / noise.std(), count)


def compose(folder: Path, hours: float, joined: tuple[int, int], snr: float, audio: Path) -> np.ndarray:
    """Write `audio`, at the rate of the first recording; where its utterances begin and end, seconds [utterances, 2]."""
    rng = np.random.default_rng(0)
    samples = [sample for shard in read_index(folder) for sample in read_shard(folder / shard.name)]
    rate = decode(samples[0].audio, samples[0].key, None, 60.0)[1]
    sounds = [decode(sample.audio, sample.key, rate, 60.0)[0] for sample in samples]
    pieces, places, at = [], [], 0
    while at < 3600 * hours * rate:
        pieces.append(np.zeros(int(rate * rng.uniform(*PAUSE)), np.float32))
        begin = at = at + len(pieces[-1])
        for number in range(rng.integers(joined[0], joined[1] + 1)):
            within = np.zeros(int(rate * rng.uniform(0, WITHIN)) if number else 0, np.float32)
            sound = sounds[rng.integers(len(sounds))]
            pieces += [within, sound * (0.05 / sound.std())]  # of one loudness, 26 dB below full scale
            at += len(within) + len(sound)
        places.append((begin / rate, at / rate))
    whole = np.concatenate(pieces)
    whole += pink(rng, len(whole), rate) * 0.05 * 10 ** (-snr / 20)
    soundfile.write(audio, np.clip(whole, -1, 1), rate, subtype="PCM_16")
    return np.array(places)


def peak() -> float:
    """MiB that this process has held at most; a child's resource usage would begin with its parent's."""
    line = next(one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def row(audio: Path, places: np.ndarray, detector: str, snr: float, output: Path) -> dict[str, Any]:
    before, began = peak(), time.process_time()
    found = track(read_blocks(audio, "hour", RATE), Silero() if detector == "silero" else None)
    listening = time.process_time() - began
    settings = {"manifest": str(audio.with_suffix(".jsonl")), "output": str(output), "segment": {"detector": detector}}
    began = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        prepare(PrepareSettings.model_validate(settings))
    spent, after = time.process_time() - began, peak()
    kept = np.zeros(found.samples, bool)
    count = 0
    for shard in read_index(output):
        for sample in read_shard(output / shard.name):
            count += 1
            kept[slice(*(round(RATE * sample.fields[name]) for name in ("source_start", "source_end")))] = True
    spoken = np.zeros(found.samples, bool)
    places = np.round(places * RATE).astype(int)
    for start, end in places:
        spoken[start:end] = True
    lost = sum(not kept[start:end].any() for start, end in places)
    return {
        "detector": detector,
        "SNR, dB": f"{snr:g}",
        "listening, s": round(listening, 1),
        "prepare, s": round(spent, 1),
        "utterances": len(places),
        "lost whole, %": round(100 * lost / len(places), 2),
        "speech left out, %": round(100 * (spoken & ~kept).sum() / spoken.sum(), 2),
        "pauses left out, %": round(100 * (~spoken & ~kept).sum() / (~spoken).sum(), 1),
        "pieces": count,
        "memory added, MiB": round(after - before),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("audio", nargs="?")
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--snr", type=float, nargs="+", default=[40, 20, 10])
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    folder = Path(arguments.audio) if arguments.audio else Path(__file__).parents[2] / "data_manifests" / "digits"
    joined = (1, 1) if arguments.audio else (3, 7)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for snr in arguments.snr:
            audio = Path(temporary) / "hour.flac"
            places = compose(folder, arguments.hours, joined, snr, audio)
            audio.with_suffix(".jsonl").write_text('{"audio": "hour.flac"}\n')
            for detector in ("silero", "energy"):
                output = Path(temporary) / f"{detector}-{snr:g}"
                with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
                    rows.append(fresh.submit(row, audio, places, detector, snr, output).result())
    print_rows(rows, arguments.json)


if __name__ == "__main__":
    main()
