from __future__ import annotations

import itertools
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from asr_kd.distillation.response import MissingMass, soft_cross_entropy
from asr_kd.targets.posteriors import SparsePosteriors

POLICIES: tuple[MissingMass, ...] = get_args(MissingMass)
Target = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def dense_loss(
    logits: Tensor, units: Tensor, probs: Tensor, tail: Tensor, missing: str, priors: Tensor, prior: Tensor
) -> Tensor:
    """The definition, frame by frame and unit by unit, in whatever type the logits have; autograd does the rest."""
    losses = []
    for row, log_probs in enumerate(logits.log_softmax(-1)):
        kept = {int(unit): float(prob) for unit, prob in zip(units[row], probs[row], strict=True) if prob > 0}
        others = [unit for unit in range(logits.shape[1]) if unit not in kept]
        total = sum(kept.values())
        loss = logits.new_zeros(())
        for unit, prob in kept.items():
            loss = loss - (prob / total if missing == "renormalise" else prob) * log_probs[unit]
        if others and missing == "ghost":
            loss = loss - float(tail[row]) * log_probs[others].logsumexp(0)
        if others and missing == "uniform":
            loss = loss - float(tail[row]) / len(others) * log_probs[others].sum()
        if others and missing == "prior":
            shape = priors[prior[row]][others]
            loss = loss - float(tail[row]) * (shape / shape.sum() * log_probs[others]).sum()
        losses.append(loss)
    return torch.stack(losses)


def draw_target(rng: np.random.Generator, frames: int, num_units: int, k: int, empties: str) -> Target:
    """Frames with 1 to k units kept, empty places filled with what `empties` says; three priors, one for each frame."""
    units = np.zeros((frames, k), np.int64)
    probs, tail = np.zeros((frames, k)), np.zeros(frames)
    for row in range(frames):
        count = int(rng.integers(1, min(k, num_units) + 1))
        drawn = np.sort(rng.dirichlet(np.full(count + (count < num_units), 0.5)) + 1e-6)[::-1]
        drawn /= drawn.sum()
        probs[row, :count] = drawn[:count]
        tail[row] = drawn[count:].sum()
        units[row] = rng.integers(0, num_units, k) if empties == "anything" else 0
        units[row, :count] = rng.permutation(num_units)[:count]
    priors = rng.dirichlet(np.ones(num_units), 3) * 0.9 + 0.1 / num_units
    return (
        torch.from_numpy(units),
        torch.from_numpy(probs),
        torch.from_numpy(tail),
        torch.from_numpy(priors),
        torch.from_numpy(rng.integers(0, 3, frames)),
    )


def soft(logits: Tensor, target: Target, missing: MissingMass) -> Tensor:
    units, probs, tail, priors, prior = target
    return soft_cross_entropy(logits, units, probs, tail, missing, priors, prior)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), frames=st.integers(1, 4), num_units=st.integers(1, 12), k=st.integers(1, 14),
    scale=st.sampled_from([0.1, 3.0, 20.0]), empties=st.sampled_from(["zeros", "anything"]), missing=st.sampled_from(POLICIES),
)  # fmt: skip
def test_loss_and_gradient_are_those_of_the_definition(
    seed: int, frames: int, num_units: int, k: int, scale: float, empties: str, missing: MissingMass
) -> None:
    rng = np.random.default_rng(seed)
    target = draw_target(rng, frames, num_units, k, empties)
    values = torch.from_numpy(rng.normal(0, scale, (frames, num_units)))
    weights = torch.from_numpy(rng.uniform(0, 2, frames))
    ours, theirs = values.clone().requires_grad_(), values.clone().requires_grad_()
    loss, expected = soft(ours, target, missing), dense_loss(theirs, *target[:3], missing, *target[3:])
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    (loss * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("missing", POLICIES)
def test_float32_is_near_float64(missing: MissingMass) -> None:
    rng = np.random.default_rng(2)
    target = draw_target(rng, 50, 40, 8, "zeros")
    values = torch.from_numpy(rng.normal(0, 4, (50, 40)))
    results = []
    for kind in (torch.float64, torch.float32):
        logits = values.to(kind, copy=True).requires_grad_()
        loss = soft(logits, target, missing)
        assert loss.dtype == kind
        loss.sum().backward()
        assert logits.grad is not None
        results.append((loss.detach().double(), logits.grad.double()))
    for exact, rounded in zip(*results, strict=True):
        torch.testing.assert_close(rounded, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("missing", POLICIES)
def test_all_units_kept_is_plain_cross_entropy(missing: MissingMass) -> None:
    rng = np.random.default_rng(3)
    logits, full = torch.from_numpy(rng.normal(size=(4, 7))), torch.from_numpy(rng.dirichlet(np.ones(7), 4))
    order = full.argsort(1, descending=True)
    loss = soft_cross_entropy(logits, order, full.gather(1, order), torch.zeros(4), missing, full[:1])
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, full, reduction="none"))


def test_one_certain_unit_is_hard_cross_entropy() -> None:
    ids = np.array([2, 0, 0, 4])
    target = SparsePosteriors.from_alignment(ids, 5)
    logits = torch.from_numpy(np.random.default_rng(4).normal(size=(4, 5)))
    units, probs = target.padded(3)
    expected = torch.nn.functional.cross_entropy(logits, torch.from_numpy(ids), reduction="none")
    values = torch.from_numpy(units), torch.from_numpy(probs), torch.from_numpy(target.tail)
    for missing in POLICIES:
        loss = soft_cross_entropy(logits, *values, missing, torch.full((1, 5), 0.2))
        torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("missing", POLICIES)
def test_order_of_units_and_a_shift_of_logits_change_nothing(missing: MissingMass) -> None:
    rng = np.random.default_rng(5)
    units, probs, tail, priors, prior = draw_target(rng, 6, 9, 4, "zeros")
    logits = torch.from_numpy(rng.normal(size=(6, 9)))
    loss = soft_cross_entropy(logits, units, probs, tail, missing, priors, prior)
    torch.testing.assert_close(soft_cross_entropy(logits + 100.0, units, probs, tail, missing, priors, prior), loss)
    names = torch.from_numpy(rng.permutation(9))
    renamed, shapes = torch.empty_like(logits), torch.empty_like(priors)
    renamed[:, names], shapes[:, names] = logits, priors
    torch.testing.assert_close(soft_cross_entropy(renamed, names[units], probs, tail, missing, shapes, prior), loss)


def test_policies_are_ordered_by_what_they_ask_of_the_tail() -> None:
    rng = np.random.default_rng(6)
    target = draw_target(rng, 50, 12, 3, "zeros")
    logits = torch.from_numpy(rng.normal(size=(50, 12)))
    ghost, uniform = (soft(logits, target, missing) for missing in ("ghost", "uniform"))
    # merging classes loses information, so the loss over them is never the larger
    assert (ghost <= uniform + 1e-12).all() and (uniform - ghost).max() > 0.01


def test_the_teacher_itself_has_no_gradient() -> None:
    rng = np.random.default_rng(7)
    values = torch.from_numpy(rng.normal(0, 2, (5, 9)))
    full = values.softmax(-1)
    order = full.argsort(1, descending=True)[:, :4]
    probs = full.gather(1, order)
    logits = values.requires_grad_()
    soft_cross_entropy(logits, order, probs, 1 - probs.sum(1), "ghost").sum().backward()
    torch.testing.assert_close(logits.grad, torch.zeros_like(values), rtol=0, atol=1e-12)


@pytest.mark.parametrize("missing", POLICIES)
def test_extreme_logits_stay_finite(missing: MissingMass) -> None:
    logits = torch.tensor([[200.0, -200.0, 0.0, -50.0], [-200.0, 200.0, 0.0, 3.0]]).requires_grad_()
    units, probs = torch.tensor([[0, 3], [0, 0]]), torch.tensor([[0.6, 0.3], [0.9, 0.0]])
    priors = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    loss = soft_cross_entropy(logits, units, probs, torch.tensor([0.1, 0.1]), missing, priors)
    loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(logits.grad).all()


def test_half_precision_logits_are_summed_in_float32() -> None:
    target: Any = draw_target(np.random.default_rng(8), 3, 6, 2, "zeros")
    logits = torch.zeros(3, 6, dtype=torch.bfloat16, requires_grad=True)
    loss = soft_cross_entropy(logits, *target[:3])
    assert loss.dtype == torch.float32
    loss.sum().backward()
    assert logits.grad is not None and logits.grad.dtype == torch.bfloat16


def test_policies_differ() -> None:
    target = draw_target(np.random.default_rng(9), 4, 9, 2, "zeros")
    logits = torch.from_numpy(np.random.default_rng(9).normal(size=(4, 9)))
    losses = [soft(logits, target, missing) for missing in POLICIES]
    assert all(not torch.allclose(a, b) for a, b in itertools.combinations(losses, 2))


def test_an_even_prior_is_uniform() -> None:
    units, probs, tail, _, _ = draw_target(np.random.default_rng(10), 5, 9, 3, "anything")
    logits = torch.from_numpy(np.random.default_rng(10).normal(size=(5, 9)))
    even = soft_cross_entropy(logits, units, probs, tail, "prior", torch.full((1, 9), 1 / 9, dtype=torch.float64))
    torch.testing.assert_close(even, soft_cross_entropy(logits, units, probs, tail, "uniform"))


def test_the_policy_prior_needs_priors() -> None:
    units, probs, tail, _, _ = draw_target(np.random.default_rng(11), 2, 5, 2, "zeros")
    with pytest.raises(ValueError, match="priors"):
        soft_cross_entropy(torch.zeros(2, 5), units, probs, tail, "prior")


def test_a_second_backward_is_refused_and_not_wrong() -> None:
    target = draw_target(np.random.default_rng(12), 2, 5, 2, "zeros")
    logits = torch.zeros(2, 5, requires_grad=True)
    loss = soft(logits, target, "ghost").sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("missing", POLICIES)
def test_it_is_one_graph_for_a_compiler(missing: MissingMass) -> None:
    target = draw_target(np.random.default_rng(13), 4, 6, 2, "zeros")
    values = torch.from_numpy(np.random.default_rng(13).normal(size=(4, 6)))
    results = []
    compiled = torch.compile(soft, fullgraph=True, backend="aot_eager")
    for function in (soft, compiled):
        logits = values.clone().requires_grad_()
        loss = function(logits, target, missing)
        (loss * torch.arange(4.0)).sum().backward()
        assert logits.grad is not None
        results.append((loss.detach(), logits.grad))
    torch.testing.assert_close(*results)
