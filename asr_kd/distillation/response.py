"""Response knowledge: the cross-entropy of the student's full softmax against a sparse teacher distribution.

The student's softmax always runs over every unit. Restricting it to the kept units would leave the rest of the student free.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

MissingMass = Literal["renormalise", "ghost", "uniform"]


def soft_cross_entropy(
    logits: Tensor, units: Tensor, probs: Tensor, tail: Tensor, missing: MissingMass = "ghost"
) -> Tensor:
    """Cross-entropy of each frame against its soft target, without a second (frames × units) tensor.

    With t the kept probabilities, r the mass left over and p the student's softmax, the loss of a frame is

    - `renormalise`: -Σ t/(1-r) log p: the kept units share all the mass (biased towards them);
    - `ghost`: -Σ t log p - r log(Σ p over units not kept): what was not kept counts as one class;
    - `uniform`: as if r were spread evenly over the units not kept.

    Args:
        logits: float [frames, units].
        units: int64 [frames, k], unit of each kept entry, the best first; anything where `probs` is 0.
        probs: float [frames, k], probability of each kept entry, 0 where there is none.
        tail: float [frames], probability that was not kept.
        missing: what is done about `tail`.

    Returns:
        float32 [frames] (float64 for float64 logits).
    """
    return _SoftCrossEntropy.apply(logits, units, probs, tail, missing)


class _SoftCrossEntropy(torch.autograd.Function):
    """Every policy's gradient on the logits is p - q, with q the (completed) target: one buffer serves p and gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, units: Tensor, probs: Tensor, tail: Tensor, missing: MissingMass) -> Tensor:
        logits = logits if logits.dtype == torch.float64 else logits.float()
        probs, tail = probs.to(logits.dtype), tail.to(logits.dtype)
        empty = probs <= 0
        units = torch.where(empty, units[:, :1], units)  # so that the kept set is {units}, whatever fills empty places
        normaliser = logits.logsumexp(-1, keepdim=True)
        gradient = (logits - normaliser).exp_()
        kept_log_probs = logits.gather(1, units) - normaliser
        if missing == "renormalise":
            probs = probs / probs.sum(-1, keepdim=True)
            tail = torch.zeros_like(tail)
        loss = -(probs * kept_log_probs).sum(-1)
        if missing == "ghost":
            kept = gradient.gather(1, units)
            gradient.scatter_(1, units, 0.0)
            others = gradient.sum(-1).clamp_min(torch.finfo(logits.dtype).tiny)
            # a frame whose kept units are all units has no ghost; its tail can only be rounding
            tail = torch.where((~empty).sum(-1) < logits.shape[1], tail, torch.zeros_like(tail))
            loss = loss - tail * others.log()
            gradient.mul_((1.0 - tail / others)[:, None])
            gradient.scatter_(1, units, kept)
        elif missing == "uniform":
            rest = logits.shape[1] - (~empty).sum(-1)
            share = torch.where(rest > 0, tail / rest.clamp_min(1), torch.zeros_like(tail))
            unkept_log_probs = (
                logits.sum(-1) - logits.shape[1] * normaliser[:, 0] - kept_log_probs.masked_fill(empty, 0.0).sum(-1)
            )
            loss = loss - share * unkept_log_probs
            gradient.sub_(share[:, None])
            gradient.scatter_add_(1, units, share[:, None] * (~empty))
        gradient.scatter_add_(1, units, -probs)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_loss[:, None], None, None, None, None
