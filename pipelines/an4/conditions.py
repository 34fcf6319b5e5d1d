"""A test set once more in every condition: clean, pink noise and babble at four signal-to-noise ratios, and a room.

    python pipelines/an4/conditions.py --audio runs/an4/data/test --voices runs/an4/data/development --output runs/an4/data/test-conditions

Made as those of the digits are (`asr_kd/audio/conditions.py`), at the audio's own rate; the report tells them apart by `condition`.
Babble is of `--voices`, recordings that no training hears, of other speakers where there are any. What is drawn for an utterance
depends on its key and the condition alone.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from asr_kd.audio.conditions import in_condition
from asr_kd.audio.decode import decode, to_flac
from asr_kd.errors import UserError
from asr_kd.files import claim_folder
from asr_kd.progress import Progress
from asr_kd.shards.tarset import Sample, read_checked, read_index, shard_name, write_index, write_shard

CONDITIONS = ("clean", *(f"{noise} {decibels} dB" for noise in ("pink", "babble") for decibels in (20, 10, 5, 0)), "reverberation")  # fmt: skip
LONGEST = 600.0  # seconds of an utterance
VOICES = 15.0  # minutes that babble is made of: they are held in memory


def steps(sample: Sample, rate: int | None) -> tuple[np.ndarray, int]:
    """The sound of an utterance: int16 [samples], and its rate in Hz."""
    waveform, rate = decode(sample.audio, sample.key, rate, LONGEST)
    return np.clip(np.round(waveform * 32768), -32768, 32767).astype(np.int16), rate


def read_some(folder: str, minutes: float) -> Iterator[Sample]:
    """The first utterances of every shard, of so many minutes in all; at least one of each."""
    shards = read_index(folder)
    for info in shards:
        left = minutes * 60 / len(shards)
        for sample in read_checked(folder, info):
            yield sample
            left -= sample.fields["seconds"]
            if left <= 0:
                break


def heard(sample: Sample, condition: str, voices: list[Sample], decoded: dict[tuple[str, int], np.ndarray]) -> Sample:
    """An utterance in a condition; `decoded` keeps the voices, by key and rate."""
    waveform, rate = steps(sample, None)
    name, speaker = f"{condition.replace(' ', '-')}-{sample.key}", sample.fields.get("speaker")
    strangers = [voice for voice in voices if voice.fields.get("speaker") != speaker]
    babblers = (strangers or voices) if condition.startswith("babble") else []
    for voice in babblers:
        if (voice.key, rate) not in decoded:
            decoded[voice.key, rate] = steps(voice, rate)[0]
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]))
    changed = in_condition(condition, waveform, rate, [decoded[voice.key, rate] for voice in babblers], rng)
    fields = {**sample.fields, "condition": condition}
    return Sample(name, to_flac(changed.astype(np.float32) / 32768, rate), "flac", fields)


def main() -> None:
    """Write the shards, one for each condition."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--audio", required=True, help="folder of audio shards: the test set")
    parser.add_argument("--voices", required=True, help="folder of audio shards that babble is made of")
    parser.add_argument("--minutes", type=float, default=20.0, help="of the test set at most; each is heard ten times")
    parser.add_argument("--output", required=True, type=Path)
    given = parser.parse_args()
    try:
        if not given.minutes > 0:
            raise UserError(f"--minutes: {given.minutes:g} leave nothing to hear; give a number above 0")
        audio, voices = read_index(given.audio), read_index(given.voices)
        claim_folder(given.output, "conditions", {"audio": audio.hash, "voices": voices.hash, "minutes": given.minutes})
        babblers, decoded = list(read_some(given.voices, VOICES)), dict[tuple[str, int], np.ndarray]()
        written = []
        with Progress("conditions", len(CONDITIONS), "conditions") as progress:
            for number, condition in enumerate(CONDITIONS):
                said = read_some(given.audio, given.minutes)
                made = (heard(sample, condition, babblers, decoded) for sample in said)
                written.append(write_shard(given.output / shard_name(number), made))
                progress.advance(1, written[-1].seconds)
        write_index(given.output, written)
    except UserError as error:
        print(f"conditions: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
