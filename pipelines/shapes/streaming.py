"""What a network costs that runs while audio arrives, frame by frame."""

from __future__ import annotations

import statistics
import time

import torch

from asr_kd.audio.features import Frontend
from asr_kd.audio.settings import FeatureSettings
from asr_kd.models.acoustic import build_model
from asr_kd.models.settings import ModelSettings

#: frames that are streamed one by one
STREAMED = 2000


@torch.inference_mode()
def streaming(model: ModelSettings, features: FeatureSettings, units: int) -> tuple[float, float]:
    """The network frame by frame, by one thread: seconds for a second of audio, and the mean of how much audio behind a frame is heard
    before it is answered for, ms."""
    network = build_model(model, features.dimension, units).eval()
    frames = torch.randn(1, STREAMED, features.dimension)
    waits: list[int] = []
    state, answered, began = None, -network.delay, time.perf_counter()
    for at in range(STREAMED):
        logits, state = network.stream(frames[:, at : at + 1], state)
        waits += [at - frame for frame in range(answered, answered + logits.shape[1]) if frame >= 0]
        answered += logits.shape[1]
    factor = (time.perf_counter() - began) / (STREAMED * features.frame_ms / 1000)
    return factor, statistics.mean(waits) * features.frame_ms + Frontend(features).overhang_ms
