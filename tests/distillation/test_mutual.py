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
from asr_kd.distillation.critic import of_peers, told_apart
from asr_kd.distillation.knowledge import Knowledge, Pupil, Seen, Task, lesson_of
from asr_kd.distillation.mutual import Mutual, mutual_loss
from asr_kd.distillation.response import divergence_from
from asr_kd.distillation.settings import SourceSettings
from asr_kd.errors import UserError
from asr_kd.models.acoustic import build_model, parameters
from asr_kd.models.network import Outputs
from asr_kd.models.settings import ModelSettings
from asr_kd.units import Units

FEATURES = FeatureSettings(sample_rate=8000, mels=8)
STUDENT = ModelSettings(layers=2, size=6, dropout=0.0)


class Letters(Units):
    """Five units, without a sentencepiece model."""

    def __init__(self) -> None:
        pass

    size = 5


TASK = Task(Letters(), FEATURES, STUDENT, "ghost")


def naive(learners: list[Tensor]) -> float:
    total = 0.0
    for own_at, own in enumerate(learners):
        for other_at, other in enumerate(learners):
            for theirs, mine in zip(other.tolist(), own.tolist(), strict=True):
                if own_at != other_at:
                    p, q = softmax(theirs), softmax(mine)
                    total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / (len(learners) - 1)
    return total


def softmax(row: list[float]) -> list[float]:
    exps = [math.exp(value - max(row)) for value in row]
    return [value / sum(exps) for value in exps]


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000), st.integers(2, 4), st.integers(0, 5), st.integers(2, 5))
def test_it_is_what_it_says(seed: int, learners: int, frames: int, units: int) -> None:
    logits = [3 * drawn(seed + number, frames, units) for number in range(learners)]
    assert mutual_loss(logits).item() == pytest.approx(naive(logits), abs=1e-9)
    assert mutual_loss(logits).item() >= -1e-12
    assert mutual_loss([*logits[1:], logits[0]]).item() == pytest.approx(mutual_loss(logits).item(), abs=1e-9)


def test_equals_have_nothing_to_learn() -> None:
    own, other = (drawn(0, 4, 5).requires_grad_() for _ in range(2))
    loss = mutual_loss([own, other])
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-12)
    for one in (own, other):
        assert one.grad is not None
        torch.testing.assert_close(one.grad, torch.zeros_like(one))


def test_each_learns_and_answers_without_a_gradient() -> None:
    own, other = drawn(0, 4, 5).requires_grad_(), drawn(1, 4, 5).requires_grad_()
    divergence_from(other, own).backward()
    assert other.grad is None and own.grad is not None
    torch.testing.assert_close(own.grad, (own.softmax(-1) - other.softmax(-1)).detach())
    torch.autograd.gradcheck(lambda logits: divergence_from(other, logits), (own,))


def source(**changes: Any) -> SourceSettings:
    values = {"audio": "memory", "targets": "somewhere", "soft": 0.7, "mutual": {"weight": 0.3, "peers": 2}}
    return SourceSettings.model_validate(values | changes)


def parts(frames: int, seed: int = 9) -> dict[str, Part]:
    probs, units = drawn(seed, frames, 5).softmax(-1).sort(-1, descending=True)
    return {"soft.units": Part(units), "soft.probs": Part(probs), "soft.tail": Part(probs.new_zeros(frames))}


def seen_of(logits: list[Tensor], learned: Tensor, seed: int = 9) -> Seen:
    beside = {f"peer.{number}": one for number, one in enumerate(logits[1:], 1)}
    lengths = torch.full((len(learned),), learned.shape[1])
    return Seen(logits[0], lengths, learned, parts(int(learned.sum()), seed), {}, beside)


def kind_of(kinds: Any) -> Mutual:
    found = next(kind for kind in kinds if isinstance(kind, Mutual))
    assert isinstance(found, Mutual)
    return found


def test_peers_learn_what_the_source_teaches_and_the_student_is_not_taught_twice() -> None:
    kinds = lesson_of(source(), TASK).kinds
    logits = [drawn(seed, 2, 3, 5).float().requires_grad_() for seed in range(3)]
    learned = torch.tensor([[True, True, False], [True, True, True]])
    seen = seen_of(logits, learned)
    loss = kind_of(kinds).loss(seen)
    soft = next(kind for kind in kinds if kind.name == "soft")
    taught = [0.7 * soft.loss(seen._replace(logits=one)) for one in logits[1:]]
    expected = taught[0] + taught[1] + 0.3 * mutual_loss([one[learned] for one in logits])
    torch.testing.assert_close(loss, expected)
    assert kind_of(kinds).weight == 1.0  # `mutual.weight` does not weigh what the source teaches the peers
    loss.backward()
    for one in logits:
        assert one.grad is not None and not one.grad[~learned].any() and one.grad[learned].all()


def test_padding_and_nothing_learned() -> None:
    logits = [drawn(seed, 1, 3, 5).requires_grad_() for seed in range(3)]
    padded = [torch.nn.functional.pad(one, (0, 0, 0, 4), value=7.0) for one in logits]
    kind, learned = kind_of(lesson_of(source(), TASK).kinds), torch.ones(1, 3, dtype=torch.bool)
    whole = kind.loss(seen_of(logits, learned))
    more = kind.loss(seen_of(padded, torch.nn.functional.pad(learned, (0, 4))))
    torch.testing.assert_close(more, whole)
    nothing = kind.loss(seen_of(logits, ~learned))
    nothing.backward()
    assert nothing.item() == 0.0 and all(one.grad is not None and not one.grad.any() for one in logits)


def test_half_precision_stays_finite() -> None:
    logits = [(50 * drawn(seed, 1, 3, 5)).bfloat16().requires_grad_() for seed in range(3)]
    seen = seen_of([logits[0].float(), *logits[1:]], torch.ones(1, 3, dtype=torch.bool))
    loss = kind_of(lesson_of(source(), TASK).kinds).loss(seen)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite()
    assert all(one.grad is not None and one.grad.isfinite().all() for one in logits)


def test_the_peers_are_networks_of_their_own() -> None:
    kinds = lesson_of(source(mutual={"peers": 2, "model": {"layers": 1, "size": 4, "delay_ms": 60.0}}), TASK).kinds
    student = build_model(STUDENT, FEATURES.dimension, 5)
    pupil = Pupil(student, kinds)
    first, second = pupil.beside["mutual"]
    assert not torch.equal(first.output.weight, second.output.weight)
    assert first.delay == math.ceil(60 / FEATURES.frame_ms)
    assert parameters(pupil) == parameters(student) + 2 * parameters(first)
    assert pupil.clipped == [student, first, second]
    outputs, besides = pupil(torch.randn(2, 4, FEATURES.dimension), torch.tensor([4, 2]))
    assert {one.shape for one in besides["mutual"].values()} == {outputs.logits.shape}
    same = Pupil(student, lesson_of(source(), TASK).kinds).beside["mutual"][0]
    assert parameters(same) == parameters(student)
    assert not torch.equal(same.output.weight, student.output.weight)


def speaking(seed: int, frames: int = 12) -> Tensor:
    """Logits of one who speaks in every fourth frame."""
    logits = drawn(seed, 1, frames, 5)
    logits[..., 0] += 8
    logits[:, 3::4, 1 + seed % 4] += 12
    return logits


def judged(seen: Seen, weight: float) -> tuple[Mutual, Seen]:
    """A kind with critics, and what is seen with the weights of these."""
    kinds = lesson_of(source(mutual={"peers": 2, "weight": 0.0, "critic": weight}, soft=1e-9), TASK).kinds
    torch.manual_seed(0)
    beside = Pupil(build_model(STUDENT, FEATURES.dimension, 5), kinds).double().beside["mutual"]
    features = torch.zeros(1, 2, FEATURES.dimension, dtype=torch.float64)
    weights = beside(Outputs(features, torch.tensor([2]), {}), features, torch.tensor([2]))
    return kind_of(kinds), seen._replace(beside=weights | seen.beside)


def test_with_critics_each_is_told_from_the_next_and_the_last_from_the_first() -> None:
    logits = [speaking(seed).requires_grad_() for seed in range(3)]
    seen = seen_of(logits, torch.ones(1, 12, dtype=torch.bool))
    kind, seen = judged(seen, 0.3)
    notes: dict[str, Tensor] = {}
    found = kind._taken_for_the_next(seen._replace(note=notes.__setitem__), [one[0] for one in logits])
    slopes = torch.autograd.grad(found, logits)
    assert list(notes) == [f"mutual:critic.{number}:accuracy" for number in range(3)]
    for number in range(3):
        own, other = logits[number][0], logits[(number + 1) % 3][0]
        samples = of_peers(own, other, torch.tensor([12]), FEATURES.frame_ms)
        assert len(samples.student) == 3
        loss, _ = told_apart(samples, seen.beside, 0.3, f"critic.{number}")
        found = found - 12 * loss
        (slope,) = torch.autograd.grad(12 * loss, logits[number])  # as the next, it has none
        torch.testing.assert_close(slopes[number], slope)
        assert slope.any()
    assert found.item() == pytest.approx(0.0, abs=1e-9)


def test_a_critic_of_silent_peers_costs_nothing_and_one_without_weight_teaches_nothing() -> None:
    silent = [drawn(seed, 1, 6, 5).index_fill(2, torch.tensor([0]), 20.0).requires_grad_() for seed in range(3)]
    kind, seen = judged(seen_of(silent, torch.ones(1, 6, dtype=torch.bool)), 0.3)
    found = kind._taken_for_the_next(seen, [one[0] for one in silent])
    assert found.item() == 0.0
    assert not any(slope.any() for slope in torch.autograd.grad(found, silent))
    speak = [speaking(seed).requires_grad_() for seed in range(3)]
    kind, seen = judged(seen_of(speak, torch.ones(1, 12, dtype=torch.bool)), 1e-30)
    found = kind._taken_for_the_next(seen, [one[0] for one in speak])
    assert found.item() > 1 and all(slope.abs().max() < 1e-25 for slope in torch.autograd.grad(found, speak))


class Inner(Knowledge):
    taps = ("layer.1",)


class Trained(Knowledge):
    def beside(self) -> torch.nn.Module:
        return torch.nn.Identity()


@pytest.mark.parametrize("other", [Inner, Trained])
def test_what_looks_into_the_student_or_trains_a_part_is_refused(other: type[Knowledge]) -> None:
    kinds = lesson_of(source(), TASK).kinds
    one = other(source().knowledge()[0]._replace(name="inner"), TASK)
    with pytest.raises(UserError, match="mutual: cannot go with inner, which looks into the student or trains a part"):
        kind_of(kinds).join([one])


def test_a_delay_too_long_is_refused() -> None:
    with pytest.raises(UserError, match=r"mutual\.model: delay_ms 5000 is more than 32 frames"):
        lesson_of(source(mutual={"model": {"delay_ms": 5000.0}}), TASK)
