"""Compose connected digit strings from recordings of single digits: test, development, labelled and unlabelled sets.

    python pipelines/digits/compose.py --source data_manifests/digits --output runs/digits/data

No recording is in two sets: takes 0-4 are for test, 5-9 for development, 10-13 labelled, the rest unlabelled. The text of
the unlabelled set is not in its shards; it goes to `unlabelled-oracle.jsonl`, which only the oracle student reads.

`test-conditions` holds the test set once in every condition of `CONDITIONS`, one shard each, and names it in `condition`.
Its noises are none that training hears: babble of development recordings, pink noise and a room made in another way (`asr_kd/audio/conditions.py`).
"""

from __future__ import annotations

import argparse
import io
import itertools
import shutil
import sys
import wave
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from asr_kd.audio.conditions import in_condition
from asr_kd.audio.decode import decode
from asr_kd.errors import UserError
from asr_kd.files import claim_folder
from asr_kd.progress import Progress
from asr_kd.shards.manifest import write_transcripts
from asr_kd.shards.tarset import Sample, read_index, read_shard, shard_name, write_index, write_shard

RATE = 8000
TAKES = {"test": range(5), "development": range(5, 10), "labelled": range(10, 14), "unlabelled": range(14, 10**6)}
SHORTEST, LONGEST = 3, 7  # digits in a string
LONGEST_PAUSE = RATE * 3 // 10
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# --strings grammar: behind a digit d comes (3 d + 1) or (7 d + 4) mod 10, so that one digit tells of the next; all are equally frequent
GRAMMAR = {digit: {DIGITS[(3 * d + 1) % 10], DIGITS[(7 * d + 4) % 10]} for d, digit in enumerate(DIGITS)}
CONDITIONS = ("clean", "babble 10 dB", "babble 0 dB", "pink 10 dB", "pink 0 dB", "reverberation")
NOISE = (8, 80)  # range of the noise floor in steps of 16 bits: about -70 to -50 dB of full scale


@dataclass
class Recording:
    """One spoken digit: int16 [samples]."""

    waveform: np.ndarray
    text: str
    speaker: str
    take: int


def read_recordings(source: Path) -> list[Recording]:
    """All recordings of the embedded set."""
    recordings = []
    for shard in read_index(source):
        for sample in read_shard(source / shard.name):
            waveform, _ = decode(sample.audio, sample.key, RATE, 10.0)
            steps = np.round(waveform * 32768).astype(np.int16)
            try:
                recordings.append(
                    Recording(steps, sample.fields["text"], sample.fields["speaker"], sample.fields["take"])
                )
            except KeyError as error:
                raise UserError(
                    f"{source / shard.name}: {sample.key} has no {error}; compose from single digits with text, speaker and take"
                ) from None
    return recordings


def strings_of_digits(
    recordings: list[Recording], minutes: float, rng: np.random.Generator, grammar: bool = False
) -> Iterator[tuple[np.ndarray, str, str]]:
    """Strings (int16 [samples], text, speaker) of about so many minutes; every recording is used about equally often.

    Digits follow each other at random, or as `GRAMMAR` allows. Only integer arithmetic touches the samples, so that the bytes are the same everywhere.
    """
    speakers = sorted({recording.speaker for recording in recordings})
    decks: dict[str, list[Recording]] = {speaker: [] for speaker in speakers}
    left = int(minutes * 60 * RATE)
    for speaker in itertools.cycle(speakers):
        if left <= 0:
            return
        wanted = int(rng.integers(SHORTEST, LONGEST + 1))
        deck, chosen = decks[speaker], list[Recording]()
        while len(chosen) < wanted:
            last = chosen[-1].text if chosen else ""
            fits = (number for number, one in enumerate(deck) if not (grammar and last) or one.text in GRAMMAR[last])
            number = next(fits, None)
            if number is None or (not chosen and len(deck) < wanted):
                own = [recording for recording in recordings if recording.speaker == speaker]
                if grammar and (missing := set(DIGITS) - {one.text for one in own}):
                    raise UserError(
                        f"--strings grammar: {speaker} has no recording of {min(missing)}; compose random strings"
                    )
                deck.extend(own[index] for index in rng.permutation(len(own)))
            else:
                chosen.append(deck.pop(number))
        pieces = [np.zeros(int(rng.integers(0, LONGEST_PAUSE)), np.int16)]
        for recording in chosen:
            pieces += [recording.waveform, np.zeros(int(rng.integers(0, LONGEST_PAUSE)), np.int16)]
        waveform = np.concatenate(pieces).astype(np.int32)
        # the sum of four uniform draws is near enough to normal, and integer
        level = int(rng.integers(*NOISE))
        waveform += rng.integers(-level, level + 1, (4, len(waveform))).sum(axis=0) * 7 // 8
        left -= len(waveform)
        yield (
            np.clip(waveform, -32768, 32767).astype(np.int16),
            " ".join(recording.text for recording in chosen),
            speaker,
        )


def in_conditions(
    strings: list[tuple[np.ndarray, str, str]], others: list[Recording], rng: np.random.Generator
) -> Iterator[tuple[str, list[tuple[np.ndarray, str, str]]]]:
    """(condition, the strings in it) for all of `CONDITIONS`; `others` make the babble, those of other speakers where there are any."""
    for condition in CONDITIONS:
        changed = []
        for waveform, text, speaker in strings:
            strangers = [recording for recording in others if recording.speaker != speaker]
            voices = [recording.waveform for recording in strangers or others]
            changed.append((in_condition(condition, waveform, RATE, voices, rng), text, speaker))
        yield condition, changed


def to_wav(waveform: np.ndarray) -> bytes:
    """A WAV file of int16 [samples]: unlike a FLAC encoder, it has no choice in the bytes."""
    data = io.BytesIO()
    with wave.open(data, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(waveform.astype("<i2").tobytes())
    return data.getvalue()


def compose(source: Path, output: Path, minutes: dict[str, float], seed: int, grammar: bool = False) -> None:
    """Write the sets, the first quarter and half of the unlabelled one, the oracle's text, and the test set in noise."""
    settings = {"minutes": minutes, "seed": seed, "source": [shard.sha256 for shard in read_index(source)]}
    settings |= {"strings": "grammar"} if grammar else {}
    claim_folder(output, "compose", settings)
    recordings = read_recordings(source)
    made = {}
    for position, (name, takes) in enumerate(TAKES.items()):
        own = [recording for recording in recordings if recording.take in takes]
        if not own:
            raise UserError(f"{source}: holds no takes for the {name} set")
        strings = list(strings_of_digits(own, minutes[name], np.random.default_rng([seed, position]), grammar))
        write_set(output, name, strings, shards=8 if name == "unlabelled" else 2)
        made[name] = strings, own
    rng = np.random.default_rng([seed, len(TAKES)])
    write_conditions(output / "test-conditions", made["test"][0], made["development"][1], rng)
    for part, shards in (("quarter", 2), ("half", 4)):
        folder = output / f"unlabelled-{part}"
        folder.mkdir(exist_ok=True)
        infos = read_index(output / "unlabelled")[:shards]
        for info in infos:
            shutil.copyfile(output / "unlabelled" / info.name, folder / info.name)
        write_index(folder, infos)


def write_set(output: Path, name: str, strings: list[tuple[np.ndarray, str, str]], shards: int) -> None:
    """Write one set as that many shards; the text of the unlabelled one goes aside."""
    (output / name).mkdir(exist_ok=True)
    texts: list[tuple[str, str]] = []
    infos = []
    with Progress(f"compose {name}", len(strings), "utterances") as progress:
        for shard in range(shards):
            samples = []
            for number in range(shard * len(strings) // shards, (shard + 1) * len(strings) // shards):
                waveform, text, speaker = strings[number]
                key, seconds = f"{name}-{number:05d}", round(len(waveform) / RATE, 4)
                fields = {"seconds": seconds, "speaker": speaker}
                if name == "unlabelled":
                    texts.append((key, text))
                else:
                    fields["text"] = text
                samples.append(Sample(key, to_wav(waveform), "wav", fields))
                progress.advance(1, seconds)
            infos.append(write_shard(output / name / shard_name(shard), samples))
    write_index(output / name, infos)
    if texts:
        write_transcripts(output / f"{name}-oracle.jsonl", texts)


def write_conditions(
    folder: Path, strings: list[tuple[np.ndarray, str, str]], others: list[Recording], rng: np.random.Generator
) -> None:
    """Write the strings in every condition, a shard each."""
    folder.mkdir(exist_ok=True)
    infos = []
    with Progress(f"compose {folder.name}", len(strings) * len(CONDITIONS), "utterances") as progress:
        for shard, (condition, changed) in enumerate(in_conditions(strings, others, rng)):
            samples = []
            for number, (waveform, text, speaker) in enumerate(changed):
                key, seconds = f"{condition.replace(' ', '-')}-{number:05d}", round(len(waveform) / RATE, 4)
                fields = {"seconds": seconds, "speaker": speaker, "text": text, "condition": condition}
                samples.append(Sample(key, to_wav(waveform), "wav", fields))
                progress.advance(1, seconds)
            infos.append(write_shard(folder / shard_name(shard), samples))
    write_index(folder, infos)


def main(argv: list[str] | None = None) -> int:
    """Parse and run; returns the exit status: 0, or 2 for what the user can fix."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--source", type=Path, default=Path("data_manifests/digits"), help="shards of single digits")
    parser.add_argument("--output", type=Path, required=True, help="folder of the composed sets")
    parser.add_argument("--seed", type=int, default=0, help="fixes every choice")
    for name, default in (("labelled", 7.0), ("unlabelled", 73.0), ("development", 20.0), ("test", 20.0)):
        parser.add_argument(
            f"--{name}", type=float, default=default, metavar="MINUTES", help=f"audio of the {name} set"
        )
    parser.add_argument(
        "--strings", choices=["random", "grammar"], default="random", help="whether a digit tells of the next"
    )
    arguments = parser.parse_args(argv)
    minutes = {name: getattr(arguments, name) for name in TAKES}
    try:
        for name, value in minutes.items():
            if not 0 < value < 10**6:
                raise UserError(f"--{name}: {value:g} minutes cannot be composed; give a number above 0")
        compose(arguments.source, arguments.output, minutes, arguments.seed, arguments.strings == "grammar")
    except UserError as error:
        print(f"compose: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
