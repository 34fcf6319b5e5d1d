"""The same utterances as over a telephone: a narrow band, 8-bit μ-law, noise, another gain and polarity, and a later start.

    python pipelines/channels/telephone.py --audio runs/channels/data/clean/test --output runs/channels/data/phone-test

Everything is drawn from an utterance's key: the same audio gives the same bytes. How much later an utterance starts is in no file, as
in recordings of two machines; `asr-kd pair` has to find it.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import sys
from pathlib import Path

import numpy as np

from asr_kd.audio.decode import decode, encode
from asr_kd.errors import UserError
from asr_kd.files import claim_folder
from asr_kd.progress import Progress
from asr_kd.shards.tarset import Sample, read_checked, read_index, write_index, write_shard

RATE, BAND = 8000, (300.0, 3400.0)
#: ranges: seconds until the recording starts, signal-to-noise ratio in dB, gain
LATER, NOISE, GAIN = (0.0, 0.4), (10.0, 20.0), (0.2, 1.0)
MU = 255.0


def telephone(sound: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A waveform at RATE as the telephone gives it: float32 [samples], longer by the time until it starts."""
    sound = np.concatenate([np.zeros(round(rng.uniform(*LATER) * RATE)), sound])
    spectrum, frequencies = np.fft.rfft(sound), np.fft.rfftfreq(len(sound), 1 / RATE)
    # edges of half an octave, as a line has them
    spectrum *= np.clip(2 * np.log2(np.maximum(frequencies, 1.0) / BAND[0]) + 1, 0, 1) * (frequencies < BAND[1])
    heard = np.fft.irfft(spectrum, len(sound))
    level = np.sqrt(np.square(heard).mean()) * 10 ** (-rng.uniform(*NOISE) / 20)
    heard = (heard + rng.normal(0, level, len(heard))) * rng.uniform(*GAIN) * rng.choice([-1, 1])
    # 8 bits, by the logarithm of the amplitude
    small = np.clip(heard, -1, 1)
    steps = np.round(np.sign(small) * np.log1p(MU * np.abs(small)) / np.log1p(MU) * 127) / 127
    return (np.sign(steps) * np.expm1(np.abs(steps) * np.log1p(MU)) / MU).astype(np.float32)


def changed(sample: Sample) -> Sample:
    """An utterance over the telephone; what is known of it stays, but for its length."""
    sound, _ = decode(sample.audio, sample.key, RATE, 60.0)
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(sample.key.encode()).digest()[:8]))
    heard = telephone(sound, rng)
    fields = {**sample.fields, "seconds": round(len(heard) / RATE, 6)}
    return dataclasses.replace(sample, audio=encode(heard, RATE, "FLAC"), extension="flac", fields=fields)


def main() -> None:
    """Write the shards."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--audio", required=True, help="folder of audio shards")
    parser.add_argument("--output", required=True, type=Path)
    given = parser.parse_args()
    try:
        shards = read_index(given.audio)
        claim_folder(given.output, "telephone", {"audio": shards.hash})
        with Progress("telephone", shards.samples, "utterances") as progress:
            written = []
            for info in shards:
                written.append(write_shard(given.output / info.name, map(changed, read_checked(given.audio, info))))
                progress.advance(info.samples, info.seconds)
        write_index(given.output, written)
    except UserError as error:
        print(f"telephone: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
