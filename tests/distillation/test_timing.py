from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from asr_kd.distillation.batch import Part
from asr_kd.distillation.knowledge import Seen
from asr_kd.distillation.timing import best_delay, later, near_speech
from asr_kd.training.batches import PhaseStream
from asr_kd.training.settings import TrainSettings
from asr_kd.training.trainer import train
from asr_kd.units import Units
from tests.learning import loss_of
from tests.training.test_knowledge import files

Job = Callable[..., TrainSettings]


def seen_of(best: list[list[int]], sure: float = 0.98) -> Seen:
    """Utterances of these best units a frame; the rest of the mass was not kept."""
    lengths = torch.tensor([len(one) for one in best])
    learned = torch.arange(int(lengths.max()))[None, :] < lengths[:, None]
    units = torch.tensor([unit for one in best for unit in one])[:, None]
    rest = torch.full((len(units),), 1 - sure)
    parts = {"soft.units": Part(units), "soft.probs": Part(torch.full(units.shape, sure)), "soft.tail": Part(rest)}
    return Seen(torch.zeros(*learned.shape, 4), lengths, learned, parts, {}, {})


def marked(mask: Tensor, seen: Seen) -> list[str]:
    return ["".join("x" if one else "." for one in row) for row in mask.split(seen.lengths.tolist())]


def test_frames_near_speech_stay_within_their_utterance() -> None:
    seen = seen_of([[0, 0, 0, 1, 0, 0, 0], [2, 0, 0, 0], [0, 0], [0, 0, 3]])
    assert marked(near_speech(seen, 0, 0), seen) == ["...x...", "x...", "..", "..x"]
    assert marked(near_speech(seen, 2, 1), seen) == [".xxxx..", "xx..", "..", "xxx"]
    assert marked(near_speech(seen, 0, 9), seen) == ["...xxxx", "xxxx", "..", "..x"]
    unsure = seen_of([[0, 0, 0]], sure=0.8)  # a fifth of the mass is on units that were not kept
    assert marked(near_speech(unsure, 0, 0), unsure) == ["xxx"]


def test_targets_are_moved_within_their_utterance() -> None:
    seen = seen_of([[1, 0, 2, 0], [3, 0], [1]])
    moved = later(seen, 1).parts
    assert moved["soft.units"].values[:, 0].tolist() == [1, 1, 0, 2, 3, 3, 1]
    assert later(seen, 9).parts["soft.units"].values[:, 0].tolist() == [1, 1, 1, 1, 3, 3, 1]
    torch.testing.assert_close(later(seen, 0).parts["soft.units"].values, seen.parts["soft.units"].values)


def test_the_best_delay_of_each_utterance_or_a_soft_minimum() -> None:
    losses = torch.tensor([[1.0, 1.0, 5.0], [2.0, 2.0, 1.0]], dtype=torch.float64, requires_grad=True)
    utterances = torch.tensor([0, 0, 1])
    torch.testing.assert_close(best_delay(losses, utterances, 0.0), torch.tensor([2.0, 1.0], dtype=torch.float64))
    best = best_delay(losses, utterances, 0.0).sum()
    assert torch.autograd.grad(best, losses)[0].tolist() == [[1, 1, 0], [0, 0, 1]]
    soft = best_delay(losses, utterances, 0.7)
    expected = [
        -0.7 * frames * np.log(np.mean(np.exp(-np.array(mean) / 0.7))) for frames, mean in ((2, (1, 2)), (1, (5, 1)))
    ]
    np.testing.assert_allclose(soft.detach(), expected)
    torch.testing.assert_close(
        best_delay(losses, utterances, 1e-3), best_delay(losses, utterances, 0.0), atol=2e-3, rtol=0
    )
    torch.testing.assert_close(
        best_delay(losses, utterances, 1e6), torch.tensor([3.0, 3.0], dtype=torch.float64), atol=1e-4, rtol=0
    )
    assert torch.autograd.gradcheck(lambda rows: best_delay(rows, utterances, 0.7), losses)


@pytest.mark.parametrize("delay", [0, 1, 3])
def test_a_student_that_is_late_is_told_so_only_beyond_the_longest_delay(job: Job, units: Units, delay: int) -> None:
    settings = job(source={"delays": {"most_ms": 60}})  # two frames
    stream = PhaseStream(settings, 0, units)
    batch = next(filter(None, stream.batches(stream.start(), 0)))
    kept, probs = batch.parts["soft.units"].values, batch.parts["soft.probs"].values
    dense = torch.full((len(kept), units.size), 1e-9).scatter_add_(1, kept, probs).log()
    logits = torch.zeros(*batch.features.shape[:2], units.size)
    for row, rows in zip(logits, dense.split(batch.lengths.tolist()), strict=True):
        at = (torch.arange(len(rows)) - delay).clamp_min(0)
        row[: len(rows)] = rows[at]
    loss = loss_of(logits, batch, settings, units).item()
    plain = loss_of(logits, batch, job(), units).item()
    assert (loss < plain - 0.05) == (delay > 0)
    assert (loss < 0.4) == (delay <= 2)


def test_all_frames_are_near_enough_or_none(job: Job, units: Units) -> None:
    everywhere, plain = job(source={"select": {"before_ms": 9999.0, "after_ms": 9999.0}}), job()
    stream = PhaseStream(plain, 0, units)
    batch = next(filter(None, stream.batches(stream.start(), 0)))
    logits = torch.randn(*batch.features.shape[:2], units.size)
    torch.testing.assert_close(loss_of(logits, batch, everywhere, units), loss_of(logits, batch, plain, units))
    batch.parts["soft.units"] = Part(torch.zeros_like(batch.parts["soft.units"].values))
    batch.parts["soft.tail"] = Part(torch.zeros_like(batch.parts["soft.tail"].values))
    silent = loss_of(logits.requires_grad_(), batch, everywhere, units)
    assert silent.item() == 0 and torch.autograd.grad(silent, logits)[0].abs().max() == 0


@pytest.mark.parametrize("source", [{"select": {"before_ms": 30.0}}, {"delays": {"most_ms": 90.0, "sharpness": 0.2}}])
def test_a_loader_process_changes_nothing(job: Job, tmp_path: Path, source: dict[str, Any]) -> None:
    for workers in (0, 1):
        train(job(output=str(tmp_path / str(workers)), source=source, loader_workers=workers, phase={"passes": 1}))
    assert files(tmp_path / "0") == files(tmp_path / "1")
