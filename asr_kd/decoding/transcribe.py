"""Audio → text with a checkpoint: one recording, files, or a whole set of shards."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from asr_kd.audio.decode import decode
from asr_kd.audio.features import Frontend
from asr_kd.config import TranscribeSettings
from asr_kd.decoding.decoder import Decoder, make_decoder
from asr_kd.decoding.words import Hypothesis
from asr_kd.errors import AudioError, UserError
from asr_kd.files import place
from asr_kd.models.acoustic import Checkpoint, infer, load_checkpoint, pick_device
from asr_kd.progress import Progress
from asr_kd.shards.manifest import write_transcripts
from asr_kd.shards.stream import ShardInput, batches_by_length, load_features
from asr_kd.shards.tarset import read_index


def transcribe(
    checkpoint: Checkpoint, decoder: Decoder, data: bytes, name: str, max_seconds: float = 3600.0
) -> list[Hypothesis]:
    """What was said in one recording, the best hypothesis first.

    Args:
        data: an audio file's bytes.
        name: the recording in messages.
        max_seconds: longer audio is refused; what is shorter runs through the network in one piece.

    Raises:
        AudioError: when the recording cannot be used.
    """
    waveform, _ = decode(data, name, checkpoint.features.sample_rate, max_seconds)
    # the rounding of the training and evaluation data, so that the same audio always gives the same text
    try:
        features = Frontend(checkpoint.features).compute(waveform).astype(np.float16)
    except AudioError as error:
        raise AudioError(f"{name}: {error}") from None
    return decoder(infer(checkpoint, [features])[0])


def transcribe_files(settings: TranscribeSettings, files: Sequence[str]) -> None:
    """Print the text of each audio file, behind its name where there are several.

    Raises:
        UserError: when the checkpoint or a file cannot be used; the texts of the files before it are printed.
    """
    checkpoint = _load(settings)
    decoder = make_decoder(settings, checkpoint)
    for file in files:
        try:
            data = place(file).read_bytes()
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror or 'not there'}); check the path") from None
        text = transcribe(checkpoint, decoder, data, file, settings.max_seconds)[0].text
        print(f"{file}\t{text}" if len(files) > 1 else text, flush=True)


def transcribe_shards(settings: TranscribeSettings) -> None:
    """Write key and text of every utterance of a set of shards as JSON lines, whole or not at all.

    Utterances that cannot be read are left out and listed on stderr with their reason.

    Raises:
        UserError: when the checkpoint or the shards cannot be used, or more than `max_bad_share` could not be read.
    """
    checkpoint = _load(settings)
    decoder = make_decoder(settings, checkpoint)
    assert settings.audio is not None and settings.output is not None  # the settings hold both or neither
    shards = read_index(settings.audio)
    total = shards.samples
    wanted = ShardInput(folder=settings.audio, features=checkpoint.features, max_seconds=settings.max_seconds)
    bad: list[str] = []

    def texts() -> Iterator[tuple[str, str]]:
        with Progress("transcribe", total, "utterances") as progress:
            for shard in shards:
                loaded = load_features(wanted, shard)
                bad.extend(f"{key}: {reason}" for key, reason in loaded.bad)
                features = [item.features for item in loaded.items]
                found: dict[int, str] = {}
                for batch in batches_by_length([len(item) for item in features], settings.batch_frames):
                    for index, log_probs in zip(batch, infer(checkpoint, [features[i] for i in batch]), strict=True):
                        found[index] = decoder(log_probs)[0].text
                progress.advance(shard.samples, shard.seconds)
                yield from ((item.key, found[index]) for index, item in enumerate(loaded.items))
        for line in bad:
            print(f"left out {line}", file=sys.stderr)
        if len(bad) > settings.max_bad_share * total:
            raise UserError(
                f"{settings.audio}: {len(bad)} of {total} utterances could not be read (first: {bad[0]}); "
                "mend them or raise max_bad_share"
            )

    write_transcripts(settings.output, texts())
    print(f"{settings.output}: {total - len(bad):,} texts, {len(bad):,} utterances left out")


def _load(settings: TranscribeSettings) -> Checkpoint:
    torch.set_num_threads(settings.threads)
    return load_checkpoint(settings.checkpoint, pick_device(settings.device))
