"""WER and CTC loss of a learner on the development set, with its blank calibrated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import nn

from asr_kd.errors import UserError
from asr_kd.models.acoustic import Checkpoint, infer_batches
from asr_kd.shards.stream import ShardInput, load_features
from asr_kd.shards.tarset import read_index
from asr_kd.training.blank import OFFSETS, BlankCurve
from asr_kd.units import Units


@dataclass(frozen=True)
class Development:
    """Scores on the development set.

    Attributes:
        wer: of greedy decoding, with its numbers of word errors below.
        loss: CTC loss a frame, nat.
        blank_offset: subtracted from the blank's log-probability for all of these scores, nat.
        blank_share: share of the frames whose best unit is the blank.
    """

    wer: float
    loss: float
    blank_offset: float = 0.0
    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    blank_share: float = 0.0


class Scoring(Protocol):
    """Settings of a job that scores on a development set."""

    @property
    def development(self) -> str | list[str] | None: ...
    @property
    def feature_cache(self) -> str | None: ...
    @property
    def max_seconds(self) -> float: ...
    @property
    def batch_frames(self) -> int: ...
    @property
    def calibrate_blank(self) -> bool: ...


def score_development(settings: Scoring, learner: Checkpoint) -> Development:
    """WER by greedy decoding, and CTC loss a frame, on the development shards.

    References are compared as the vocabulary spells them: a spelling that it changes is no error of the network.

    With `calibrate_blank` both are scores with an offset on the blank, chosen on this same set (`BlankCurve`). If it is not
    0, the set is read a second time for the loss, which is cheaper than the loss for every offset.

    Raises:
        UserError: when an utterance of the development set cannot be read or has no text.
    """
    learner.model.eval()
    curve = BlankCurve(OFFSETS if settings.calibrate_blank else np.zeros(1))
    loss = 0.0
    for text, log_probs in _posteriors(settings, learner):
        curve.add(text, log_probs, learner.units)
        loss += _ctc(text, log_probs, learner.units, 0.0)
    point = curve.choose()
    offset = float(curve.offsets[point])
    if offset:
        loss = sum(_ctc(text, log_probs, learner.units, offset) for text, log_probs in _posteriors(settings, learner))
    substitutions, deletions, insertions = curve.errors[point].tolist()
    wer = (substitutions + deletions + insertions) / curve.words
    blanks = float(curve.blanks[point] / curve.frames)
    return Development(wer, loss / curve.frames, offset, substitutions, deletions, insertions, blanks)


def _posteriors(settings: Scoring, learner: Checkpoint) -> Iterator[tuple[str, np.ndarray]]:
    """Text and log-probabilities, float32 [frames, units], of every utterance of the development set."""
    folder, cache = settings.development, settings.feature_cache
    assert folder is not None
    wanted = ShardInput(folder=folder, features=learner.features, max_seconds=settings.max_seconds, cache=cache)
    for shard in read_index(folder):
        content = load_features(wanted, shard)
        for key, reason in content.bad:
            raise UserError(f"{folder}: {key}: {reason}; fix the development set")
        features = [item.features for item in content.items]
        for batch, answers in infer_batches(learner, features, 2 * settings.batch_frames):
            for index, log_probs in zip(batch, answers, strict=True):
                item = content.items[index]
                if "text" not in item.fields:
                    raise UserError(f"{folder}: {item.key} has no text; the development set must be labelled")
                yield learner.units.written(item.fields["text"]), log_probs


def _ctc(text: str, log_probs: np.ndarray, units: Units, offset: float) -> float:
    """CTC loss of an utterance in nat, with `offset` taken off the blank; 0 if the text does not fit into the frames."""
    rows, ids = torch.from_numpy(log_probs), units.encode(text)
    if offset:
        rows = rows.clone()
        rows[:, Units.blank] -= offset
        rows = rows.log_softmax(-1)
    value = nn.functional.ctc_loss(
        rows, torch.tensor(ids), torch.tensor([len(rows)]), torch.tensor([len(ids)]), Units.blank, "sum",
        zero_infinity=True,
    )  # fmt: skip
    return value.item()
