"""What may run beside the network: audio → its input, its output → words. Without torch, so that a process for it starts at once."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from asr_kd.audio.settings import InputSettings
from asr_kd.decoding.decoder import Decoder
from asr_kd.decoding.words import Hypothesis
from asr_kd.errors import UserError
from asr_kd.evaluation.parts import Shard
from asr_kd.shards.stream import ShardInput, load_features


@dataclass
class Utterance:
    """A test utterance: network input by front end, its text, what its shard says, its seconds."""

    key: str
    features: dict[str, np.ndarray]
    text: str
    fields: dict[str, Any]
    seconds: float


@dataclass
class Inputs:
    """A shard's utterances as network input, in its order."""

    shard: Shard
    utterances: list[Utterance]
    quarantined: dict[str, str]  # those that a front end could not read, key → reason
    frontend_seconds: dict[str, float]


@dataclass
class Posteriors:
    """What the system of this number makes of some utterances of the present shard."""

    system: int
    indices: list[int]
    log_probs: list[np.ndarray]  # float32 [frames, units] of each


def load_shard(frontends: dict[str, InputSettings], max_seconds: float, shard: Shard) -> Inputs:
    """Decode a shard's audio and compute its features, once for every front end.

    Raises:
        UserError: when the shard is damaged, holds more or less than its index says, or an utterance has no text.
    """
    read = {
        name: load_features(ShardInput(folder=shard.folder, features=features, max_seconds=max_seconds), shard.info)
        for name, features in frontends.items()
    }
    quarantined = {key: reason for one in read.values() for key, reason in one.bad}
    seconds = {name: one.frontend_seconds for name, one in read.items()}
    loaded = Inputs(shard, [], quarantined, seconds)
    items = [{item.key: item for item in one.items} for one in read.values()]
    for key, last in items[-1].items():
        if key in quarantined:
            continue
        text = last.fields.get("text")
        if not isinstance(text, str):
            raise UserError(
                f"{shard}: {key} has no text; a WER needs labelled audio: prepare the shards from a manifest with texts"
            )
        features = {name: one[key].features for name, one in zip(read, items, strict=True)}
        loaded.utterances.append(Utterance(key, features, text, last.fields, last.seconds))
    held = len(loaded.utterances) + len(quarantined)
    if held != shard.info.samples:
        raise UserError(
            f"{shard}: index.json counts {shard.info.samples} utterances, the shard holds {held}; prepare the shards again"
        )
    return loaded


def find_words(
    decoders: Sequence[Decoder], batch: Posteriors | None
) -> tuple[int, dict[int, Hypothesis], float] | None:
    """System, best hypotheses by utterance and seconds of a batch; None, which ends a shard, is passed on."""
    if batch is None:
        return None
    began = time.perf_counter()
    found = [decoders[batch.system](log_probs)[0] for log_probs in batch.log_probs]
    seconds = time.perf_counter() - began
    return batch.system, dict(zip(batch.indices, found, strict=True)), seconds
