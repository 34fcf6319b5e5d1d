"""CTC over those paths alone whose units the targets hold at each frame, against every path one by one."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from asr_kd.distillation.batch import Batch, Part
from asr_kd.training.settings import TrainSettings
from tests import learning

UNITS = 4
Windows = list[set[int]]  # of one utterance: the units that its targets hold at each frame


def collapsed(path: tuple[int, ...]) -> list[int]:
    return [unit for unit, _ in itertools.groupby(path) if unit]


def enumerated(log_probs: Tensor, labels: list[int], windows: Windows) -> float:
    """-log of the summed probability of all allowed paths that spell `labels`; float64 [frames, units]."""
    choices = [sorted(window | {0}) for window in windows]
    scores = [
        sum(log_probs[frame, unit].item() for frame, unit in enumerate(path))
        for path in itertools.product(*choices)
        if collapsed(path) == labels
    ]
    return -torch.tensor(scores, dtype=torch.float64).logsumexp(0).item()


def batch_of(utterances: list[tuple[list[int], Windows]]) -> Batch:
    """A batch without audio: what the loss reads of it."""
    frames = [window for _, windows in utterances for window in windows]
    k = max(len(window) for window in frames) or 1
    units = torch.zeros(len(frames), k, dtype=torch.int64)
    probs = torch.zeros(len(frames), k, dtype=torch.float64)
    for row, window in enumerate(frames):
        for place, unit in enumerate(sorted(window)):
            units[row, place], probs[row, place] = unit, 1 / len(window)
    return Batch(
        features=torch.zeros(len(utterances), 1, 1),
        lengths=torch.tensor([len(windows) for _, windows in utterances]),
        first=torch.zeros(len(utterances), dtype=torch.int64),
        last=torch.tensor([len(windows) for _, windows in utterances]),
        source=0,
        parts={
            "text": Part(
                torch.tensor([unit for ids, _ in utterances for unit in ids]),
                torch.tensor([len(ids) for ids, _ in utterances]),
            ),
            "soft.units": Part(units),
            "soft.probs": Part(probs),
            "soft.tail": Part(torch.zeros(len(frames))),
        },
    )


def loss_of(
    logits: Tensor, utterances: list[tuple[list[int], Windows]], within: bool = True, weight: float = 1.0
) -> Tensor:
    source: dict[str, Any] = {"audio": "a", "ctc": weight}
    if within:
        source |= {"ctc_within_targets": True, "targets": "t"}
    settings = TrainSettings.model_validate(
        {"output": "o", "units": "u", "development": "d", "phases": [{"sources": [source], "passes": 1}]}
    )
    batch = batch_of(utterances)
    return learning.loss_of(logits, batch, settings)


ALL = {1, 2, 3}
ONE = ([1, 2], [{1}, {1}, set(), {2}, {2}, set()])
REPEATED = ([3, 3], [{3}, {3}, set(), {3}, {0, 3}])
LOOSE = ([2, 1, 2], [{2, 3}, {1, 2}, {1}, {1, 2}, ALL, {2}])
SILENT: tuple[list[int], Windows] = ([], [set(), {1}, set()])


@pytest.mark.parametrize("utterance", [ONE, REPEATED, LOOSE, SILENT])
@pytest.mark.parametrize("seed", [0, 1])
def test_it_is_the_sum_over_the_allowed_paths(utterance: tuple[list[int], Windows], seed: int) -> None:
    torch.manual_seed(seed)
    labels, windows = utterance
    logits = torch.randn(1, len(windows), UNITS, dtype=torch.float64)
    expected = enumerated(logits[0].log_softmax(-1), labels, windows) / len(windows)
    # paths outside weigh e^-30 against these
    assert loss_of(logits, [utterance]).item() == pytest.approx(expected, abs=1e-8)
    assert loss_of(logits, [utterance], weight=0.3).item() == pytest.approx(0.3 * expected, abs=1e-8)


def test_windows_of_everything_are_plain_ctc() -> None:
    torch.manual_seed(0)
    utterances: list[tuple[list[int], Windows]] = [
        (ids, [ALL] * frames) for ids, frames in (([1, 2], 5), ([3], 4), ([2, 2], 6))
    ]
    logits = torch.randn(3, 6, UNITS, dtype=torch.float64)
    assert loss_of(logits, utterances).item() == pytest.approx(
        loss_of(logits, utterances, within=False).item(), abs=1e-12
    )


def test_narrower_windows_cost_more() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 6, UNITS, dtype=torch.float64)
    losses = [
        loss_of(logits, [([1, 2], windows)]).item()
        for windows in ([ALL] * 6, [{1, 2}, {1}, {1, 2}, {2}, {2}, {2}], [set(), {1}, set(), set(), {2}, set()])
    ]
    assert losses == sorted(losses) and len(set(losses)) == 3


def test_a_batch_is_its_utterances_and_padding_counts_nothing() -> None:
    torch.manual_seed(0)
    utterances = [ONE, REPEATED, LOOSE]
    logits = torch.randn(3, 9, UNITS, dtype=torch.float64)
    alone = [
        loss_of(logits[[row], : len(windows)], [(ids, windows)]).item() * len(windows)
        for row, (ids, windows) in enumerate(utterances)
    ]
    frames = sum(len(windows) for _, windows in utterances)
    assert loss_of(logits, utterances).item() == pytest.approx(sum(alone) / frames, abs=1e-9)
    logits[:, 6:] = 1e3
    assert loss_of(logits, utterances).item() == pytest.approx(sum(alone) / frames, abs=1e-9)


def test_its_gradient_is_that_of_the_sum() -> None:
    torch.manual_seed(0)
    labels, windows = LOOSE
    logits = torch.randn(1, len(windows), UNITS, dtype=torch.float64, requires_grad=True)
    loss_of(logits, [LOOSE]).backward()
    assert logits.grad is not None
    step = 1e-6
    for frame, unit in itertools.product(range(len(windows)), range(UNITS)):
        values = []
        for sign in (1, -1):
            moved = logits.detach().clone()
            moved[0, frame, unit] += sign * step
            values.append(enumerated(moved[0].log_softmax(-1), labels, windows) / len(windows))
        assert logits.grad[0, frame, unit].item() == pytest.approx((values[0] - values[1]) / (2 * step), abs=1e-6)


def test_it_pushes_a_unit_into_its_window() -> None:
    logits = torch.zeros(1, 5, UNITS, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([logits], lr=5.0)
    for _ in range(60):
        optimizer.zero_grad()
        loss_of(logits, [([2], [set(), set(), set(), {2}, set()])]).backward()
        optimizer.step()
    assert logits.detach()[0].argmax(-1).tolist() == [0, 0, 0, 2, 0]


def test_windows_that_no_path_fits_stay_finite() -> None:
    """An alignment of another text than the labels must not end a run."""
    logits = torch.zeros(1, 4, UNITS, dtype=torch.float64, requires_grad=True)
    loss = loss_of(logits, [([1, 2], [{3}, set(), {3}, set()])])
    loss.backward()
    assert math.isfinite(loss.item()) and loss.item() > 5
    assert logits.grad is not None and logits.grad.isfinite().all()
