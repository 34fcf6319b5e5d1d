from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from asr_kd.models import acoustic
from asr_kd.models.acoustic import Checkpoint, blank_held_back, build_model
from asr_kd.training.development import score_development
from asr_kd.training.settings import TrainSettings
from asr_kd.units import Units

Job = Callable[..., TrainSettings]

#: the words of the development set, each letter between gaps
TEXTS = ["ab", "b", "baa"]


@pytest.fixture
def hesitant(job: Job, units: Units, monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
    """A network that knows every letter but puts the blank 0.6 nat before each, in every second frame, and 3 nat before it elsewhere."""
    settings = job()

    def posteriors(checkpoint: Checkpoint, batch: list[np.ndarray]) -> list[torch.Tensor]:
        bias = checkpoint.model.output.bias[0].item()
        found = []
        for one in batch:
            text = min(TEXTS, key=lambda text: abs(len(one) - 8 * (2 * len(text) + 1)))
            logits = np.zeros((len(one), units.size))
            logits[:, units.blank] = 3.0 + bias
            for place, unit in enumerate(units.encode(text)):
                logits[2 * place, :] = -9.0
                logits[2 * place, unit], logits[2 * place, units.blank] = 0.0, 0.6 + bias
            found.append(torch.from_numpy(logits).float().log_softmax(-1))
        return found

    monkeypatch.setattr(acoustic, "log_posteriors", posteriors)
    model = build_model(settings.model, settings.features.dimension, units.size)
    torch.nn.init.zeros_(model.output.bias)
    return Checkpoint(model, units, settings.features, settings.model, "")


def test_a_network_that_hesitates_is_scored_without_its_hesitation(job: Job, hesitant: Checkpoint) -> None:
    plain = score_development(job(calibrate_blank=False), hesitant)
    assert (plain.wer, plain.deletions, plain.blank_offset, plain.blank_share) == (1.0, 3, 0.0, 1.0)
    scores = score_development(job(), hesitant)
    assert (scores.wer, scores.substitutions, scores.deletions, scores.insertions) == (0.0, 0, 0, 0)
    assert 0.6 < scores.blank_offset < 3.0 and 0.5 < scores.blank_share < 1.0
    assert scores.loss != plain.loss


def test_the_loss_is_that_of_the_checkpoint_that_is_written(job: Job, hesitant: Checkpoint) -> None:
    scores = score_development(job(), hesitant)
    with blank_held_back(hesitant.model, scores.blank_offset):
        written = score_development(job(calibrate_blank=False), hesitant)
        again = score_development(job(), hesitant)
    assert written.wer == scores.wer and written.blank_share == scores.blank_share
    assert written.loss == pytest.approx(scores.loss, rel=1e-6)
    assert again.blank_offset == 0.0 and again == written
