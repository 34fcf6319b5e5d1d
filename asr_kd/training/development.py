"""How good a learner is: WER and CTC loss on the development set."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from asr_kd.config import TrainSettings
from asr_kd.decoding.greedy import greedy
from asr_kd.errors import UserError
from asr_kd.models.acoustic import Checkpoint, infer
from asr_kd.shards.stream import ShardInput, batches_by_length, load_features
from asr_kd.shards.tarset import read_index
from asr_kd.training.wer import word_errors
from asr_kd.units import Units


@dataclass
class Development:
    """Scores on the development set."""

    wer: float
    loss: float


def score_development(settings: TrainSettings, learner: Checkpoint) -> Development:
    """WER by greedy decoding, and CTC loss a frame, on the development shards.

    References are compared as the units write them: what only they change is no error of the network.

    Raises:
        UserError: when an utterance of the development set has no text or cannot be read.
    """
    learner.model.eval()
    errors = words = frames = 0
    loss = 0.0
    wanted = ShardInput(
        folder=settings.development,
        features=settings.features,
        max_seconds=settings.max_seconds,
        cache=settings.feature_cache,
    )
    for shard in read_index(settings.development):
        content = load_features(wanted, shard)
        if content.bad:
            raise UserError(
                f"{settings.development}: {content.bad[0][0]}: {content.bad[0][1]}; mend the development set"
            )
        for positions in batches_by_length([len(item.features) for item in content.items], 2 * settings.batch_frames):
            items = [content.items[index] for index in positions]
            for item, log_probs in zip(items, infer(learner, [item.features for item in items]), strict=True):
                if "text" not in item.fields:
                    raise UserError(
                        f"{settings.development}: {item.key} has no text; the development set must be labelled"
                    )
                reference = learner.units.written(item.fields["text"])
                errors += word_errors(reference, learner.units.decode(greedy(log_probs)))
                words += len(reference.split())
                ids = learner.units.encode(item.fields["text"])
                value = nn.functional.ctc_loss(
                    torch.from_numpy(log_probs), torch.tensor(ids), torch.tensor([len(log_probs)]), torch.tensor([len(ids)]),
                    Units.blank, "sum", zero_infinity=True,
                )  # fmt: skip
                loss += value.item()
                frames += len(log_probs)
    if not words:
        raise UserError(f"{settings.development}: holds no words; the development set must be labelled")
    return Development(errors / words, loss / frames)
