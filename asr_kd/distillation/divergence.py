"""Response knowledge by other divergences than the cross-entropy, of the student's distribution p from the teacher's q.

A sparse target has the probabilities of the units that were kept, and the mass r of all others. All divergences here are of distributions
over those units and one class more, everything that was not kept, with the student's mass on it summed. For an f-divergence this is a
lower bound of that over all units, and exact where p and q differ by a factor outside what was kept.

What a sure teacher's spike does to a student that gives its unit the probability ε differs: the gradient of the forward divergence (and of the
cross-entropy) on its logit is ε - 1, that of all others goes to 0 with ε. From fresh weights, which say blank everywhere, they cannot raise a
spike: start from a trained student, or let `teacher_share` rise from 0 to 1, so that the target stays within reach.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from asr_kd.config.schedule import value_at
from asr_kd.distillation.kind_settings import DivergenceSettings
from asr_kd.distillation.knowledge import Seen
from asr_kd.distillation.response import Soft

#: least probability of a class whose logarithm is taken; the teacher's are normalised again
FLOOR = 1e-6
#: frames whose teacher leaves less than this to all units but its best teach nothing about those: only rounding is there
UNSURE = 0.02
#: a unit whose probabilities differ less than this over a batch's frames (standard deviation) has no course to compare
STEADY = 1e-4


class Divergent(Soft):
    """`divergence`: a divergence of each learned frame's distribution from the teacher's."""

    def of_frames(self, seen: Seen, rows: Tensor) -> Tensor:
        """See `Soft`."""
        units, probs, tail = (seen.parts[f"soft.{name}"].values for name in ("units", "probs", "tail"))
        return losses(rows, units, probs, tail, self.settings, seen.done)


def losses(
    logits: Tensor, units: Tensor, probs: Tensor, tail: Tensor, asked: DivergenceSettings, done: float = 0.0
) -> Tensor:
    """The divergence that is asked for, float [frames].

    Args:
        logits: float [frames, units].
        units: int64 [frames, k], as of `coarse`.
        probs: float [frames, k].
        tail: float [frames].
        asked: which, and its numbers.
        done: share of the phase's audio that was heard.
    """
    alpha, beta = value_at(asked.alpha, done), value_at(asked.beta, done)
    if asked.kind == "pearson":
        return correlations(logits, units, probs, tail, alpha, beta)
    classes = coarse(logits, units, probs, tail)
    share = value_at(asked.teacher_share, done)
    return divergence(classes if share >= 1 else towards(classes, share), asked.kind, alpha, beta)


class Classes(NamedTuple):
    """Log-probabilities over the kept units of each frame and, last, all others; 0 where `there` is false.

    Attributes:
        teacher: float [frames, k + 1], the best unit first.
        student: float [frames, k + 1].
        there: bool [frames, k + 1], which are classes: a frame may have kept fewer than k units, or all there are.
    """

    teacher: Tensor
    student: Tensor
    there: Tensor


def coarse(logits: Tensor, units: Tensor, probs: Tensor, tail: Tensor) -> Classes:
    """Distributions over what was kept, and the rest as one class.

    Args:
        logits: float [frames, units].
        units: int64 [frames, k], kept unit ids, the best first.
        probs: float [frames, k], their probabilities, 0 where there is none.
        tail: float [frames], probability that was not kept.
    """
    exact = torch.float64 if logits.dtype == torch.float64 else torch.float32
    probs, tail = probs.to(exact), tail.to(exact)
    kept = probs > 0
    units = torch.where(kept, units, units[:, :1])  # empty entries repeat the best unit: the kept set is {units}
    log_probs = logits.to(exact).log_softmax(-1)
    inside = torch.zeros_like(log_probs, dtype=torch.bool).scatter_(1, units, True)
    all_kept = inside.all(-1)
    # a row without any other unit has its logarithm of 0 replaced before the sum: its gradient would be NaN
    outside = log_probs.masked_fill(inside, -1e4).logsumexp(-1).clamp_min(-1e4)
    there = torch.cat([kept, ~all_kept[:, None]], 1)
    teacher = torch.cat([probs, tail[:, None]], 1).clamp_min(FLOOR) * there
    teacher = (teacher / teacher.sum(-1, keepdim=True)).masked_fill(~there, 1.0).log()
    student = torch.cat([log_probs.gather(1, units), outside[:, None]], 1).masked_fill(~there, 0.0)
    return Classes(teacher, student, there)


def towards(classes: Classes, share: float) -> Classes:
    """The teacher's distribution to the power `share` times the student's to the rest, normalised, as the teacher's.

    The student's part has no gradient. With dense targets this interpolates logits (TAID, arXiv 2501.16937).
    """
    mixed = share * classes.teacher + (1 - share) * classes.student.detach()
    mixed = mixed.masked_fill(~classes.there, -torch.inf).log_softmax(-1)
    return classes._replace(teacher=mixed.masked_fill(~classes.there, 0.0))


def divergence(classes: Classes, kind: str, alpha: float, beta: float) -> Tensor:
    """Float [frames], at least 0, and 0 where student and teacher agree (nat, but `variation`).

    - `forward`: KL(q‖p); `reverse`: KL(p‖q), which seeks the teacher's best answer and gives up the others (MiniLLM, Gu et al. 2023,
      arXiv 2306.08543);
    - `jensen`: with M = βq + (1-β)p, (β KL(q‖M) + (1-β) KL(p‖M)) / (β(1-β)): the forward one as β → 0, the reverse one as β → 1
      (generalised Jensen-Shannon; GKD, Agarwal et al. 2023, arXiv 2306.13649);
    - `skewed`: KL(q‖αq + (1-α)p); `skewed_reverse`: KL(p‖αp + (1-α)q) (DistiLLM, Ko et al. 2024, arXiv 2402.03898);
    - `variation`: ½ Σ|q - p|, which one wrong frame can move by 1 at most;
    - `decoupled`: α times KL of the teacher's best unit against all others, and β times KL among those others (Zhao et al. 2022,
      arXiv 2203.08679).

    Args:
        classes: of the frames.
        kind: which.
        alpha: of `skewed`, `skewed_reverse` and `decoupled`.
        beta: of `jensen` and `decoupled`.
    """
    lq, lp, there = classes
    q, p = lq.exp() * there, lp.exp() * there
    if kind == "forward":
        return (q * (lq - lp)).sum(-1)
    if kind == "reverse":
        return (p * (lp - lq)).sum(-1)
    if kind == "variation":
        return (q - p).abs().sum(-1) / 2
    if kind == "jensen":
        middle = _mixed(lq, lp, beta)
        apart = beta * (q * (lq - middle)).sum(-1) + (1 - beta) * (p * (lp - middle)).sum(-1)
        return apart / (beta * (1 - beta))
    if kind == "skewed":
        return (q * (lq - _mixed(lq, lp, alpha))).sum(-1)
    if kind == "skewed_reverse":
        return (p * (lp - _mixed(lp, lq, alpha))).sum(-1)
    return _decoupled(classes, alpha, beta)


def _mixed(first: Tensor, second: Tensor, share: float) -> Tensor:
    """log(share · exp(first) + (1 - share) · exp(second))."""
    weights = torch.tensor([share, 1 - share], dtype=first.dtype, device=first.device).log()
    return torch.logaddexp(first + weights[0], second + weights[1])


def _decoupled(classes: Classes, alpha: float, beta: float) -> Tensor:
    lq, lp, there = classes
    others = there.clone()
    others[:, 0] = False
    rest_q, rest_p = (rows.masked_fill(~others, -1e4).logsumexp(-1) for rows in (lq, lp))
    best = lq[:, 0].exp() * (lq[:, 0] - lp[:, 0]) + rest_q.exp() * (rest_q - rest_p)
    among = (lq - rest_q[:, None]).masked_fill(~others, -1e4)
    apart = torch.where(others, among.exp() * (among - (lp - rest_p[:, None])), 0.0).sum(-1)
    unsure = (rest_q.exp() > UNSURE) & (others.sum(-1) > 1)
    best = torch.where(others.any(-1), best, 0.0)
    return alpha * best + beta * torch.where(unsure, apart, 0.0)


def correlations(logits: Tensor, units: Tensor, probs: Tensor, tail: Tensor, alpha: float, beta: float) -> Tensor:
    """DIST (Huang et al. 2022, arXiv 2205.10536): α (1 - ρ) over the units of each frame, and β (1 - ρ) over the frames of each unit.

    ρ is Pearson's correlation of the teacher's probabilities with the student's: their scale does not matter, only their course. Tails are
    spread evenly. The second term is a mean over the units that the teacher's opinion moves on, and counts in every frame.

    Args:
        logits: float [frames, units].
        units: int64 [frames, k], as of `coarse`.
        probs: float [frames, k].
        tail: float [frames].
        alpha: weight over the units of a frame.
        beta: weight over the frames of a unit.

    Returns:
        float [frames], each between 0 and 2 (α + β).
    """
    exact = torch.float64 if logits.dtype == torch.float64 else torch.float32
    student = logits.to(exact).softmax(-1)
    if not len(student):
        return student.sum(-1)
    kept = probs > 0
    spread = tail.to(exact) / (student.shape[1] - kept.sum(-1)).clamp_min(1)
    teacher = torch.zeros_like(student).scatter_add_(1, units, torch.where(kept, probs.to(exact), 0.0))
    held = torch.zeros_like(student).scatter_add_(1, units, kept.to(exact)) > 0
    teacher = torch.where(held, teacher, spread[:, None])
    of_frame = 1 - _pearson(teacher, student)
    moves = teacher.std(0, correction=0) > STEADY
    of_unit = torch.where(moves, 1 - _pearson(teacher.T, student.T), 0.0).sum() / moves.sum().clamp_min(1)
    return alpha * of_frame + beta * of_unit


def _pearson(one: Tensor, other: Tensor) -> Tensor:
    """Correlation of the rows of two matrices; 0 where the first does not vary, and a bounded slope where the second does not."""
    one, other = (rows - rows.mean(-1, keepdim=True) for rows in (one, other))
    scale = (one.square().sum(-1) * (other.square().sum(-1) + 1e-8) + 1e-20).sqrt()
    return (one * other).sum(-1) / scale
