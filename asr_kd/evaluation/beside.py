"""What may run beside the network: audio → its input, its output → words. Without torch, so that a process for it starts at once."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from asr_kd.audio.decode import decode
from asr_kd.audio.features import Frontend
from asr_kd.audio.settings import FeatureSettings
from asr_kd.decoding.decoder import Decoder
from asr_kd.decoding.words import Hypothesis
from asr_kd.errors import AudioError, UserError
from asr_kd.evaluation.parts import Shard
from asr_kd.shards.tarset import read_checked


@dataclass
class Utterance:
    """A test utterance: features float16 [frames, inputs] by front end, its text, what its shard says, its seconds."""

    key: str
    features: dict[str, np.ndarray]
    text: str
    fields: dict[str, Any]
    seconds: float


@dataclass
class Loaded:
    """A shard's utterances as network input, in its order.

    Attributes:
        quarantined: those that a front end could not read, key → reason.
        frontend_seconds: by front end.
    """

    shard: Shard
    utterances: list[Utterance]
    quarantined: dict[str, str]
    frontend_seconds: dict[str, float]


@dataclass
class Batch:
    """Posteriors float32 [frames, units] of some utterances of the present shard, by the system of this number."""

    system: int
    places: list[int]
    log_probs: list[np.ndarray]


@dataclass
class Answers:
    """The same, as words."""

    system: int
    places: list[int]
    found: list[Hypothesis]
    seconds: float


def load_shard(frontends: dict[str, FeatureSettings], max_seconds: float, shard: Shard) -> Loaded:
    """Decode a shard's audio and compute the features of every front end, timed.

    Raises:
        UserError: when the shard is damaged, holds more or less than its index says, or an utterance has no text.
    """
    loaded = Loaded(shard, [], {}, dict.fromkeys(frontends, 0.0))
    built = {name: Frontend(features) for name, features in frontends.items()}
    for sample in read_checked(shard.folder, shard.info):
        text = sample.fields.get("text")
        if not isinstance(text, str):
            raise UserError(
                f"{shard}: {sample.key} has no text; a WER needs labelled audio: prepare the shards from a manifest with texts"
            )
        features: dict[str, np.ndarray] = {}
        seconds = 0.0
        try:
            for name, frontend in built.items():
                rate = frontend.settings.sample_rate
                waveform, _ = decode(sample.audio, sample.key, rate, max_seconds)
                began = time.perf_counter()
                # rounded as in training
                features[name] = frontend.compute(waveform)
                loaded.frontend_seconds[name] += time.perf_counter() - began
                seconds = len(waveform) / rate
        except AudioError as error:
            loaded.quarantined[sample.key] = str(error)
            continue
        loaded.utterances.append(Utterance(sample.key, features, text, sample.fields, seconds))
    held = len(loaded.utterances) + len(loaded.quarantined)
    if held != shard.info.samples:
        raise UserError(
            f"{shard}: index.json counts {shard.info.samples} utterances, the shard holds {held}; prepare the shards again"
        )
    return loaded


def find_words(decoders: Sequence[Decoder], batch: Batch | None) -> Answers | None:
    """The best hypotheses of a batch by the decoder of its system, timed; None, which ends a shard, is passed on."""
    if batch is None:
        return None
    began = time.perf_counter()
    found = [decoders[batch.system](log_probs)[0] for log_probs in batch.log_probs]
    return Answers(batch.system, batch.places, found, time.perf_counter() - began)
