"""What is compared of hidden states: frames, and events against plain loops over spikes and frames."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from asr_kd.distillation.hidden import LEAST, Hidden, Pairs
from asr_kd.distillation.knowledge import Seen
from asr_kd.distillation.settings import HiddenSettings
from tests.distillation.scenes import kind_of, seen_by, utterance


def hidden(samples: Any) -> Hidden:
    return kind_of(Hidden, HiddenSettings(student="layer.1", teacher="layer.2", samples=samples))


def compared(samples: Any, *paths: str, padding: int = 0, before: int = 0, after: int = 0) -> Pairs:
    kind = hidden(samples)
    several = [utterance(path, seed, before, after) for seed, path in enumerate(paths)]
    return kind.pairs(seen_by(kind, several, padding))


def by_loops(seen: Seen) -> list[tuple[Tensor, Tensor, int, int]]:
    """Student, teacher, utterance and unit of each event, one addition after the other."""
    states, logits = seen.hidden["layer.1"][seen.learned], seen.logits[seen.learned]
    teacher, units, probs = (
        seen.parts[name].values.double() for name in ("hidden.layer.2", "soft.units", "soft.probs")
    )
    found = []
    for start, end, first, last in seen.parts["spikes.edges"].values.T.tolist():
        heard: dict[int, float] = {}
        theirs, weights = torch.zeros(teacher.shape[1], dtype=torch.float64), 0.0
        for frame in range(start, end):
            mass = LEAST
            for unit, prob in zip(units[frame].long().tolist(), probs[frame].tolist(), strict=True):
                if unit != 0:
                    heard[unit] = heard.get(unit, 0.0) + prob
                    mass += prob
            theirs, weights = theirs + mass * teacher[frame], weights + mass
        unit = max(heard, key=lambda unit: heard[unit])
        own, total = torch.zeros(states.shape[1], dtype=torch.float64), 0.0
        for frame in range(first, last):
            said = float(logits[frame].softmax(-1)[unit]) + LEAST
            own, total = own + said * states[frame], total + said
        found.append((own / total, theirs / weights, int(seen.utterances[start]), unit))
    return found


@given(st.lists(st.text(".12", min_size=1, max_size=40), min_size=1, max_size=3), st.integers(0, 3))
@settings(max_examples=15, deadline=None)
def test_events_are_those_of_plain_loops(paths: list[str], context: int) -> None:
    kind = hidden("events")
    several = [utterance(path, seed, before=context, after=context) for seed, path in enumerate(paths)]
    seen = seen_by(kind, several, padding=2)
    pairs, expected = kind.pairs(seen), by_loops(seen)
    assert len(pairs.student) == len(pairs.teacher) == len(expected)
    for *rows, (own, theirs, where, unit) in zip(*pairs, expected, strict=True):
        torch.testing.assert_close(rows[0], own, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(rows[1], theirs, rtol=1e-5, atol=1e-6)
        assert (int(rows[2]), int(rows[3])) == (where, unit)


def test_frames_are_the_learned_ones_in_order() -> None:
    kind = hidden("frames")
    several = [utterance(".1.", 0, before=2, after=1), utterance("2", 1, before=1)]
    student, teacher, where, unit = kind.pairs(seen_by(kind, several, padding=3))
    assert torch.equal(student, torch.cat([several[0].student[2:5], several[1].student[1:]]))
    assert torch.equal(teacher, torch.cat([one.teacher for one in several]))
    assert (where.tolist(), unit.tolist()) == ([0, 0, 0, 1], [0, 1, 0, 2])


@pytest.mark.parametrize("samples", ["frames", "events"])
def test_neither_padding_nor_batch_mates_change_a_sample(samples: str) -> None:
    paths = ["..11...2..", "....", ".1.1"]
    together = compared(samples, *paths, padding=9)
    kind = hidden(samples)
    alone = [kind.pairs(seen_by(kind, [utterance(path, seed)])) for seed, path in enumerate(paths)]
    for name in ("student", "teacher", "unit"):
        torch.testing.assert_close(getattr(together, name), torch.cat([getattr(one, name) for one in alone]))
    assert together.utterance.tolist() == [seed for seed, one in enumerate(alone) for _ in one.unit]


def test_without_a_spike_there_is_no_event_but_a_graph() -> None:
    kind = hidden("events")
    silent = utterance("......")
    silent.student.requires_grad_()
    student, teacher, where, unit = kind.pairs(seen_by(kind, [silent]))
    assert (student.shape, teacher.shape, where.shape, unit.shape) == ((0, 5), (0, 3), (0,), (0,))
    student.sum().backward()
    assert silent.student.grad is not None and not silent.student.grad.any()


def test_an_event_is_the_same_wherever_the_student_says_it() -> None:
    """All of the student's unit on one frame, late or early within the stretch: its state is that frame's."""
    kind = hidden("events")
    for frame in (4, 5, 8):
        one = utterance("......1......", 3)
        one.logits[:, 1] = -40.0
        one.logits[frame, 1] = 40.0
        event = kind.pairs(seen_by(kind, [one]))
        torch.testing.assert_close(event.student[0], one.student[frame], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(event.teacher[0], one.teacher[6])


@pytest.mark.parametrize("samples", ["frames", "events"])
def test_gradients_reach_the_student_s_states_alone(samples: str) -> None:
    kind = hidden(samples)
    one = utterance("..11..2.", before=1, after=2)
    for tensor in (one.student, one.logits, one.teacher):
        tensor.requires_grad_()
    pairs = kind.pairs(seen_by(kind, [one]))
    assert not pairs.teacher.requires_grad
    (pairs.student.square().sum() + pairs.teacher.sum()).backward()
    assert one.teacher.grad is None and one.logits.grad is None
    assert one.student.grad is not None and one.student.grad.any()
    assert not one.student.grad[0].any() and not one.student.grad[-2:].any(), "context is not learned"


def test_half_precision_is_compared_in_single() -> None:
    kind = hidden("events")
    seen = seen_by(kind, [utterance("..1..")])
    seen.hidden["layer.1"] = seen.hidden["layer.1"].bfloat16()
    pairs = kind.pairs(seen._replace(logits=seen.logits.float()))
    assert pairs.student.dtype == torch.float32


def test_what_it_asks_for() -> None:
    kind = hidden("frames")
    assert (kind.taps, kind.taught, kind.widths) == (("layer.1",), ("layer.2",), (5, 3))
    assert kind.name == "kind:layer-1:layer-2"
