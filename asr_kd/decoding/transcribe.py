"""Audio → text with a checkpoint: one recording, files, a whole set of shards, or audio as it arrives."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from asr_kd.audio.decode import decode, read_blocks
from asr_kd.audio.live import microphone_sound, pipe_sound
from asr_kd.audio.parts import named
from asr_kd.audio.waveform import from_array
from asr_kd.config.base import folders_of
from asr_kd.decoding.decoder import Decoder, make_decoder
from asr_kd.decoding.listening import Listener, StreamingNetwork, check_streams, listen, whole
from asr_kd.decoding.pseudo_labels import label_texts, transcribe_file, transcriber_of
from asr_kd.decoding.recordings import fetched, hypotheses, of_file
from asr_kd.decoding.settings import TranscribeSettings
from asr_kd.decoding.words import Hypothesis, Token, Word
from asr_kd.errors import UserError
from asr_kd.files import Place, place, write_whole
from asr_kd.models.acoustic import Checkpoint, infer_batches, pick_device
from asr_kd.models.teachers import load_teacher
from asr_kd.progress import Progress
from asr_kd.shards.index import ShardList
from asr_kd.shards.keys import check_keys
from asr_kd.shards.quarantine import Quarantine
from asr_kd.shards.stream import ShardInput, load_features
from asr_kd.shards.tarset import INDEX, read_index
from asr_kd.summary import tell_summary


def transcribe(
    checkpoint: Checkpoint,
    decoder: Decoder,
    data: bytes | tuple[np.ndarray, int],
    name: str,
    max_seconds: float = 3600.0,
) -> list[Hypothesis]:
    """Transcribe one recording; the best hypothesis first.

    Args:
        data: an audio file's bytes; or an array, [samples] or [samples, channels], and its rate in Hz (`from_array`).
        name: of the recording, for messages.
        max_seconds: longer audio is refused.

    Raises:
        AudioError: when the recording cannot be used.
    """
    rate = checkpoint.features.sample_rate
    if isinstance(data, tuple) and len(data) == 2:
        waveform = from_array(*data, rate, name)
    else:
        waveform, _ = decode(data, name, rate, max_seconds)
    with named(name):
        return decoder(whole(checkpoint, waveform))


def transcribe_long(checkpoint: Checkpoint, decoder: Decoder, path: Path, name: str, window: float) -> Iterator[Word]:
    """The words of a local recording of any length, in bounded memory.

    Args:
        name: of the recording, for messages.
        window: seconds processed at once by a model that needs whole utterances (`WindowedNetwork`).

    Raises:
        AudioError: when the recording cannot be used.
    """
    blocks = read_blocks(path, name, checkpoint.features.sample_rate)
    yield from listen(checkpoint, decoder, blocks, name, window)


def transcribe_files(settings: TranscribeSettings, files: Sequence[str]) -> None:
    """Print the text of each audio file, after its name if there are several; with `details`, JSON lines with times and scores.

    A UserError for files that cannot be used follows the texts of the others.
    """
    hear = _hearer(settings)
    failed: list[UserError] = []
    for file in files:
        try:
            with fetched(file) as path:
                found = hear(path, file)
        except UserError as error:
            failed.append(error)
            if len(files) > 1:
                print(error, file=sys.stderr)
            continue
        if settings.details:
            print(_json({"file": file, **found}), flush=True)
        else:
            print(f"{file}\t{found['text']}" if len(files) > 1 else found["text"], flush=True)

    bad = len(failed)
    tell_summary(utterances=len(files), done=len(files) - bad, quarantined=bad)
    if failed and len(files) > 1:
        raise UserError(f"{len(failed)} of {len(files)} files could not be transcribed; their reasons stand above")
    if failed:
        raise failed[0]


def _hearer(settings: TranscribeSettings) -> Callable[[Path, str], dict[str, Any]]:
    """What hears a local file, of some name: its text and what else is known, as a JSON value."""
    if transcriber := transcriber_of(settings):
        return functools.partial(transcribe_file, transcriber)
    checkpoint, decoder = _load(settings)
    rate, window = checkpoint.features.sample_rate, settings.window_seconds

    def hear(path: Path, name: str) -> dict[str, Any]:
        recording = of_file(path, name, rate, window)
        return details(hypotheses(checkpoint, decoder, recording, window, settings.segment))

    return hear


def transcribe_stream(settings: TranscribeSettings, source: str) -> None:
    """Print words as audio arrives from a file, standard input (`-`) or the `microphone`, and the text at the end.

    A line for each word as soon as it is recognised, and again when it changes; with `details`, JSON lines.
    """
    transcriber_of(settings)  # those that cannot stream say so
    checkpoint, decoder = _load(settings, stream=True)
    rate, piece = checkpoint.features.sample_rate, settings.piece_ms / 1000
    if settings.raw_rate and source != "-":
        raise UserError(f"raw_rate: {source} is not raw sound on standard input (-); leave it out")
    name = source
    if source == "-":
        name = "standard input"
        if sys.stdin is None:
            raise UserError("standard input: is closed; pipe sound in, or give a file")
        sound = _until_interrupted(pipe_sound(sys.stdin.buffer, name, rate, settings.raw_rate, piece))
    elif source == "microphone":
        sound = _until_interrupted(microphone_sound(rate, piece))
    else:
        sound = _file_sound(source, rate, piece)
    _print_stream(follow(Listener(StreamingNetwork(checkpoint), decoder, name), sound, rate), settings.details)


def _until_interrupted(sound: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Ctrl-C ends the recording."""
    with contextlib.suppress(KeyboardInterrupt):
        yield from sound


def _file_sound(file: str, rate: int, piece: float) -> Iterator[np.ndarray]:
    with fetched(file) as path:
        yield from read_blocks(path, file, rate, piece)


@dataclass
class Known:
    """A word so far.

    Attributes:
        heard: seconds of audio that had arrived when its present text was first known.
        seconds: time to compute it then.
    """

    word: Word
    heard: float
    seconds: float


def follow(listener: Listener, sound: Iterable[np.ndarray], rate: int) -> Iterator[tuple[str, Known]]:
    """Events as words become known while audio arrives, in pieces float32 [samples] at `rate` Hz.

    Yields pairs of an event and a word: `new`, `changed` (the text of the word in this position), `gone`, and `final`, after
    which it cannot change. The words of the `final` events, joined, are the text.
    """
    known: list[Known] = []  # of the words that are not final
    heard = 0.0
    for piece in itertools.chain(sound, [None]):
        began = time.perf_counter()
        if piece is None:
            settled, rest = listener.finish(), []
        else:
            heard += len(piece) / rate
            settled, rest = listener.push(piece), listener.rest()
        seconds = time.perf_counter() - began
        now = settled + rest
        for index, word in enumerate(now):
            if index == len(known):
                known.append(Known(word, heard, seconds))
                yield "new", known[index]
            elif known[index].word.text != word.text:
                known[index] = Known(word, heard, seconds)
                yield "changed", known[index]
            else:
                known[index].word = word  # its times and confidence may have moved
        for gone in known[len(now) :]:
            yield "gone", gone
        for final in known[: len(settled)]:
            yield "final", final
        known = known[len(settled) : len(now)]


def _print_stream(events: Iterable[tuple[str, Known]], as_json: bool) -> None:
    texts: list[str] = []
    times: list[tuple[float, float]] = []
    for event, known in events:
        word, latency = known.word, known.heard - known.word.end
        if event == "final":
            texts.append(word.text)
            times.append((latency, known.seconds))
        if as_json:
            line = {"event": event, "heard": round(known.heard, 3), **_word(word)}
            print(_json({**line, "latency": round(latency, 3), "compute": round(known.seconds, 6)}), flush=True)
        elif event != "final":
            mark = {"new": " ", "changed": "~", "gone": "-"}[event]
            print(
                f"{known.heard:9.2f} s {mark} {word.text:<20} {word.start:.2f}-{word.end:.2f} s  "
                f"confidence {word.confidence:.2f}  after {1000 * latency:.0f} ms + {1000 * known.seconds:.1f} ms",
                flush=True,
            )
    text = " ".join(texts)
    print(_json({"event": "end", "text": text}) if as_json else text, flush=True)
    if texts:
        known_after, computed = map(_typical, zip(*times, strict=True))
        print(
            f"{len(texts)} words, known {known_after} after their end in the sound, computed in {computed}",
            file=sys.stderr,
        )


def _typical(seconds: Sequence[float]) -> str:
    tenths = statistics.quantiles(seconds, n=10, method="inclusive") if len(seconds) > 1 else seconds
    return f"{1000 * statistics.median(seconds):.1f} ms (90 % within {1000 * tenths[-1]:.1f} ms)"


def transcribe_shards(settings: TranscribeSettings) -> None:
    """Write key and text of every utterance of a set of shards as JSON lines, atomically.

    Utterances that cannot be read are left out and listed on stderr with their reason; a UserError when they are more than
    `max_bad_share`. A Whisper or Moonshine model writes more, see `label_texts`.
    """
    if transcriber := transcriber_of(settings):
        label_texts(settings, transcriber, *_set_and_output(settings))
        return
    checkpoint, decoder = _load(settings)
    shards, output = _set_and_output(settings)
    assert settings.audio is not None
    total = shards.samples
    wanted = ShardInput(folder=settings.audio, features=checkpoint.features, max_seconds=settings.max_seconds)
    bad = Quarantine(total, settings.max_bad_share, "read")

    seconds = 0.0
    with write_whole(output, "w") as file:
        with Progress("transcribe", total, "utterances") as progress:
            for shard in shards:
                loaded = load_features(wanted, shard)
                for key, reason in loaded.bad:
                    bad.add(key, reason)
                    print(f"left out {key}: {reason}", file=sys.stderr)
                features = [item.features for item in loaded.items]
                found: dict[int, list[Hypothesis]] = {}
                for batch, answers in infer_batches(checkpoint, features, settings.batch_frames):
                    found |= zip(batch, map(decoder, answers), strict=True)
                progress.advance(shard.samples, shard.seconds)
                seconds += sum(item.seconds for item in loaded.items)
                for index, item in enumerate(loaded.items):
                    best: dict[str, Any] = {"text": found[index][0].text}
                    if settings.nbest > 1:
                        best["nbest"] = [{"text": one.text, "score": one.score} for one in found[index]]
                    file.write(_json({"key": item.key, **(details(found[index]) if settings.details else best)}) + "\n")
        bad.refuse(str(settings.audio))
    tell_summary(output, utterances=total, done=total - bad.count, quarantined=bad.count, audio_hours=seconds / 3600)
    print(f"{settings.output}: {total - bad.count:,} texts, {bad.count:,} utterances left out")


def _set_and_output(settings: TranscribeSettings) -> tuple[ShardList, Place]:
    """The shards, which hold something, and a file that is none of theirs."""
    assert settings.audio is not None and settings.output is not None  # the settings hold both or neither
    shards = read_index(settings.audio)
    output = place(settings.output)
    indexes = [place(folder) / INDEX for folder in folders_of(settings.audio)]
    files = (*indexes, *(shard.at(settings.audio) for shard in shards))
    if output.exists() and any(_same(output, one) for one in files):
        raise UserError(f"output: {output} belongs to the audio set; name another file")
    if not shards.samples:
        raise UserError(f"{settings.audio}: holds no utterances; prepare audio shards with some")
    check_keys(settings.audio, shards, f"output {output}")
    return shards, output


def _same(one: Place, other: Place) -> bool:
    """Whether two names refer to one file."""
    return one.resolve() == other.resolve() if isinstance(one, Path) and isinstance(other, Path) else one == other


def details(found: Sequence[Hypothesis]) -> dict[str, Any]:
    """Text and words of the best hypothesis, and of all with their scores (but of a long recording), as a JSON value."""

    every = [{"text": one.text, "words": [_word(word) for word in one.words], "score": one.score} for one in found]
    best = {name: every[0][name] for name in ("text", "words")}
    return best if np.isnan(found[0].score) else {**best, "nbest": every}


def _word(word: Word) -> dict[str, Any]:
    """A word and its tokens, with times and confidences, as a JSON value."""
    tokens = [{"token": token.piece, **_times(token)} for token in word.tokens]
    return {"word": word.text, **_times(word), "tokens": tokens}


def _times(one: Word | Token) -> dict[str, float]:
    return {"start": round(one.start, 3), "end": round(one.end, 3), "confidence": round(one.confidence, 4)}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _load(settings: TranscribeSettings, stream: bool = False) -> tuple[Checkpoint, Decoder]:
    torch.set_num_threads(settings.threads)
    checkpoint = load_teacher(settings.checkpoint, pick_device(settings.device), settings.precision)
    if stream:  # before a language model is read
        check_streams(checkpoint, settings.checkpoint, "--stream")
    return checkpoint, make_decoder(settings, checkpoint)
