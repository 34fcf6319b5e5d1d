"""CTC over those paths alone whose units the targets hold at each frame, against every path one by one."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from asr_kd.training.losses import batch_loss
from torch import Tensor

from asr_kd.errors import UserError
from asr_kd.training.batches import Batch
from asr_kd.training.settings import TrainSettings
from asr_kd.training.trainer import train

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
        labels=torch.tensor([unit for ids, _ in utterances for unit in ids]),
        label_lengths=torch.tensor([len(ids) for ids, _ in utterances]),
        units=units,
        probs=probs,
        tail=torch.zeros(len(frames)),
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
    return batch_loss(logits, batch.lengths, batch, settings.phases[0], settings)


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


def test_a_network_trains_within_its_targets(job: Callable[..., TrainSettings]) -> None:
    settings = job(
        source={"soft": 0.0, "ctc": 1.0, "ctc_within_targets": True, "augment": {"stretch": 0.1}},
        phase={"passes": 12, "learning_rate": 0.02}, evaluate_every=100,
    )  # fmt: skip
    train(settings)
    text = (Path(settings.output) / "metrics.jsonl").read_text()
    losses = [line["loss"] for line in map(json.loads, text.splitlines()) if "loss" in line]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"ctc": 0.0, "soft": 1.0, "ctc_within_targets": True}, "needs a ctc weight above 0"),
        ({"ctc": 1.0, "soft": 0.0, "ctc_within_targets": True, "targets": None}, "targets go together with"),
        ({"ctc": 1.0, "soft": 0.0}, "targets go together with"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    job: Callable[..., TrainSettings], source: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        job(source=source)


def test_missing_targets_are_named(job: Callable[..., TrainSettings], tmp_path: Path) -> None:
    source = {"soft": 0.0, "ctc": 1.0, "ctc_within_targets": True, "targets": str(tmp_path / "none")}
    with pytest.raises(UserError, match="none"):
        train(job(source=source))
