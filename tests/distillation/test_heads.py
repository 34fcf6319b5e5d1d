"""Heads on lower layers: each of their losses, and who gets a gradient."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from asr_kd.audio.settings import FeatureSettings
from asr_kd.distillation.batch import Part
from asr_kd.distillation.heads import Head
from asr_kd.distillation.knowledge import Pupil, Seen, Task, lesson_of
from asr_kd.distillation.response import divergence_from
from asr_kd.distillation.settings import SourceSettings
from asr_kd.errors import UserError
from asr_kd.models.acoustic import build_model
from asr_kd.models.settings import ModelSettings
from asr_kd.units import Units

MODEL = ModelSettings(layers=2, size=6, delay_frames=2, dropout=0.0)
FEATURES = FeatureSettings(sample_rate=8000, mels=8)


def head_of(units: Units, model: ModelSettings = MODEL, **settings: Any) -> Head:
    head = {"layer": "layer.1", **settings}
    needed = {"targets": "memory"} if head.get("soft") else {}
    source = SourceSettings.model_validate({"audio": "memory", "heads": [head], **needed})
    (kind,) = lesson_of(source, Task(units, FEATURES, model, "ghost")).kinds
    assert isinstance(kind, Head)
    return kind


def seen_of(
    logits: Tensor, top: Tensor, lengths: list[int], parts: dict[str, Part] | None = None, done: float = 0.0
) -> Seen:
    sizes = torch.tensor(lengths)
    learned = torch.arange(logits.shape[1]) < sizes[:, None]
    return Seen(top, sizes, learned, parts or {}, {}, {"logits": logits}, done)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), frames=st.integers(0, 4), temperature=st.sampled_from([0.5, 1.0, 3.0]))
def test_the_divergence_is_that_of_the_definition(seed: int, frames: int, temperature: float) -> None:
    rows, top = 3 * noise(frames, 5, seed=seed), 3 * noise(frames, 5, seed=seed + 1)
    expected = 0.0
    for own, other in zip(rows.tolist(), top.tolist(), strict=True):
        p = [math.exp(value / temperature) for value in other]
        q = [math.exp(value / temperature) for value in own]
        for a, b in zip(p, q, strict=True):
            expected += temperature**2 * a / sum(p) * math.log(a / sum(p) / (b / sum(q)))
    found = divergence_from(top, rows, temperature)
    assert found.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert found >= -1e-12
    assert divergence_from(rows, rows, temperature).item() == pytest.approx(0.0, abs=1e-12)
    assert divergence_from(rows + 5.0, rows, temperature).item() == pytest.approx(0.0, abs=1e-9)


def test_the_top_gets_no_gradient_and_the_head_a_right_one() -> None:
    rows, top = noise(3, 5).requires_grad_(), noise(3, 5, seed=1).requires_grad_()
    divergence_from(top, rows).backward()
    assert top.grad is None and rows.grad is not None and rows.grad.abs().sum() > 0
    # minimised by the head that says what the top says: the gradient is the difference of the two distributions
    torch.testing.assert_close(rows.grad, rows.softmax(-1) - top.softmax(-1))
    assert torch.autograd.gradcheck(lambda values: divergence_from(top.detach(), values, 2.0), (rows,))


def test_each_loss_has_its_weight_and_they_add_up(units: Units) -> None:
    logits, top = noise(2, 6, units.size).requires_grad_(), noise(2, 6, units.size, seed=1).requires_grad_()
    full = noise(10, units.size, seed=2).softmax(-1)
    probs, which = full.topk(2)
    parts = {
        "text": Part(torch.tensor([1, 2, 1]), torch.tensor([2, 1])), "soft.units": Part(which), "soft.probs": Part(probs),
        "soft.tail": Part(1 - probs.sum(-1)),
    }  # fmt: skip
    seen = seen_of(logits, top, [6, 4], parts)

    def loss(**weights: Any) -> Tensor:
        return head_of(units, **weights).loss(seen)

    ctc, soft, own = loss(ctc=1.0), loss(soft=1.0), loss(top=1.0)
    torch.testing.assert_close(loss(ctc=0.3, soft=2.0, top=0.5), 0.3 * ctc + 2.0 * soft + 0.5 * own)
    torch.testing.assert_close(own, divergence_from(top[seen.learned], logits[seen.learned]))
    torch.testing.assert_close(
        ctc,
        torch.nn.functional.ctc_loss(
            logits.log_softmax(-1).transpose(0, 1), torch.tensor([[1, 2], [1, 0]]), torch.tensor([6, 4]), torch.tensor([2, 1]),
            reduction="sum",
        ),
    )  # fmt: skip
    moving = {"start": 0.0, "end": 1.0}
    assert head_of(units, top=moving).loss(seen).item() == 0.0
    torch.testing.assert_close(head_of(units, top=moving).loss(seen._replace(done=0.5)), 0.5 * own)
    (gradient,) = torch.autograd.grad(loss(ctc=1.0, soft=1.0, top=1.0), logits)
    assert (gradient[0] != 0).any(-1).all() and not gradient[1, 4:].any()
    (gradient,) = torch.autograd.grad(loss(ctc=1.0, soft=1.0, top=1.0), top, allow_unused=True)
    assert gradient is None


def test_nothing_to_learn_is_0_with_a_graph(units: Units) -> None:
    logits = noise(1, 3, units.size).requires_grad_()
    loss = head_of(units, top=1.0).loss(seen_of(logits, noise(1, 3, units.size), [0]))
    loss.backward()
    assert loss.item() == 0.0 and logits.grad is not None and not logits.grad.any()


def test_padding_and_others_in_the_batch_change_nothing(units: Units) -> None:
    text = Part(torch.tensor([1, 2, 2, 1]), torch.tensor([2, 2]))
    torch.manual_seed(0)
    kind = head_of(units, ctc=0.5, top=0.5)
    pupil = Pupil(build_model(MODEL, FEATURES.dimension, units.size), [kind]).double()

    def loss(features: Tensor, lengths: list[int], text: Part) -> Tensor:
        outputs, besides = pupil(features, torch.tensor(lengths))
        parts = {"text": text}
        return kind.loss(seen_of(besides["heads:layer-1"]["logits"], outputs.logits, lengths, parts))

    features = noise(2, 9, FEATURES.dimension)
    together = loss(features, [9, 6], text)
    changed = features.clone()
    changed[1, 6:] = 1e3
    torch.testing.assert_close(loss(changed, [9, 6], text), together)
    alone = [
        loss(features[:1], [9], Part(torch.tensor([1, 2]), torch.tensor([2]))),
        loss(features[1:, :6], [6], Part(torch.tensor([2, 1]), torch.tensor([2]))),
    ]
    torch.testing.assert_close(alone[0] + alone[1], together)


def test_a_head_sees_the_frame_that_the_top_answers_for(units: Units) -> None:
    """Behind the delay: what it says of a frame depends on the input up to the delay behind it."""
    torch.manual_seed(0)
    pupil = Pupil(build_model(MODEL, FEATURES.dimension, units.size), [head_of(units, top=1.0)])
    features, lengths = torch.randn(1, 9, FEATURES.dimension), torch.tensor([9])
    before = pupil(features, lengths)[1]["heads:layer-1"]["logits"]
    features[0, 6] += 1.0
    after = pupil(features, lengths)[1]["heads:layer-1"]["logits"]
    assert (before != after).any(-1)[0].tolist() == [False] * 4 + [True] * 5


def test_half_precision_is_summed_in_float32(units: Units) -> None:
    logits = (100 * noise(1, 3, units.size)).bfloat16().requires_grad_()
    loss = head_of(units, top=1.0).loss(seen_of(logits, noise(1, 3, units.size).float(), [3]))
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite() and logits.grad is not None and logits.grad.isfinite().all()


def test_it_needs_what_its_weights_need() -> None:
    def needs(**head: Any) -> frozenset[str]:
        source = {"audio": "memory", "heads": [{"layer": "layer.1", **head}]}
        return SourceSettings.model_validate(source | ({"targets": "memory"} if "soft" in head else {})).needs

    assert needs(ctc=0.1) == {"text", "whole"}
    assert needs(soft=0.1) == {"targets"}
    assert needs(top={"start": 0.0, "end": 1.0}) == set()
    assert needs(soft=1.0, ctc=1.0) == {"text", "whole", "targets"}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"heads": [{"layer": "layer.1"}]}, "set ctc, soft or top above 0"),
        ({"heads": [{"layer": "layer.1", "soft": 1.0}]}, "learns what somebody answers; give targets or a teacher"),
        ({"heads": [{"layer": "layer.1", "top": 1.0}] * 2}, "heads:layer-1 is asked for twice"),
        (
            {"teacher": "x", "temperature": 2.0, "heads": [{"layer": "layer.1", "soft": 1.0}]},
            "heads learn soft targets as they are; leave out temperature",
        ),
    ],
)
def test_what_does_not_go_together(source: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SourceSettings.model_validate({"audio": "memory", **source})


def test_a_layer_that_is_not_there_is_named(units: Units) -> None:
    with pytest.raises(
        UserError, match=r"memory: heads:layer-3: the network has no layer\.3; it has layer\.1, layer\.2"
    ):
        head_of(units, layer="layer.3", top=1.0)
