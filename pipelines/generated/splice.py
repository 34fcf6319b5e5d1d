"""Utterances joined from words of other utterances: more audio from few recordings, with text.

    python pipelines/generated/splice.py --audio runs/mine/data/labelled --alignment runs/mine/alignment-labelled \
        --units runs/mine/units --minutes 18 --output runs/mine/spliced

Each recording is cut between its words, where it is quietest between the last spike of a word and the first one of the next, as a forced
alignment (`asr-kd label mode=alignment`) has them. Words of one speaker are joined in any order, as many as the recordings have; each
is used about equally often.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from asr_kd.audio.decode import decode, encode
from asr_kd.errors import UserError
from asr_kd.files import claim_folder
from asr_kd.shards.tarset import Sample, read_checked, read_index, shard_name, write_index, write_shard
from asr_kd.targets.store import check_answers, read_target_shard
from asr_kd.units import Units, load_units

MAX_SECONDS, SHARDS = 60.0, 2
#: over which the loudness is measured
QUIET_MS = 20


@dataclass
class Word:
    """A stretch of a recording: float32 [samples]."""

    waveform: np.ndarray
    text: str


def spans(path: Sequence[int], units: Units) -> list[tuple[int, int]]:
    """Of each word the frames in which its first and its last unit begin, of an alignment's unit in each frame."""
    found: list[tuple[int, int]] = []
    for unit, frames in itertools.groupby(range(len(path)), key=lambda frame: path[frame]):
        begin = next(frames)
        if unit == units.blank:
            continue
        if units.starts_word(unit) or not found:
            found.append((begin, begin))
        else:
            found[-1] = found[-1][0], begin
    return found


def quietest(waveform: np.ndarray, begin: int, end: int, width: int) -> int:
    """The sample between two others around which so many are quietest."""
    first, last = max(0, begin - width // 2), min(len(waveform), max(end, begin + 1) + width // 2)
    loudness = np.convolve(waveform[first:last].astype(np.float64) ** 2, np.ones(min(width, last - first)), "valid")
    return first + int(loudness.argmin()) + width // 2


def words_of(
    waveform: np.ndarray, rate: int, path: Sequence[int], frame_ms: int, text: str, units: Units
) -> list[Word]:
    """The words of a recording; none if its alignment has another number of them than its text.

    Args:
        waveform: float32 [samples].
        rate: Hz.
        path: the alignment's unit in each frame.
        frame_ms: length of a frame.
        text: what is said.
        units: of the alignment.
    """
    found, said, width = spans(path, units), text.split(), rate * QUIET_MS // 1000
    if len(found) != len(said):
        return []
    between = [
        quietest(waveform, one * frame_ms * rate // 1000, other * frame_ms * rate // 1000, width)
        for (_, one), (other, _) in itertools.pairwise(found)
    ]
    edges = [0, *between, len(waveform)]
    return [Word(waveform[begin:end], word) for (begin, end), word in zip(itertools.pairwise(edges), said, strict=True)]


def read_words(audio: str, alignment: str, units: Units) -> tuple[dict[str, list[Word]], list[int], int]:
    """The words of each speaker, how many words each recording has, and the sample rate."""
    words: dict[str, list[Word]] = {}
    lengths: list[int] = []
    rates: set[int] = set()
    for info in read_index(audio):
        metadata, pairs = read_target_shard(Path(alignment) / info.name, units.hash, units.size)
        check_answers(Path(alignment) / info.name, metadata, f"{audio}/{info.name}", info.sha256)
        paths = {key: target.units[target.starts].tolist() for key, target in pairs}
        for sample in read_checked(audio, info):
            if sample.key not in paths:
                continue
            waveform, rate = decode(sample.audio, sample.key, None, MAX_SECONDS)
            rates.add(rate)
            found = words_of(
                waveform, rate, paths[sample.key], metadata.frame_ms, str(sample.fields.get("text", "")), units
            )
            if found:
                words.setdefault(str(sample.fields.get("speaker", "")), []).extend(found)
                lengths.append(len(found))
    if len(rates) != 1:
        raise UserError(
            f"{audio}: holds no recording that could be cut into words, or some of several rates ({sorted(rates)}); label it with "
            "mode=alignment, and prepare it with one sample_rate"
        )
    return words, lengths, rates.pop()


def joined(
    words: dict[str, list[Word]], lengths: Sequence[int], samples: int, rng: np.random.Generator
) -> Iterator[tuple[np.ndarray, str, str]]:
    """Waveform, text and speaker of utterances of so many samples together."""
    decks: dict[str, list[Word]] = {speaker: [] for speaker in sorted(words)}
    for speaker in itertools.cycle(decks):
        if samples <= 0:
            return
        chosen = []
        for _ in range(int(rng.choice(lengths))):
            deck = decks[speaker]
            if not deck:
                deck.extend(words[speaker][index] for index in rng.permutation(len(words[speaker])))
            chosen.append(deck.pop())
        waveform = np.concatenate([word.waveform for word in chosen])
        samples -= len(waveform)
        yield waveform, " ".join(word.text for word in chosen), speaker


def splice(arguments: argparse.Namespace) -> None:
    """Write the shards; the same input gives the same bytes."""
    output, units = Path(arguments.output), load_units(arguments.units)
    source = [shard.sha256 for shard in read_index(arguments.audio)]
    aligned = sorted(path.name for path in Path(arguments.alignment).glob("*.tar"))
    settings = {"source": source, "aligned": aligned, "minutes": arguments.minutes, "seed": arguments.seed}
    claim_folder(output, "splice", settings)
    words, lengths, rate = read_words(arguments.audio, arguments.alignment, units)
    rng = np.random.default_rng([arguments.seed, 7])
    made = list(joined(words, lengths, int(arguments.minutes * 60 * rate), rng))
    infos = []
    for shard in range(SHARDS):
        samples = []
        for number in range(shard * len(made) // SHARDS, (shard + 1) * len(made) // SHARDS):
            waveform, text, speaker = made[number]
            fields = {"seconds": round(len(waveform) / rate, 4), "text": text, "speaker": speaker}
            samples.append(Sample(f"spliced-{number:05d}", encode(waveform, rate, "WAV", "PCM_16"), "wav", fields))
        infos.append(write_shard(output / shard_name(shard), samples))
    write_index(output, infos)
    total = read_index(arguments.audio).samples
    left_out = (
        f"; the alignment of {total - len(lengths):,} has other words than their text" if total > len(lengths) else ""
    )
    print(
        f"{output}: {len(made):,} utterances from {sum(map(len, words.values())):,} words of {len(lengths):,} of {total:,} recordings{left_out}"
    )


def main(argv: list[str] | None = None) -> int:
    """Parse and run; returns the exit status: 0, or 2 for what the user can fix."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--audio", required=True, help="labelled audio shards")
    parser.add_argument("--alignment", required=True, help="their alignment (label mode=alignment)")
    parser.add_argument("--units", required=True, help="folder of the units")
    parser.add_argument("--output", required=True, help="folder of the shards")
    parser.add_argument("--minutes", type=float, required=True, help="of audio to make")
    parser.add_argument("--seed", type=int, default=0, help="fixes every choice")
    arguments = parser.parse_args(argv)
    try:
        if not 0 < arguments.minutes < 10**6:
            raise UserError(f"--minutes: {arguments.minutes:g} minutes cannot be made; give a number above 0")
        splice(arguments)
    except UserError as error:
        print(f"splice: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
