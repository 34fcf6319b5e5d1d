"""Two views that agree: the divergence between them, and who gets a gradient."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from asr_kd.distillation.knowledge import Seen
from asr_kd.distillation.settings import SourceSettings
from asr_kd.distillation.views import Views


def view_divergence(rows: torch.Tensor) -> torch.Tensor:
    """The loss of two views, of one frame an utterance."""
    learned = torch.ones(len(rows), 1, dtype=torch.bool)
    return Views.loss(Views.__new__(Views), Seen(rows[:, None], learned.sum(1), learned, {}, {}, {}))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), frames=st.integers(0, 4))
def test_it_is_that_of_the_definition_in_both_directions(seed: int, frames: int) -> None:
    rows = noise(2 * frames, 5, seed=seed)
    p = [[value / sum(row) for value in row] for row in ([math.exp(value) for value in row] for row in rows.tolist())]
    expected = sum(
        math.log(a / b) * (a - b)  # KL(a ‖ b) + KL(b ‖ a)
        for one, other in zip(p[:frames], p[frames:], strict=True)
        for a, b in zip(one, other, strict=True)
    )
    assert view_divergence(rows).item() == pytest.approx(expected, rel=1e-9, abs=1e-9)
    swapped = torch.cat([rows[frames:], rows[:frames]])
    torch.testing.assert_close(view_divergence(swapped), view_divergence(rows))


def test_equal_views_teach_nothing() -> None:
    rows = noise(3, 5).repeat(2, 1).requires_grad_()
    loss = view_divergence(rows)
    loss.backward()
    assert loss.item() == 0.0 and rows.grad is not None
    torch.testing.assert_close(rows.grad, torch.zeros_like(rows))


def test_each_view_learns_and_teaches_without_a_gradient() -> None:
    rows = noise(6, 5).requires_grad_()
    view_divergence(rows).backward()
    probs = rows.detach().softmax(-1)
    assert rows.grad is not None
    # of cross-entropies against what stands still; a gradient through the teacher would add to it
    torch.testing.assert_close(rows.grad, probs - probs.roll(3, 0))


def test_nothing_to_learn_is_0_with_a_graph() -> None:
    rows = noise(0, 5).requires_grad_()
    loss = view_divergence(rows)
    loss.backward()
    assert loss.item() == 0.0


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"views": {}}, "views are to differ by their masks"),
        ({"views": {}, "augment": {"mel_warp": 0.1}}, "set augment.time_masks or augment.mel_masks"),
    ],
)
def test_what_does_not_go_together(source: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SourceSettings.model_validate({"audio": "memory", "ctc": 1.0, **source})
