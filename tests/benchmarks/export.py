"""A student and its exports: size, word errors, processor time, and how long the first word takes.

    python tests/benchmarks/export.py CHECKPOINT SHARDS [--utterances 100] [--piece-ms 100]

The checkpoint is a streaming LSTM; with 8 kHz the T-one interface is measured too, on Kaldi's features zipformer2 alone, in sherpa-onnx where it is installed. Every runtime hears the same
utterances with one thread, in pieces of `--piece-ms`, as a microphone would give them; they take turns, utterance by utterance.

- `rtf`: seconds of the processor for a second of audio, front end and greedy search included: the median over utterances.
- `first word`: how much audio had arrived when the first unit of the text was known, less the time at which the checkpoint's own output has that unit (a
  frame of the recording); the median over utterances, in milliseconds. The time to compute it is not in it.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tables import print_rows

from asr_kd.audio.decode import decode
from asr_kd.audio.settings import FeatureSettings
from asr_kd.decoding.decoder import Decoder, make_decoder
from asr_kd.decoding.listening import Listener, StreamingNetwork
from asr_kd.decoding.settings import DecodingSettings
from asr_kd.decoding.wer import word_errors
from asr_kd.export.job import export
from asr_kd.export.running import Stream, session_of
from asr_kd.export.settings import ExportSettings, Interface
from asr_kd.export.sherpa import has_sherpa, online_recogniser
from asr_kd.files import read_json
from asr_kd.models.acoustic import OwnCheckpoint, load_checkpoint, stored_weights
from asr_kd.shards.tarset import read_checked, read_index
from asr_kd.text import NORMALIZERS

#: the text after each piece of a recording, and after its end
Texts = Iterator[str]
Hear = Callable[[list[np.ndarray]], Texts]


def by_torch(checkpoint: OwnCheckpoint, decoder: Decoder) -> Hear:
    def hear(pieces: list[np.ndarray]) -> Texts:
        listener = Listener(StreamingNetwork(checkpoint), decoder, "it")
        words: list[str] = []
        for piece in pieces:
            words += [word.text for word in listener.push(piece)]
            yield " ".join([*words, *(word.text for word in listener.rest())])
        yield " ".join([*words, *(word.text for word in listener.finish())])

    return hear


def by_onnxruntime(path: Path, decoder: Decoder) -> Hear:
    session = session_of(path)

    def hear(pieces: list[np.ndarray]) -> Texts:
        stream, search = Stream(session), decoder.start()
        for piece in [*pieces, pieces[0][:0]]:
            search.push(stream.push(piece[None], float(not len(piece)))[0])
            yield decoder.hypotheses(search)[0].text

    return hear


def by_sherpa(made: Any, rate: int, tail_ms: int) -> Hear:
    def hear(pieces: list[np.ndarray]) -> Texts:
        stream = made.create_stream()
        for piece in [*pieces, np.zeros(rate * tail_ms // 1000, np.float32)]:
            stream.accept_waveform(rate, piece)
            while made.is_ready(stream):
                made.decode_stream(stream)
            yield str(made.get_result(stream)).strip()

    return hear


def interfaces_of(features: FeatureSettings) -> list[Interface]:
    """Those that can be measured here."""
    if features.kind == "kaldi":
        return ["zipformer2"] if has_sherpa() else []
    return ["stream", "t-one"] if features.sample_rate == 8000 and has_sherpa() else ["stream"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("shards")
    parser.add_argument("--utterances", type=int, default=100)
    parser.add_argument("--piece-ms", type=int, default=100)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    checkpoint = load_checkpoint(asked.checkpoint)
    rate, decoder = checkpoint.features.sample_rate, make_decoder(DecodingSettings(), checkpoint)
    size = sum(weight.nbytes for weight in stored_weights(checkpoint.model, checkpoint.settings).values())
    with tempfile.TemporaryDirectory() as folder:
        runtimes: dict[str, tuple[int, Hear]] = {"checkpoint, torch": (size, by_torch(checkpoint, decoder))}
        for interface in interfaces_of(checkpoint.features):
            output = Path(folder) / interface
            values = {"checkpoint": asked.checkpoint, "output": str(output), "interface": interface, "quantize": "int8"}
            export(ExportSettings.model_validate(values))
            for name in ("model.onnx", "model.int8.onnx"):
                if interface == "stream":
                    hear, runtime = by_onnxruntime(output / name, decoder), "onnxruntime"
                else:
                    made = online_recogniser(interface, output / name, output / "tokens.txt", checkpoint.features)
                    hear = by_sherpa(made, rate, read_json(output / "export.json")["tail_ms"])
                    runtime = "sherpa-onnx"
                runtimes[f"{interface}, {name}, {runtime}"] = ((output / name).stat().st_size, hear)
        factors: dict[str, list[float]] = {name: [] for name in runtimes}
        waits: dict[str, list[float]] = {name: [] for name in runtimes}
        errors, words = dict.fromkeys(runtimes, 0), 0
        every = (one for info in read_index(asked.shards) for one in read_checked(asked.shards, info))
        for sample in itertools.islice(every, asked.utterances):
            sound, _ = decode(sample.audio, sample.key, rate, 600.0)
            pieces = np.split(sound, range(rate * asked.piece_ms // 1000, len(sound), rate * asked.piece_ms // 1000))
            reference = NORMALIZERS["basic"].apply(str(sample.fields["text"]))
            words += len(reference.split())
            network = StreamingNetwork(checkpoint)
            first = decoder(np.concatenate([network.push(sound), network.finish()]))[0].words
            for name, (_, hear) in runtimes.items():
                began, known = time.process_time(), None
                text = ""
                for number, text in enumerate(hear(pieces), 1):
                    known = number if text and known is None else known
                factors[name].append((time.process_time() - began) / (len(sound) / rate))
                if first and known:
                    waits[name].append(min(known * asked.piece_ms, 1000 * len(sound) / rate) - 1000 * first[0].start)
                errors[name] += sum(word_errors(reference, NORMALIZERS["basic"].apply(text)))
    rows = [
        {
            "what": name, "megabytes": round(held / 1e6, 3), "wer": round(errors[name] / words, 4),
            "rtf": round(statistics.median(factors[name]), 5), "first_word_ms": round(statistics.median(waits[name])),
        }
        for name, (held, _) in runtimes.items()
    ]  # fmt: skip
    print_rows(rows, asked.json)


if __name__ == "__main__":
    main()
