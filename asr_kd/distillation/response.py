"""Response knowledge: the cross-entropy of the student's full softmax against a sparse teacher distribution.

The student's softmax always runs over every unit: restricted to the kept units, its other outputs would not be trained.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from asr_kd.config.schedule import value_at
from asr_kd.distillation.knowledge import Knowledge, Seen, Task
from asr_kd.distillation.settings import Asked, MissingMass
from asr_kd.distillation.timing import best_delay, later, near_speech
from asr_kd.errors import UserError


class Soft(Knowledge):
    """`soft`: each learned frame's distribution."""

    def __init__(self, asked: Asked, task: Task) -> None:
        super().__init__(asked, task)
        delays = task.source and task.source.delays
        if delays and round(delays.most_ms / task.features.frame_ms) < 1:
            raise UserError(
                f"delays.most_ms: {delays.most_ms:g} is no whole frame of {task.features.frame_ms} ms; raise it"
            )

    def loss(self, seen: Seen) -> Tensor:
        source = self.task.source
        assert source is not None
        if not source.delays:
            return self._learned(seen).sum()
        most = round(source.delays.most_ms / self.task.features.frame_ms)
        losses = torch.stack([self._learned(later(seen, delay)) for delay in range(most + 1)])
        return best_delay(losses, seen.utterances, source.delays.sharpness).sum()

    def _learned(self, seen: Seen) -> Tensor:
        """The loss of each learned frame, 0 where nothing is learned of it."""
        source, frame_ms = self.task.source, self.task.features.frame_ms
        assert source is not None
        temperature = value_at(source.temperature, seen.done)
        # gradients by logits at a temperature are smaller by its square (Hinton et al. 2015, arXiv 1503.02531)
        losses = self.of_frames(seen, seen.rows / temperature) * temperature**2
        if source.select:
            before, after = (round(span / frame_ms) for span in (source.select.before_ms, source.select.after_ms))
            losses = torch.where(near_speech(seen, before, after), losses, 0.0)
        return losses

    def of_frames(self, seen: Seen, rows: Tensor) -> Tensor:
        """Loss of each learned frame with the logits `rows` [learned frames, units], here the cross-entropy."""
        units, probs, tail = (seen.parts[f"soft.{name}"].values for name in ("units", "probs", "tail"))
        priors, prior = (
            part.values if (part := seen.parts.get(f"soft.{name}")) else None for name in ("priors", "prior")
        )
        return soft_cross_entropy(rows, units, probs, tail, self.task.missing_mass, priors, prior)


def divergence_from(answer: Tensor, own: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(p of `answer` ‖ p of `own`) in nat at a temperature, times its square, summed over frames; `answer` gets no gradient.

    Both are logits [frames, units], of networks that are there in the step.
    """
    told = (answer.detach() / temperature).log_softmax(-1)
    said = (own / temperature).log_softmax(-1)
    return (told.exp() * (told - said)).sum() * temperature**2


def soft_cross_entropy(
    logits: Tensor,
    units: Tensor,
    probs: Tensor,
    tail: Tensor,
    missing: MissingMass = "ghost",
    priors: Tensor | None = None,
    prior: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of each frame against its soft target, in the memory of one (frames × units) tensor.

    With t the kept probabilities, r the mass left over and p the student's softmax, the loss of a frame is

    - `renormalise`: -Σ t/(1-r) log p: the kept units share all the mass (biased towards them);
    - `ghost`: -Σ t log p - r log(Σ p over units not kept): the units that were not kept count as one class;
    - `prior`: r is spread over the units not kept, in proportion to a prior;
    - `uniform`: r is spread over them evenly.

    It can be differentiated once, and by the logits only.

    Args:
        logits: float [frames, units].
        units: int64 [frames, k], unit id of each kept entry, the best first; any where `probs` is 0.
        probs: float [frames, k], probability of each kept entry, 0 where there is none.
        tail: float [frames], probability that was not kept.
        missing: what to do with `tail`.
        priors: float [distributions, units], each above 0 and adding up to 1, for `prior`.
        prior: int64 [frames], row of `priors` for each frame; None: the first.

    Returns:
        float32 [frames] (float64 for float64 logits).
    """
    if missing == "prior" and priors is None:
        raise ValueError("the policy prior needs priors")
    return _SoftCrossEntropy.apply(logits, units, probs, tail, missing, priors, prior)


class _SoftCrossEntropy(torch.autograd.Function):
    """The gradient by the logits is p - q for every policy, q the (completed) target: p and gradient share one buffer."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, units: Tensor, probs: Tensor, tail: Tensor, missing: MissingMass,
        priors: Tensor | None, prior: Tensor | None,
    ) -> Tensor:  # fmt: skip
        exact = torch.float64 if logits.dtype == torch.float64 else torch.float32
        probs, tail = probs.to(exact), tail.to(exact)
        empty = probs <= 0
        units = torch.where(empty, units[:, :1], units)  # empty entries repeat the best unit: the kept set is {units}
        gradient = logits.softmax(-1, dtype=exact)
        largest, best = logits.max(-1, keepdim=True)
        normaliser = largest.to(exact) - gradient.gather(1, best).log()
        kept = logits.gather(1, units).to(exact)
        # if all units of a frame are kept, its tail can only be rounding
        tail = tail.masked_fill((~empty).sum(-1) == logits.shape[1], 0.0)
        if missing == "renormalise":
            probs = probs / probs.sum(-1, keepdim=True)
        loss = -(probs * (kept - normaliser)).sum(-1)
        if missing == "ghost":
            own = gradient.gather(1, units)
            others = gradient.scatter_(1, units, 0.0).sum(-1).clamp_min(torch.finfo(exact).tiny)
            loss = loss - tail * others.log()
            gradient.mul_((1.0 - tail / others)[:, None])
            gradient.scatter_(1, units, own)
        elif missing != "renormalise":
            loss = loss + _spread(gradient, logits, normaliser[:, 0], units, kept, empty, tail, missing, priors, prior)
        gradient.scatter_add_(1, units, -probs)
        ctx.save_for_backward(gradient)
        ctx.dtype = logits.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        # nothing else uses the buffer, so it becomes the logits' gradient in place
        return gradient.mul_(grad_loss[:, None]).to(ctx.dtype), None, None, None, None, None, None


def _spread(
    gradient: Tensor, logits: Tensor, normaliser: Tensor, units: Tensor, kept: Tensor, empty: Tensor, tail: Tensor,
    missing: MissingMass, priors: Tensor | None, prior: Tensor | None,
) -> Tensor:  # fmt: skip
    """The loss of `tail`, spread over the units not kept; its part of q is subtracted from `gradient` in place."""
    frames, num_units = logits.shape
    if missing == "uniform" or priors is None:
        priors = tail.new_full((1, num_units), 1.0 / num_units)
        prior = None
    priors = priors.to(tail)
    which = torch.zeros(frames, dtype=torch.int64, device=units.device) if prior is None else prior
    own = priors[which[:, None], units].masked_fill(empty, 0.0)
    # the prior's mass on units not kept; in float32 it can be lost in rounding
    left = (1.0 - own.sum(-1)).clamp_min(torch.finfo(tail.dtype).eps)
    share = tail / left
    expected = (logits.to(tail.dtype) @ priors.T).gather(1, which[:, None])[:, 0]
    loss = -share * (expected - (own * kept).sum(-1) - left * normaliser)
    weights = torch.zeros(frames, len(priors), dtype=tail.dtype, device=tail.device)
    weights.scatter_(1, which[:, None], share[:, None])
    gradient.addmm_(weights, priors, alpha=-1.0)
    gradient.scatter_add_(1, units, share[:, None] * own)
    return loss
