from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from asr_kd.distillation.divergence import coarse, correlations, divergence, towards
from asr_kd.distillation.settings import DivergenceSettings, SourceSettings
from asr_kd.training.settings import TrainSettings
from asr_kd.training.trainer import train
from tests.distillation.test_response import draw_target

#: kind, alpha, beta
KINDS = [
    ("forward", 1.0, 1.0), ("reverse", 1.0, 1.0), ("jensen", 1.0, 0.5), ("jensen", 1.0, 0.1), ("skewed", 0.1, 1.0),
    ("skewed_reverse", 0.1, 1.0), ("variation", 1.0, 1.0), ("decoupled", 1.0, 2.0),
]  # fmt: skip
Target = tuple[Tensor, Tensor, Tensor]


def dense_classes(logits: Tensor, target: Target, row: int) -> tuple[list[float], list[Tensor]]:
    """Of one frame, the teacher's and the student's probabilities of the kept units, and of all others, if there are any."""
    units, probs, tail = target
    kept = [(int(unit), float(prob)) for unit, prob in zip(units[row], probs[row], strict=True) if prob > 0]
    others = [unit for unit in range(logits.shape[1]) if unit not in dict(kept)]
    q, p = [prob for _, prob in kept], [logits[row].softmax(-1)[unit] for unit, _ in kept]
    if others:
        q, p = [*q, float(tail[row])], [*p, logits[row].softmax(-1)[others].sum()]
    q = [max(value, 1e-6) for value in q]
    return [value / sum(q) for value in q], p


def by_hand(q: list[float], p: list[Tensor], kind: str, alpha: float, beta: float) -> Tensor:
    def log(value: Any) -> Tensor:
        return torch.as_tensor(value, dtype=torch.float64).log()

    def kl(one: Any, other: Any) -> Tensor:
        terms = [a * (log(a) - log(b)) for a, b in zip(one, other, strict=True)]
        return torch.stack(terms).sum()

    def mixed(one: Any, other: Any, share: float) -> list[Any]:
        return [share * a + (1 - share) * b for a, b in zip(one, other, strict=True)]

    if kind == "decoupled":
        if len(q) == 1:
            return p[0] * 0
        first = kl([q[0], sum(q[1:])], [p[0], sum(p[1:])])
        if len(q) < 3 or sum(q[1:]) <= 0.02:
            return alpha * first
        return alpha * first + beta * kl([one / sum(q[1:]) for one in q[1:]], [one / sum(p[1:]) for one in p[1:]])
    if kind == "jensen":
        middle = mixed(q, p, beta)
        return (beta * kl(q, middle) + (1 - beta) * kl(p, middle)) / (beta * (1 - beta))
    return {
        "forward": lambda: kl(q, p), "reverse": lambda: kl(p, q), "skewed": lambda: kl(q, mixed(q, p, alpha)),
        "skewed_reverse": lambda: kl(p, mixed(p, q, alpha)),
        "variation": lambda: torch.stack([(a - b).abs() for a, b in zip(p, q, strict=True)]).sum() / 2,
    }[kind]()  # fmt: skip


def drawn(seed: int, frames: int, num_units: int, k: int) -> tuple[Tensor, Target]:
    rng = np.random.default_rng(seed)
    target = draw_target(rng, frames, num_units, k, "anything")[:3]
    return torch.from_numpy(rng.normal(0, 2, (frames, num_units))), target


def value(logits: Tensor, target: Target, kind: str, alpha: float, beta: float) -> Tensor:
    return divergence(coarse(logits, *target), kind, alpha, beta)


@pytest.mark.parametrize(("kind", "alpha", "beta"), KINDS)
@given(seed=st.integers(0, 2**32 - 1), num_units=st.integers(1, 9), k=st.integers(1, 6))
def test_value_and_gradient_are_those_of_the_definition(
    kind: str, alpha: float, beta: float, seed: int, num_units: int, k: int
) -> None:
    logits, target = drawn(seed, 3, num_units, k)
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    found = value(ours, target, kind, alpha, beta)
    expected = torch.stack([by_hand(*dense_classes(theirs, target, row), kind, alpha, beta) for row in range(3)])
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-7)
    assert (found > -1e-9).all()
    gradients = [
        torch.autograd.grad(one.sum(), of, allow_unused=True)[0] for one, of in ((found, ours), (expected, theirs))
    ]
    torch.testing.assert_close(
        gradients[0], torch.zeros_like(logits) if gradients[1] is None else gradients[1], atol=1e-9, rtol=1e-6
    )


@pytest.mark.parametrize(("kind", "alpha", "beta"), KINDS)
def test_zero_where_both_agree_and_with_no_slope(kind: str, alpha: float, beta: float) -> None:
    logits = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    probs, units = logits.detach().softmax(-1).sort(-1, descending=True)
    for k in (1, 4, 7):
        target = units[:, :k], probs[:, :k], (1 - probs[:, :k].sum(-1)).clamp_min(0)
        found = value(logits, target, kind, alpha, beta)
        torch.testing.assert_close(found, torch.zeros(5, dtype=torch.float64), atol=1e-9, rtol=0)
        if kind != "variation":  # it has a corner there
            assert torch.autograd.grad(found.sum(), logits)[0].abs().max() < 1e-8


@given(seed=st.integers(0, 2**32 - 1))
def test_what_is_known_of_them(seed: int) -> None:
    logits, target = drawn(seed, 4, 8, 8)

    def of(kind: str, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
        return value(logits, target, kind, alpha, beta)

    forward, variation = of("forward"), of("variation")
    assert (variation <= (forward / 2).sqrt() + 1e-9).all() and (variation <= 1).all()  # Pinsker
    assert (0.25 * of("jensen", beta=0.5) <= math.log(2) + 1e-9).all()
    assert (of("skewed", alpha=0.1) <= math.log(10) + 1e-9).all()
    torch.testing.assert_close(of("jensen", beta=1e-7), forward, rtol=2e-3, atol=1e-4)
    torch.testing.assert_close(of("jensen", beta=1 - 1e-7), of("reverse"), rtol=2e-3, atol=1e-4)
    torch.testing.assert_close(of("skewed", alpha=1e-9), forward, rtol=1e-3, atol=1e-5)


def test_best_against_the_rest_and_among_it_are_the_whole() -> None:
    """KL = the first part + (1 - q of the best unit) times the second."""
    logits, target = drawn(3, 1, 6, 4)
    rest = 1 - float(coarse(logits, *target).teacher[0, 0].exp())
    whole = value(logits, target, "decoupled", 1.0, rest)
    torch.testing.assert_close(whole, value(logits, target, "forward", 1.0, 1.0))


@pytest.mark.parametrize(("kind", "alpha", "beta"), [*KINDS, ("pearson", 1.0, 1.0)])
@pytest.mark.parametrize("doubt", [1e-1, 1e-3, 1e-6])
def test_only_the_forward_divergence_raises_a_spike_that_the_student_does_not_know(
    kind: str, alpha: float, beta: float, doubt: float
) -> None:
    """The teacher is sure of unit 1, the student gives it `doubt`: the slope of its logit is doubt - 1, or vanishes with the doubt."""
    logits = torch.tensor([[1 - doubt, doubt]], dtype=torch.float64).log().requires_grad_()
    target = torch.tensor([[1, 0]]), torch.tensor([[1 - 1e-6, 1e-6]], dtype=torch.float64), torch.zeros(1)
    found = correlations(logits, *target, alpha, 0.0) if kind == "pearson" else value(logits, target, kind, alpha, beta)
    slope = -float(torch.autograd.grad(found.sum(), logits)[0][0, 1])
    if kind in ("forward", "decoupled"):
        assert slope == pytest.approx(1 - doubt, rel=1e-3)
    elif kind != "pearson":
        assert 0 <= slope < 200 * doubt


def test_a_share_of_the_student_interpolates_logits() -> None:
    logits, teacher = torch.randn(2, 4, 6, dtype=torch.float64)
    probs, units = teacher.softmax(-1).sort(-1, descending=True)
    classes = coarse(logits.requires_grad_(), units, probs, torch.zeros(4))
    mixed = towards(classes, 0.3)
    expected = (0.3 * teacher + 0.7 * logits.detach()).log_softmax(-1).gather(1, units)
    torch.testing.assert_close(mixed.teacher[:, :6], expected, atol=1e-5, rtol=1e-5)
    assert not mixed.teacher.requires_grad
    assert divergence(towards(classes, 0.0), "forward", 1, 1).abs().max() < 1e-9
    torch.testing.assert_close(towards(classes, 1.0).teacher[:, :6], classes.teacher[:, :6])


@given(seed=st.integers(0, 2**32 - 1), frames=st.integers(1, 6), num_units=st.integers(2, 8))
def test_correlations_are_those_of_numpy(seed: int, frames: int, num_units: int) -> None:
    logits, target = drawn(seed, frames, num_units, num_units)
    student = logits.softmax(-1).numpy()
    kept = target[1] > 0
    spread = target[2] / (num_units - kept.sum(-1)).clamp_min(1)
    teacher = spread[:, None].repeat(1, num_units).numpy()
    for row in range(frames):
        teacher[row, target[0][row][kept[row]]] = target[1][row][kept[row]]

    def rho(one: np.ndarray, other: np.ndarray) -> float:
        return 0.0 if one.std() < 1e-9 or other.std() < 1e-9 else float(np.corrcoef(one, other)[0, 1])

    rows = [1 - rho(teacher[row], student[row]) for row in range(frames)]
    moving = [unit for unit in range(num_units) if teacher[:, unit].std() > 1e-4]
    columns = sum(1 - rho(teacher[:, unit], student[:, unit]) for unit in moving) / max(1, len(moving))
    found = correlations(logits, *target, 2.0, 3.0)
    np.testing.assert_allclose(found.numpy(), [2 * one + 3 * columns for one in rows], atol=0.05)


def test_correlations_know_no_scale_and_no_nan() -> None:
    logits = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    probs = logits.detach().softmax(-1)
    units = torch.arange(5).expand(4, 5)
    flatter = 0.3 * probs + 0.7 / 5
    torch.testing.assert_close(
        correlations(logits, units, flatter, torch.zeros(4), 1, 1),
        torch.zeros(4, dtype=torch.float64),
        atol=1e-5,
        rtol=0,
    )
    even = torch.full((4, 5), 0.2, dtype=torch.float64)
    found = correlations(logits, units, even, torch.zeros(4), 1.0, 1.0)
    assert torch.autograd.grad(found.sum(), logits)[0].abs().max() == 0
    nothing = correlations(logits[:0], units[:0], probs[:0], torch.zeros(0), 1.0, 1.0)
    assert nothing.shape == (0,) and nothing.sum().requires_grad


@pytest.mark.parametrize(("kind", "alpha", "beta"), KINDS)
def test_gradients_hold_in_float64_and_bfloat16_stays_finite(kind: str, alpha: float, beta: float) -> None:
    logits, target = drawn(7, 3, 6, 3)
    if kind != "variation":  # which has corners
        assert torch.autograd.gradcheck(lambda rows: value(rows, target, kind, alpha, beta), logits.requires_grad_())
    rough = (100 * logits.detach()).bfloat16().requires_grad_()
    found = value(rough, target, kind, alpha, beta)
    assert found.dtype == torch.float32 and found.isfinite().all()
    assert torch.autograd.grad(found.sum(), rough)[0].isfinite().all()


@pytest.mark.parametrize("kind", [*dict.fromkeys(kind for kind, _, _ in KINDS), "pearson"])
def test_each_trains_a_student_that_has_begun(job: Callable[..., TrainSettings], tmp_path: Path, kind: str) -> None:
    train(job(output=str(tmp_path / "start"), phase={"passes": 6}))
    settings: dict[str, Any] = {"kind": kind}
    if kind.startswith("skewed"):
        settings["alpha"] = {"start": 0.3, "end": 0.1}
    if kind == "jensen":
        settings["beta"] = 0.5
    run = job(output=str(tmp_path / "run"), init=str(tmp_path / "start"), source={"divergence": settings})
    train(run)
    rows = [line for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    losses = [float(line.split('"loss": ')[1].split(",")[0]) for line in rows]
    assert np.mean(losses[-4:]) < np.mean(losses[:4])


def test_what_was_not_kept_is_one_class(job: Callable[..., TrainSettings]) -> None:
    with pytest.raises(ValueError, match="set missing_mass to ghost"):
        job(source={"divergence": {"kind": "reverse"}}, missing_mass="uniform")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "jensen"}, "jensen needs beta between 0 and 1"),
        ({"kind": "skewed"}, "skewed needs alpha between 0 and 1"),
        ({"kind": "reverse", "beta": 0.5}, "beta belongs to kind jensen and decoupled and pearson alone"),
        ({"kind": "pearson", "teacher_share": 0.5}, "teacher_share belongs to all kinds but pearson"),
        ({"kind": "forward", "teacher_share": {"start": 0.0, "end": 2.0}}, "teacher_share must not be above 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DivergenceSettings.model_validate(settings)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"divergence": {"kind": "reverse"}, "spikes": {}}, "divergence and spikes are two ways to learn soft targets"),
        ({"divergence": {"kind": "reverse"}, "soft": 0.0, "ctc": 1.0}, "divergence needs a soft weight above 0"),
        ({"select": {}, "sequences": {}}, "select is for soft targets that are learned frame by frame"),
        ({"delays": {}, "spikes": {}}, "delays is for soft targets that are learned frame by frame"),
    ],
)
def test_what_does_not_go_together(source: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SourceSettings.model_validate({"audio": "a", "targets": "t", "soft": 1.0} | source)
