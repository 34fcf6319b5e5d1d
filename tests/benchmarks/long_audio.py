"""One long recording against its utterances: python tests/benchmarks/long_audio.py CHECKPOINT AUDIO [--hours 1] [--json]

The utterances of AUDIO (a folder of labelled shards) are joined, in random order and again and again, into one FLAC of so many
hours, which is transcribed in bounded memory as `asr-kd transcribe` does. Beside it the WER of the recording heard at once, in
memory without bounds (the difference is what seams do), and of the same utterances one by one. `--by-speaker` joins each
speaker's utterances behind each other.
"""

from __future__ import annotations

import argparse
import io
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile
import torch
from tables import print_rows

from asr_kd.audio.decode import decode
from asr_kd.audio.features import Frontend
from asr_kd.config.load import build, override
from asr_kd.decoding.decoder import make_decoder
from asr_kd.decoding.settings import DecodingSettings
from asr_kd.decoding.transcribe import transcribe, transcribe_long
from asr_kd.evaluation.wer import count_errors
from asr_kd.files import place
from asr_kd.models.acoustic import infer, load_checkpoint
from asr_kd.shards.tarset import read_index, read_shard


def endless(count: int) -> Iterator[int]:
    rng = np.random.default_rng(0)
    while True:
        yield from rng.permutation(count).tolist()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint")
    parser.add_argument("audio")
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--window", type=float, default=60.0)
    parser.add_argument("--decoder", default="decoder=greedy", help="settings of the decoder, with commas")
    parser.add_argument("--by-speaker", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    checkpoint = load_checkpoint(arguments.checkpoint)
    decoder = make_decoder(build(DecodingSettings, override({}, arguments.decoder.split(",")), "decoder"), checkpoint)
    folder = place(arguments.audio)
    samples = [sample for shard in read_index(folder) for sample in read_shard(folder / shard.name)]
    single = [transcribe(checkpoint, decoder, sample.audio, sample.key)[0].text for sample in samples]
    sounds = [soundfile.read(io.BytesIO(sample.audio), dtype="int16")[0] for sample in samples]
    rate = soundfile.info(io.BytesIO(samples[0].audio)).samplerate
    seconds, order = 0.0, []
    for index in endless(len(samples)):
        order.append(index)
        seconds += len(sounds[index]) / rate
        if seconds >= 3600 * arguments.hours:
            break
    if arguments.by_speaker:
        order.sort(key=lambda index: str(samples[index].fields.get("speaker")))
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "long.flac"
        with soundfile.SoundFile(path, "w", rate, 1, "PCM_16") as file:
            for index in order:
                file.write(sounds[index])
        before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        words = list(transcribe_long(checkpoint, decoder, path, "long.flac", arguments.window))
        spent, after = time.process_time() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        waveform, _ = decode(path.read_bytes(), "long.flac", checkpoint.features.sample_rate, 1e9)
    features = Frontend(checkpoint.features).compute(waveform)
    at_once = decoder(infer(checkpoint, [features])[0])[0].text
    reference = " ".join(samples[index].fields["text"] for index in order)
    long = count_errors(reference, " ".join(word.text for word in words))
    short = [count_errors(samples[index].fields["text"], single[index]) for index in order]
    row = {
        "order": "by speaker" if arguments.by_speaker else "random",
        "decoder": arguments.decoder,
        "hours": round(seconds / 3600, 3),
        "words": long.words,
        "wer_long": round(100 * long.rate, 2),
        "wer_at_once": round(100 * count_errors(reference, at_once).rate, 2),
        "words_changed_by_seams": count_errors(at_once, " ".join(word.text for word in words)).errors,
        "wer_utterances": round(100 * sum(one.errors for one in short) / sum(one.words for one in short), 2),
        "memory_added_mib": round((after - before) / 1024, 1),
        "real_time_factor": round(spent / seconds, 4),
    }
    print_rows([row], arguments.json)


if __name__ == "__main__":
    main()
