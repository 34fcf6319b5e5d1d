"""Utterances → recordings of many minutes: speakers in random order, pauses, room noise, and stretches in which nobody speaks.

    python pipelines/long/compose.py --manifest runs/an4-seed0/corpus/test.jsonl --minutes 10 --snr 40 --output runs/an4-seed0/long/test

Writes the recordings as FLAC with three lists: `recordings.jsonl`, a manifest of them with all that is said in each; `reference.jsonl`,
a manifest of the utterances in them, where each begins and ends, and between which times it is louder than its background; and
`between.jsonl`, the stretches in which nobody speaks. The last two are for scoring alone. The seed decides order, pauses and sounds: the
same audio gives the same bytes, and with stretches or in more noise the order and the pauses stay.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from asr_kd.audio.decode import decode, to_flac
from asr_kd.audio.noise import active_power, babble, coloured
from asr_kd.errors import AudioError, UserError
from asr_kd.files import claim_folder, sha256_file, write_whole
from asr_kd.progress import Progress
from asr_kd.shards.manifest import read_manifest, read_transcripts

RATE = 16000
#: ranges in seconds: pauses between utterances, and stretches without speech
PAUSE, STRETCH = (0.2, 4.0), (5.0, 20.0)
#: what is heard in the stretches, so many utterances apart on average, so many dB below the speech
KINDS, EVERY, BELOW = ("babble", "music", "noise"), 8, 5.0
TALKERS = 5
#: speech is what lies within so many dB of the loudest 20 ms of its utterance; bursts that are shorter than BURST seconds and as far as
#: GAP from the rest are lips and breath where they begin or end an utterance
RANGE, GAP, BURST = 30.0, 0.1, 0.15


@dataclass
class Utterance:
    """What is said: float32 [samples] at RATE, and what the list knows of it."""

    key: str
    text: str
    speaker: str | None
    sound: np.ndarray

    @property
    def spoken(self) -> tuple[float, float]:
        """Seconds from which and up to which it is louder than its background."""
        piece = RATE // 50
        pieces = self.sound[: len(self.sound) // piece * piece].reshape(-1, piece)
        powers = np.square(pieces, dtype=np.float64).mean(axis=1)
        loud = np.flatnonzero(powers >= powers.max(initial=0.0) / 10 ** (RANGE / 10)) * piece / RATE
        if not len(loud):
            return 0.0, 0.0
        runs = np.split(loud, np.flatnonzero(np.diff(loud) > GAP) + 1)
        long = [run for run in runs if run[-1] - run[0] >= BURST] or runs
        return float(long[0][0]), float(long[-1][-1]) + piece / RATE


@dataclass
class Recording:
    """A long recording as it grows: its sound in parts, and what lies where."""

    key: str
    parts: list[np.ndarray] = field(default_factory=list)
    said: list[dict[str, Any]] = field(default_factory=list)
    between: list[dict[str, Any]] = field(default_factory=list)
    samples: int = 0

    def add(self, sound: np.ndarray) -> tuple[float, float]:
        """Put a sound behind the others; from where to where it lies, in seconds."""
        start, self.samples = self.samples, self.samples + len(sound)
        self.parts.append(sound)
        return start / RATE, self.samples / RATE


def read_utterances(manifest: Path, texts: Path | None) -> list[Utterance]:
    """The utterances of a manifest, all in memory; texts are its own, or those of a list.

    Raises:
        UserError: when one has no text, or its audio cannot be read.
    """
    told = read_transcripts(texts) if texts else {}
    found = []
    for one in read_manifest(manifest):
        text = one.text if one.text is not None else told.get(one.key)
        if text is None:
            raise UserError(
                f"{manifest}: {one.key} has no text, by which cuts are scored; give --texts with one of each key"
            )
        try:
            sound, _ = decode(one.audio.read_bytes(), str(one.audio), RATE, 600.0)
        except (AudioError, OSError) as error:
            raise UserError(f"{manifest}: {one.key}: {error}; compose from utterances that can be read") from None
        first, last = round(one.span.start * RATE), None if one.span.end is None else round(one.span.end * RATE)
        found.append(Utterance(one.key, text, one.fields.get("speaker"), sound[first:last]))
    return found


def music(samples: int, rng: np.random.Generator) -> np.ndarray:
    """Chords of three decaying tones with overtones, each as long as it is struck: float32 [samples], as loud as 1."""
    scale = 220.0 * 2 ** (np.array([0, 2, 4, 7, 9, 12, 14, 16, 19, 21]) / 12)
    sound = np.zeros(samples, np.float32)
    start = 0
    while start < samples:
        length = min(int(rng.uniform(0.25, 0.6) * RATE), samples - start)
        time = np.arange(length) / RATE
        for tone in rng.choice(scale, 3, replace=False):
            over = sum(np.sin(2 * np.pi * tone * number * time) / number for number in range(1, 7))
            sound[start : start + length] += (over * np.exp(-3 * time)).astype(np.float32)
        start += length
    return sound / np.float32(np.sqrt(np.square(sound).mean()) or 1.0)


def stretch(kind: str, samples: int, voices: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """What is heard where nobody speaks: float32 [samples], as loud as 1."""
    if kind == "music":
        return music(samples, rng)
    if kind == "babble":
        heard = babble([voices[one] for one in rng.permutation(len(voices))[:TALKERS]], samples, rng)
    else:  # noise that comes and goes by up to 12 dB, each half second
        levels = 10 ** (-rng.uniform(0, 12, 2 + samples * 2 // RATE) / 20)
        heard = coloured("brown", samples, RATE, rng) * np.repeat(levels, RATE // 2)[:samples].astype(np.float32)
    return heard / np.float32(np.sqrt(np.square(heard).mean()) or 1.0)


def compose(
    utterances: list[Utterance], minutes: float, snr: float, stretches: bool, seed: int
) -> Iterator[tuple[Recording, np.ndarray]]:
    """Recordings of about so many minutes that hold each utterance once, with their sound, float32 [samples].

    The room's pink noise goes on all through, `snr` dB below the median of the utterances' active power.
    """
    placing, filling = np.random.default_rng([seed, 0]), np.random.default_rng([seed, 1])
    power = float(np.median([active_power(one.sound, RATE) for one in utterances]))
    voices = [one.sound for one in utterances if one.sound.any()]
    recording = Recording("long-0000")
    number = 0
    for index, place in enumerate(placing.permutation(len(utterances))):
        one = utterances[place]
        recording.add(np.zeros(round(placing.uniform(*PAUSE) * RATE), np.float32))
        if stretches and filling.random() < 1 / EVERY:
            kind = str(filling.choice(KINDS))
            sound = stretch(kind, round(filling.uniform(*STRETCH) * RATE), voices, filling)
            start, end = recording.add(sound * np.float32(np.sqrt(power / 10 ** (BELOW / 10))))
            recording.between.append({"recording": recording.key, "kind": kind, "start": start, "end": end})
            recording.add(np.zeros(round(filling.uniform(*PAUSE) * RATE), np.float32))
        start, end = recording.add(one.sound)
        first, last = one.spoken
        recording.said.append({
            "audio": f"{recording.key}.flac", "key": one.key, "recording": recording.key, "start": start, "end": end,
            "speech": [round(start + first, 6), round(start + last, 6)], "speaker": one.speaker, "text": one.text,
        })  # fmt: skip
        if recording.samples >= minutes * 60 * RATE or index == len(utterances) - 1:
            recording.add(np.zeros(round(placing.uniform(*PAUSE) * RATE), np.float32))
            sound = np.concatenate(recording.parts)
            room = coloured("pink", len(sound), RATE, filling)
            sound += room * np.float32(np.sqrt(power / 10 ** (snr / 10) / np.square(room, dtype=np.float64).mean()))
            yield recording, sound / np.float32(max(1.0, np.abs(sound).max()))
            number += 1
            recording = Recording(f"long-{number:04d}")


def write(output: Path, utterances: list[Utterance], settings: dict[str, Any]) -> None:
    """Write the recordings and their lists."""
    lists: dict[str, list[dict[str, Any]]] = {"recordings": [], "reference": [], "between": []}
    with Progress("compose", len(utterances), "utterances") as progress:
        for recording, sound in compose(utterances, **settings):
            with write_whole(output / f"{recording.key}.flac") as file:
                file.write(to_flac(sound, RATE))
            told = " ".join(one["text"] for one in recording.said)
            lists["recordings"].append({"audio": f"{recording.key}.flac", "key": recording.key, "text": told})
            lists["reference"] += recording.said
            lists["between"] += recording.between
            progress.advance(len(recording.said), len(sound) / RATE)
    for name, lines in lists.items():
        with write_whole(output / f"{name}.jsonl", "w") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    print(
        f"{output}: {len(lists['recordings'])} recordings of {len(utterances)} utterances, {len(lists['between'])} stretches without speech"
    )


def main() -> None:
    """Write the recordings."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--manifest", required=True, type=Path, help="utterances")
    parser.add_argument("--texts", type=Path, help="their texts by key, where the manifest has none")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--minutes", type=float, default=10.0, help="of a recording, about")
    parser.add_argument("--snr", type=float, default=40.0, help="dB of the room's noise below the speech")
    parser.add_argument("--stretches", action="store_true", help="babble, music and noise between some utterances")
    parser.add_argument("--seed", type=int, default=0)
    given = vars(parser.parse_args())
    output, manifest, texts = given.pop("output"), given.pop("manifest"), given.pop("texts")
    try:
        if not 0 < given["minutes"] <= 600:
            raise UserError(f"--minutes: {given['minutes']:g} cannot be composed; give a number above 0, up to 600")
        utterances = read_utterances(manifest, texts)
        marks = [sha256_file(file) for file in (manifest, texts) if file]
        claim_folder(output, "long", {**given, "lists": marks})
        write(output, utterances, given)
    except UserError as error:
        print(f"compose: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
