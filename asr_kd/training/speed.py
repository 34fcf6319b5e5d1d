"""How fast a network trains: the step alone, on random batches in memory, without loader or disk."""

from __future__ import annotations

import time

import torch

from asr_kd.audio.settings import FeatureSettings
from asr_kd.distillation.batch import Batch, Part
from asr_kd.distillation.knowledge import Pupil, Task, lesson_of
from asr_kd.distillation.settings import SourceSettings
from asr_kd.models.acoustic import build_model
from asr_kd.models.settings import ModelSettings
from asr_kd.training.distributed.exchange import Exchange
from asr_kd.training.distributed.ranks import Ranks
from asr_kd.training.settings import PhaseSettings, TrainSettings
from asr_kd.training.step import Learner, make_optimizer, step

#: units kept in a frame of the random soft targets
KEPT = 20
#: time to measure for
SECONDS = 5.0


def made_up_batch(features: FeatureSettings, num_units: int, utterances: int, frames: int) -> Batch:
    """A random batch of source 0: noise as input, and soft targets with `KEPT` units a frame.

    Args:
        num_units: size of the vocabulary, blank included.
        utterances: number of utterances.
        frames: number of frames of each.
    """
    generator = torch.Generator().manual_seed(0)
    total, kept = utterances * frames, min(KEPT, num_units)
    logits = 4 * torch.randn(total, num_units, generator=generator)
    probs, units = logits.softmax(-1).topk(kept)
    sound = torch.randn(utterances, frames, features.dimension, generator=generator)
    first, last = torch.zeros(utterances, dtype=torch.int64), torch.full((utterances,), frames)
    parts = {"soft.units": Part(units), "soft.probs": Part(probs), "soft.tail": Part(1 - probs.sum(-1))}
    return Batch(sound, last, first, last, source=0, parts=parts, seconds=total * features.frame_ms / 1000)


def step_speed(
    model: ModelSettings, features: FeatureSettings, num_units: int, device: torch.device, batch: Batch
) -> float:
    """Frames a second of the training step of a new network: forward, cross-entropy against soft targets, backward, update.

    The median of as many steps as fit into `SECONDS`, at least three, after one warm-up step.

    Args:
        num_units: size of the vocabulary, blank included.
        batch: trained on in every step, such as `made_up_batch`.
    """
    source = SourceSettings(audio="memory", targets="memory", soft=1.0)
    phase = PhaseSettings(sources=[source], passes=1)
    settings = TrainSettings(
        output="none", units="none", development="none", phases=[phase], model=model, features=features
    )
    pupil = Pupil(build_model(model, features.dimension, num_units).to(device))
    learner = Learner(settings, pupil, make_optimizer(pupil, settings), Exchange(pupil, Ranks(device=device)))
    lessons = [lesson_of(source, Task(None, features, model, settings.missing_mass))]
    times: list[float] = []
    step(learner, batch, lessons, 1e-4)
    while len(times) < 3 or sum(times) < SECONDS:
        began = time.perf_counter()
        step(learner, batch, lessons, 1e-4)  # its loss is read, so a device has finished
        times.append(time.perf_counter() - began)
    return batch.frames / sorted(times)[len(times) // 2]
