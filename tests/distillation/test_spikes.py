"""Spikes of soft targets: where they are against a plain walk over the frames, what they teach against every CTC path."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from asr_kd.distillation.batch import Batch, Part
from asr_kd.distillation.spikes import Spikes, find_spikes, spike_cross_entropy
from asr_kd.training.settings import TrainSettings
from tests.learning import loss_of, prepared

UNITS = 4


def sparse(probs: Tensor) -> tuple[Tensor, Tensor]:
    """All units kept, the best first: units int64 and probs [frames, units]."""
    kept, units = probs.topk(probs.shape[1], dim=1)
    return units, kept


def frames_of(path: str, sure: float = 0.9) -> tuple[Tensor, Tensor]:
    """Targets of a path such as `..1.22`: `sure` of the unit (. is the blank), and the rest on the others."""
    probs = torch.full((len(path), UNITS), (1 - sure) / (UNITS - 1))
    for frame, mark in enumerate(path):
        probs[frame, 0 if mark == "." else int(mark)] = sure
    return sparse(probs)


def dense(units: Tensor, probs: Tensor) -> Tensor:
    return torch.zeros(len(units), UNITS).scatter_(1, units, probs)


def edges(spikes: Spikes) -> list[tuple[int, int, int, int]]:
    columns = (spikes.start, spikes.end, spikes.first, spikes.last)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def found(path: str, *lengths: int, before: int = 2, after: int = 4) -> list[tuple[int, int, int, int]]:
    targets = frames_of(path, 0.97)
    return edges(find_spikes(*targets, torch.tensor(lengths or [len(path)]), before, after))


def test_a_spike_and_the_stretch_around_it() -> None:
    assert found("....11.....") == [(4, 6, 2, 8)]
    assert found(".1.") == [(1, 2, 0, 3)], "no further than the utterance"
    assert found("...111111..", after=2) == [(3, 9, 1, 9)], "all of the spike at least"
    assert found("......") == []


def test_neighbours_share_no_frame_and_equal_units_stay_two() -> None:
    assert found("...1..1....") == [(3, 4, 1, 5), (6, 7, 6, 10)]
    assert found("..12....") == [(2, 3, 0, 3), (3, 4, 3, 7)], "nothing lies between them"
    assert found("1.1") == [(0, 1, 0, 1), (2, 3, 2, 3)]


def test_utterances_do_not_reach_into_each_other() -> None:
    assert found(".1..2.", 3, 3) == [(1, 2, 0, 3), (4, 5, 3, 6)]
    assert found(".11.", 2, 2) == [(1, 2, 0, 2), (2, 3, 2, 4)], "one spike cut in two by the end of an utterance"
    assert found("...1", 3, 1) == [(3, 4, 3, 4)]


def test_a_faint_doubt_is_no_spike_and_a_doubtful_unit_does_not_split_one() -> None:
    probs = torch.tensor(
        [[0.95, 0.05, 0, 0], [0.7, 0.2, 0.1, 0], [0.2, 0.1, 0.7, 0], [0.6, 0.3, 0.1, 0], [1.0, 0, 0, 0]]
    )
    one = find_spikes(*sparse(probs), torch.tensor([5]), 1, 1)
    assert edges(one) == [(1, 4, 0, 4)]
    surely_two = torch.cat([probs[:4], torch.tensor([[0.2, 0.8, 0, 0]])])
    two = find_spikes(*sparse(surely_two), torch.tensor([5]), 1, 1)
    assert edges(two) == [(1, 4, 0, 4), (4, 5, 4, 5)]


utterances = st.lists(st.lists(st.sampled_from("...123"), min_size=1, max_size=14), min_size=1, max_size=3)


@given(utterances, st.integers(0, 4), st.integers(1, 6), st.floats(0.4, 0.999))
def test_stretches_are_apart_and_hold_their_spikes(
    paths: list[list[str]], before: int, after: int, sure: float
) -> None:
    lengths = torch.tensor([len(path) for path in paths])
    units, probs = frames_of("".join(itertools.chain(*paths)), sure)
    spikes = find_spikes(units, probs, lengths, before, after)
    begins = [0, *lengths.cumsum(0).tolist()]
    utterance = [max(index for index, begin in enumerate(begins) if begin <= row[0]) for row in edges(spikes)]
    covered: list[int] = []
    for (start, end, first, last), index in zip(edges(spikes), utterance, strict=True):
        assert begins[index] <= first <= start < end <= last <= begins[index + 1]
        assert start - first <= before and last - start <= max(after, end - start)
        covered += range(first, last)
    assert len(covered) == len(set(covered))
    outside = spikes.outside(len(units))
    assert outside.sum() == len(units) - len(covered) and not outside[covered].any()
    speech = torch.where(units == 0, 0.0, probs).sum(1)
    assert (
        sorted(frame for start, end, _, _ in edges(spikes) for frame in range(start, end))
        == torch.flatten(torch.nonzero(speech >= 0.1)).tolist()
    )
    for (left, right), (one, two) in zip(itertools.pairwise(edges(spikes)), itertools.pairwise(utterance), strict=True):
        assert one != two or right[0] == left[1] or right[2] > left[3], "a frame between equal units"


def emission(log_probs: Tensor) -> Tensor:
    """P(nothing) and P(each unit once) of a stretch: every path, one by one; float64 [units]."""
    totals: dict[tuple[int, ...], float] = {}
    for path in itertools.product(range(log_probs.shape[1]), repeat=len(log_probs)):
        spelled = tuple(unit for unit, _ in itertools.groupby(path) if unit)
        totals[spelled] = totals.get(spelled, 0.0) + math.exp(sum(log_probs[t, u].item() for t, u in enumerate(path)))
    return torch.tensor([totals[(unit,) if unit else ()] for unit in range(log_probs.shape[1])], dtype=torch.float64)


def drawn(seed: int, frames: int) -> Tensor:
    return torch.randn(frames, UNITS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("seed", range(4))
def test_it_is_the_cross_entropy_between_what_both_emit(seed: int) -> None:
    """Two spikes of unlike lengths, stretches of unlike lengths, against the sum over all paths."""
    logits, teacher = drawn(seed, 12), (2 * drawn(seed + 100, 12)).softmax(1)
    spikes = Spikes(*(torch.tensor(column) for column in ([2, 7], [4, 8], [0, 5], [4, 10])))
    losses = spike_cross_entropy(logits, *sparse(teacher), spikes)
    for loss, (start, end, first, last) in zip(losses, edges(spikes), strict=True):
        emitted = emission(teacher[start:end].log())
        answer = emission(logits[first:last].log_softmax(1))
        torch.testing.assert_close(loss, -(emitted / emitted.sum() * answer.log()).sum())


def test_its_gradient() -> None:
    teacher = (2 * drawn(1, 9)).softmax(1)
    spikes = Spikes(*(torch.tensor(column) for column in ([1, 6], [3, 7], [0, 4], [3, 9])))
    logits = drawn(2, 9).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: spike_cross_entropy(x, *sparse(teacher), spikes), (logits,))


def test_a_sure_teacher_is_ctc_within_the_stretch() -> None:
    logits = drawn(3, 8)
    loss = spike_cross_entropy(logits, *frames_of("...2....", 1.0), Spikes(*(torch.tensor([x]) for x in (3, 4, 1, 7))))
    expected = torch.nn.functional.ctc_loss(
        logits[1:7, None].log_softmax(-1), torch.tensor([[2]]), torch.tensor([6]), torch.tensor([1]), reduction="sum"
    )
    torch.testing.assert_close(loss[0], expected)


def test_the_moment_is_the_students_choice() -> None:
    """A student that spikes anywhere in the stretch loses the same; one that spikes outside loses more."""
    units, probs = frames_of("....1.....", 0.95)
    spikes = find_spikes(units, probs, torch.tensor([10]), 2, 4)
    losses = [
        spike_cross_entropy(dense(*frames_of(path, 1 - 1e-6)).log(), units, probs, spikes).item()
        for path in ("..1.......", ".......1..", "....1.....", ".........1")
    ]
    assert losses[:3] == pytest.approx([losses[0]] * 3, rel=1e-3) and losses[3] > losses[0] + 1


def test_few_kept_units_do_not_make_a_gradient_that_is_none() -> None:
    """Only the blank kept in most frames, one unit in a spike: the rest of the teacher's answer is impossible, not NaN."""
    units = torch.tensor([[0, 0], [2, 0], [2, 0], [0, 0]])
    probs = torch.tensor([[1.0, 0.0], [0.99, 0.0], [0.6, 0.39], [1.0, 0.0]])
    spikes = find_spikes(units, probs, torch.tensor([4]), 1, 3)
    logits = torch.randn(4, UNITS, requires_grad=True)
    loss = spike_cross_entropy(logits, units, probs, spikes).sum()
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite() and gradient.isfinite().all() and gradient.abs().sum() > 0


def step_loss(logits: Tensor, path: str, lengths: list[int], spikes: dict | None) -> Tensor:
    source = {"audio": "a", "targets": "t", "soft": 1.0, "spikes": spikes}
    plan = {"output": "o", "units": "u", "development": "d", "phases": [{"sources": [source], "passes": 1}]}
    whole = TrainSettings.model_validate({**plan, "missing_mass": "renormalise"})
    units, probs = frames_of(path, 0.97)
    ends = torch.tensor(lengths)
    batch = Batch(
        torch.zeros(len(lengths), 1, 1),
        ends,
        torch.zeros_like(ends),
        ends,
        0,
        {"soft.units": Part(units), "soft.probs": Part(probs), "soft.tail": Part(1 - probs.sum(1))},
    )
    return loss_of(logits, prepared(batch, whole), whole)


def test_a_step_learns_spikes_as_events_and_all_other_frames_by_themselves() -> None:
    """The student may answer from 150 ms before a spike to 210 ms after its start: 5 and 7 frames of 30 ms."""
    logits = drawn(5, 32).reshape(2, 16, UNITS).float().requires_grad_()
    path, lengths = ".......1........" + ".2........", [16, 10]
    loss = step_loss(logits, path, lengths, {})
    units, probs = frames_of(path, 0.97)
    rows = torch.cat([logits[0], logits[1, :10]]).log_softmax(1)
    by_frame = -(dense(units, probs) * rows).sum(1)[[0, 1, 14, 15, 24, 25]].sum()
    spikes = Spikes(*(torch.tensor(column) for column in ([7, 17], [8, 18], [2, 16], [14, 24])))
    by_event = spike_cross_entropy(rows, units, probs, spikes).sum()
    torch.testing.assert_close(loss, (by_frame + by_event) / 26)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert not gradient[1, 10:].any(), "padding teaches nothing"


def test_a_step_without_any_spike_is_the_cross_entropy_of_its_frames() -> None:
    logits = drawn(6, 8).reshape(1, 8, UNITS).float()
    torch.testing.assert_close(step_loss(logits, "." * 8, [8], {}), step_loss(logits, "." * 8, [8], None))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000))
def test_a_student_that_is_the_teacher_can_do_little_better(seed: int) -> None:
    """With stretches as wide as the spikes, the teacher's own logits leave the entropy of what it emits, renormalised."""
    path = "..1..22..3"
    units, probs = frames_of(path, 0.9)
    spikes = find_spikes(units, probs, torch.tensor([len(path)]), 0, 1)
    same = spike_cross_entropy(dense(units, probs).log(), units, probs, spikes).sum()
    other = spike_cross_entropy(drawn(seed, len(path)).float(), units, probs, spikes).sum()
    assert same < other
