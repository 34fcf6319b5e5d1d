"""The critic: its loss against plain loops in float64, what is reversed, what it must not see, and that it can be deceived."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from asr_kd.distillation.batch import Part
from asr_kd.distillation.critic import STEEP, Critic, Judge, Samples, coded, judged, told_apart
from asr_kd.distillation.kind_settings import CriticSettings
from asr_kd.distillation.knowledge import Seen
from asr_kd.distillation.settings import SourceSettings
from asr_kd.models.network import Outputs
from asr_kd.targets.codec import decode, encode
from asr_kd.targets.posteriors import SparsePosteriors
from asr_kd.targets.store import Selection
from tests.distillation.scenes import UNITS, Utterance, kind_of, seen_by, utterance

LAYERS = {"student": "layer.1", "teacher": "layer.2"}
#: what is judged, and in which samples
WAYS: list[tuple[dict[str, str], str]] = [(of, samples) for of in ({}, LAYERS) for samples in ("events", "frames")]
ways = pytest.mark.parametrize(
    ("of", "samples"), WAYS, ids=[f"{'hidden' if of else 'outputs'}-{by}" for of, by in WAYS]
)
MIXED = ["..1...22.", "1...", ".......2."]


def critic(of: Mapping[str, str], samples: Any = "events", weight: float = 0.7) -> Critic:
    return kind_of(Critic, CriticSettings(samples=samples, weight=weight, **of))


class Player:
    """A critic with its module beside the student, in float64."""

    def __init__(self, of: Mapping[str, str], samples: Any = "events", weight: float = 0.7) -> None:
        self.kind = critic(of, samples, weight)
        self.kind.task = replace(self.kind.task, units=Four())
        torch.manual_seed(0)
        self.module = self.kind.beside().double()

    def seen(self, several: list[Utterance], padding: int = 0) -> Seen:
        return seen_by(self.kind, several, padding, self.module)

    def loss(self, several: list[Utterance], padding: int = 0) -> Tensor:
        return self.kind.loss(self.seen(several, padding))


class Four:
    """Units, without a sentencepiece model."""

    size = UNITS


def scene(paths: list[str] = MIXED) -> list[Utterance]:
    several = [utterance(path, seed, before=1, after=2) for seed, path in enumerate(paths)]
    for one in several:
        for tensor in (one.logits, one.student, one.teacher):
            tensor.requires_grad_()
    return several


def weights_of(module: torch.nn.Module, name: str = "judge") -> dict[str, Tensor]:
    nothing = torch.zeros(0)
    return next(one for one in module.modules() if isinstance(one, Judge))(
        Outputs(nothing, nothing, {}), nothing, nothing
    )


def plain_logit(sample: list[float], weights: Mapping[str, Tensor]) -> float:
    """What a critic says of a sample, one multiplication after the other."""
    said = sample
    for layer in ("inner", "outer"):
        weight = weights[f"judge.{layer}.weight"].detach().numpy()
        weight = weight / np.linalg.norm(weight, 2) * (2 if layer == "outer" else 1)
        bias = weights[f"judge.{layer}.bias"].tolist()
        said = [
            sum(a * b for a, b in zip(row, said, strict=True)) + c for row, c in zip(weight.tolist(), bias, strict=True)
        ]
        if layer == "inner":
            said = [max(value, 0.2 * value) for value in said]
    return said[0]


def plain_samples(seen: Seen, samples: str) -> tuple[list[list[float]], list[list[float]]]:
    """Samples of outputs, of student and teacher, by loops."""
    own = seen.rows.detach().softmax(-1).tolist()
    theirs = [[0.0] * UNITS for _ in own]
    for frame, (units, probs) in enumerate(zip(*(seen.parts[f"soft.{name}"].values.tolist() for name in ("units", "probs")), strict=True)):  # fmt: skip
        for unit, prob in zip(units, probs, strict=True):
            theirs[frame][unit] += prob
    if samples == "frames":
        spoken = [frame for frame, row in enumerate(theirs) if sum(row[1:]) >= 0.1]
        where = seen.utterances.tolist()
        near = [
            any(abs(frame - one) <= 2 and where[frame] == where[one] for one in spoken) for frame in range(len(own))
        ]
        return tuple([[math.sqrt(value) for value in row] for row, is_near in zip(rows, near, strict=True) if is_near] for rows in (own, theirs))  # type: ignore[return-value] # fmt: skip
    found: tuple[list[list[float]], list[list[float]]] = ([], [])
    for _, _, first, last in seen.parts["spikes.edges"].values.T.tolist():
        for rows, into in zip((own, theirs), found, strict=True):
            total = [sum(rows[frame][unit] for frame in range(first, last)) for unit in range(1, UNITS)]
            into.append([1e-6] + [math.sqrt(value / sum(total)) for value in total])
    return found


@pytest.mark.parametrize("samples", ["events", "frames"])
def test_the_loss_is_that_of_plain_loops(samples: str) -> None:
    player = Player({}, samples)
    seen = player.seen(scene(), 3)
    weights = weights_of(player.module)
    own, theirs = plain_samples(seen, samples)
    real, fake = ([plain_logit(one, weights) for one in rows] for rows in (theirs, own))
    expected = sum(math.log(1 + math.exp(-one)) for one in real) / len(real)
    expected += sum(math.log(1 + math.exp(one)) for one in fake) / len(fake)
    notes: dict[str, Tensor] = {}
    found = player.kind.loss(seen._replace(note=notes.__setitem__))
    assert found.item() == pytest.approx(len(seen.rows) * expected, rel=1e-6)
    right = (sum(one > 0 for one in real) + sum(one <= 0 for one in fake)) / 2 / len(real)
    assert {name: value.item() for name, value in notes.items()} == {
        f"{player.kind.name}:accuracy": pytest.approx(right)
    }


@ways
def test_the_student_s_slope_is_the_critic_s_reversed_times_the_weight(of: dict[str, str], samples: str) -> None:
    """So the critic learns at the same rate whatever the weight, and at weight 0 the student does not learn at all."""

    def slopes(weight: float, sign: float = 1.0) -> tuple[list[Tensor], list[Tensor]]:
        several, player = scene(), Player(of, samples, 1.0)
        player.kind.share = sign * weight
        player.loss(several).backward()
        own = [one.student.grad if of else one.logits.grad for one in several]
        assert all(one.teacher.grad is None for one in several)
        assert not of or all(one.logits.grad is None for one in several)
        judge = next(one for one in player.module.modules() if isinstance(one, Judge))
        return [slope for slope in own if slope is not None], [
            one.grad for one in judge.parameters() if one.grad is not None
        ]

    towards, of_critic = slopes(1.0, -1.0)  # no reversal
    assert any(slope.any() for slope in towards) and len(of_critic) == 4 and all(slope.any() for slope in of_critic)
    for weight in (0.0, 0.3, 1.0):
        reverse, same = slopes(weight)
        for one, other in zip(reverse, towards, strict=True):
            torch.testing.assert_close(one, -weight * other)
            assert weight or not one.any()
        for one, other in zip(same, of_critic, strict=True):
            assert torch.equal(one, other)


@ways
def test_slopes_are_those_of_small_changes(of: dict[str, str], samples: str) -> None:
    """The critic's as they are, the student's against a loss without reversal."""
    player = Player(of, samples, 1.0)
    player.kind.share = -1.0
    several = [utterance(".1.", 0, before=1), utterance("2.", 1)]
    weights = dict(player.module.named_parameters())

    def loss(first: Tensor, second: Tensor, *held: Tensor) -> Tensor:
        for one, values in zip(several, (first, second), strict=True):
            setattr(one, "student" if of else "logits", values)
        named = dict(zip(weights, held, strict=True))
        return player.kind.loss(seen_by(player.kind, several, 1, lambda *inputs: torch.func.functional_call(player.module, named, inputs)))  # fmt: skip

    inputs = [(one.student if of else one.logits).detach().requires_grad_() for one in several]
    assert torch.autograd.gradcheck(loss, [*inputs, *(one.detach().requires_grad_() for one in weights.values())])


@ways
def test_padding_and_context_change_nothing_and_batch_mates_only_the_mean(of: dict[str, str], samples: str) -> None:
    player, several = Player(of, samples), scene()
    together = player.loss(several).item()
    assert player.loss(several, padding=7).item() == pytest.approx(together, rel=1e-6)
    alone = [(player.loss([one]).item(), len(one.path)) for one in several]
    counts = [2, 1, 1] if samples == "events" else [9, 3, 4]
    mean = sum(count * loss / frames for count, (loss, frames) in zip(counts, alone, strict=True)) / sum(counts)
    assert together == pytest.approx(sum(frames for _, frames in alone) * mean, rel=1e-5)


@ways
def test_without_a_spike_the_loss_is_0_with_a_graph(of: dict[str, str], samples: str) -> None:
    player, several, notes = Player(of, samples), scene(["....", ".."]), {}
    loss = player.kind.loss(player.seen(several, 1)._replace(note=notes.__setitem__))
    loss.backward()
    assert loss.item() == 0.0 and not notes
    for one in [*player.module.parameters(), *(one.student if of else one.logits for one in several)]:
        assert one.grad is not None and not one.grad.any()


@ways
def test_half_precision_stays_finite(of: dict[str, str], samples: str) -> None:
    player = Player(of, samples)
    player.module.float()
    several = scene()
    for one in several:
        one.logits, one.student, one.teacher = (
            30 * values.detach().bfloat16() for values in (one.logits, one.student, one.teacher)
        )
        one.logits.requires_grad_(), one.student.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        seen = player.seen(several, 1)
    loss = player.kind.loss(seen._replace(logits=seen.logits.float()))
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite()
    assert all(slope is not None and slope.isfinite().all() for one in several for slope in (one.student.grad if of else one.logits.grad,))  # fmt: skip


def test_an_event_is_judged_by_what_is_said_whenever_it_is_said() -> None:
    player = Player({})
    losses = []
    for frame in (4, 6, 9):
        one = utterance("......1......", 3)
        one.logits[:] = torch.tensor([20.0, 0.0, 0.0, 0.0])
        one.logits[frame] = torch.tensor([0.0, 30.0, 29.0, 0.0])
        losses.append(player.loss([one]).item())
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=1e-6)
    one.logits[9] = torch.tensor([0.0, 29.0, 30.0, 0.0])
    assert player.loss([one]).item() != pytest.approx(losses[0], rel=1e-3)


@given(st.integers(0, 1000), st.floats(0.1, 10))
@settings(max_examples=20, deadline=None)
def test_no_critic_can_be_surer_than_its_samples_are_apart(seed: int, scale: float) -> None:
    torch.manual_seed(seed)
    judge = Judge(6).double()
    for weight in judge.parameters():
        torch.nn.init.normal_(weight, std=scale)
    one, other = (torch.nn.functional.normalize(torch.randn(50, 6).double()) for _ in range(2))
    apart = (judged(one, weights_of(judge)) - judged(other, weights_of(judge))).abs()
    assert (apart <= STEEP * (one - other).norm(dim=1) + 1e-9).all()


def test_weights_that_are_not_finite_make_a_loss_that_is_not() -> None:
    player = Player({})
    for broken in (float("nan"), float("inf")):
        torch.nn.init.constant_(next(player.module.parameters()), broken)
        assert not player.loss(scene()).isfinite()


# --- stored targets


SELECTIONS = [
    Selection(mode="mass", k=4, mass=0.95, floor=0.01),
    Selection(mode="mass", k=20, mass=0.999, floor=0.0),
    Selection(mode="top_k", k=3),
]


@pytest.mark.parametrize("selection", SELECTIONS, ids=["mass", "all", "top_k"])
@given(st.integers(0, 1000), st.floats(0.1, 5), st.integers(2, 12), st.sampled_from([16, 128]))
@settings(max_examples=30, deadline=None)
def test_the_student_passes_what_stored_targets_pass(selection: Selection, seed: int, sharp: float, units: int, levels: int) -> None:  # fmt: skip
    log_probs = (sharp * torch.randn(7, units, generator=torch.Generator().manual_seed(seed))).log_softmax(-1)
    kept = SparsePosteriors.from_dense(log_probs, selection.k or 0, selection.mass or 1.0, selection.floor or 0.0)
    stored = decode(encode(kept, levels))
    expected = torch.zeros(7, units)
    expected[stored.rows, stored.units] = torch.from_numpy(np.exp(stored.log_probs))
    torch.testing.assert_close(coded(log_probs, selection, levels), expected, rtol=1e-6, atol=1e-7)


def stored(path: str, logits: Tensor, player: Player, selection: Selection, levels: int) -> Seen:
    """A student whose teacher says the same, stored."""
    one = utterance(path)
    one.logits = logits
    player.kind.codec = selection, levels
    seen = player.seen([one])
    target = decode(encode(SparsePosteriors.from_dense(logits.detach().log_softmax(-1), selection.k or 0, selection.mass or 1.0), levels))  # fmt: skip
    units, probs = (torch.from_numpy(rows) for rows in target.padded(int(target.counts.max())))
    parts = {"soft.units": Part(units), "soft.probs": Part(probs), "soft.tail": Part(torch.from_numpy(target.tail))}
    return seen._replace(parts=seen.parts | parts)


@pytest.mark.parametrize("samples", ["events", "frames"])
def test_a_critic_cannot_tell_an_equal_student_from_stored_targets(samples: str) -> None:
    path = "...1....2...3.."
    logits = 2 * torch.randn(len(path), UNITS, generator=torch.Generator().manual_seed(3))
    for frame, mark in enumerate(path):
        logits[frame, 0 if mark == "." else int(mark)] += 5
    logits.requires_grad_()
    player = Player({}, samples)
    seen = stored(path, logits, player, SELECTIONS[0], 16)
    judged_samples = player.kind._outputs(seen)
    torch.testing.assert_close(judged_samples.student, judged_samples.teacher, rtol=1e-6, atol=1e-7)
    assert (judged_samples.through - judged_samples.student).abs().max() > 0.01  # without, it would see the rounding
    notes: dict[str, Tensor] = {}
    player.kind.loss(seen._replace(note=notes.__setitem__)).backward()
    assert notes[f"{player.kind.name}:accuracy"].item() == 0.5
    assert logits.grad is not None and logits.grad.any()  # straight through the rounding


def test_a_spike_of_which_the_student_keeps_nothing_is_not_judged() -> None:
    player = Player({})
    player.kind.codec = SELECTIONS[0], 128
    several = [utterance("...1....", 0), utterance("...2....", 1)]
    for one in several:
        one.logits[:] = torch.tensor([0.0, 0.0, 3.0, 0.0])
    heard = player.kind._outputs(player.seen(several))
    assert len(heard.student) == 2
    several[0].logits[:] = torch.tensor([20.0, 0.0, 0.0, 0.0])
    heard = player.kind._outputs(player.seen(several))
    assert len(heard.student) == len(heard.through) == len(heard.teacher) == 1


# --- the game


def cloud(middle: Tensor) -> Tensor:
    return torch.nn.functional.normalize(middle + torch.randn(100, 4))


def played(own: Tensor, theirs: Tensor, steps: int, share: float = 0.0) -> tuple[list[float], list[float], Tensor]:
    """Of samples around two middles, drawn anew at each step: how often the critic is right, the student's slope, and where its middle was."""
    torch.manual_seed(0)
    judge, own = Judge(4), own.clone().requires_grad_()
    optimizer = torch.optim.AdamW([*judge.parameters(), own], lr=0.01)
    right, slopes, middles = [], [], []
    for _ in range(steps):
        drawn = cloud(own)
        loss, accuracy = told_apart(Samples(drawn.detach(), drawn, cloud(theirs)), weights_of(judge), share)
        optimizer.zero_grad()
        (slope,) = torch.autograd.grad(loss, drawn, retain_graph=True)
        loss.backward()
        optimizer.step()
        right.append(accuracy.item())
        slopes.append(100 * slope.norm(dim=1).mean().item())
        middles.append(own.detach().clone())
    return right, slopes, torch.stack(middles)


MIDDLE = torch.tensor([1.0, 0.0, 0.0, -0.5])


def test_a_critic_learns_to_tell_two_apart_and_cannot_where_there_is_nothing_to_tell() -> None:
    right, *_ = played(-MIDDLE, MIDDLE, 100)
    assert sum(right[-20:]) / 20 > 0.8
    right, *_ = played(MIDDLE, MIDDLE, 100)
    assert sum(right) / 100 == pytest.approx(0.5, abs=0.02)


def test_one_that_is_always_right_still_shows_the_way() -> None:
    right, slopes, _ = played(-20 * MIDDLE, 20 * MIDDLE, 300, share=1e-9)
    assert right[-1] == 1.0 and slopes[-1] > 0.2e-9


def test_a_student_that_learns_against_it_brings_it_down_to_chance() -> None:
    """And only so: its answers become those of the teacher, which it is shown by the critic's slope alone."""
    right, _, middles = played(-MIDDLE, MIDDLE, 600, share=1.0)
    assert sum(right[20:50]) / 30 > 0.75
    assert sum(right[-200:]) / 200 == pytest.approx(0.5, abs=0.06)
    torch.testing.assert_close(middles[-200:].mean(0), MIDDLE, rtol=0, atol=0.3)


# --- settings


def source(*critics: dict[str, Any], **changes: Any) -> SourceSettings:
    return SourceSettings.model_validate({"audio": "memory", "teacher": "folder", "critics": list(critics), **changes})


def test_critics_are_told_apart_by_what_they_judge() -> None:
    asked = source({}, {"samples": "frames"}, LAYERS, soft=1.0).knowledge()
    assert [one.name for one in asked] == ["soft", "critics:outputs:events", "critics:outputs:frames", "critics:layer-1:layer-2:events"]  # fmt: skip
    assert ["hidden" in one.needs for one in asked] == [False, False, False, True]


@pytest.mark.parametrize(
    ("critics", "changes", "message"),
    [
        ([{"student": "layer.1"}], {}, "critics judge a layer of each, student and teacher, or without both the outputs"),
        ([{}, {}], {}, "critics:outputs:events is asked for twice"),
        ([{}], {"teacher": None}, "learns what somebody answers; give targets or a teacher"),
        ([{}], {"temperature": 2.0}, "temperature is for soft targets that are learned frame by frame; leave it out with critics of outputs"),
        ([{}], {"teacher": None, "targets": ["a", "b"]}, "a list of targets combines stored targets, and critics of outputs need them as they were stored"),
        ([{}], {"teacher": None, "targets": "a", "resample": True}, "resample changes stored targets, and critics of outputs"),
        ([LAYERS], {"teacher": {"run": "other"}}, "needs hidden states, and another run gives its logits alone"),
    ],
)  # fmt: skip
def test_what_does_not_go_together(critics: list[dict[str, Any]], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        source(*critics, **changes)
