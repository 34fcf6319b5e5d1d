"""Learning rate and frozen weights of a phase."""

from __future__ import annotations

import math

from torch import nn

from asr_kd.errors import UserError
from asr_kd.training.settings import PhaseSettings


def learning_rate(plan: PhaseSettings, done: float) -> float:
    """Linear warm-up, then a cosine from the peak to its final share; `done` is the share of the phase's audio."""
    if done < plan.warmup:
        return plan.learning_rate * max(done / plan.warmup, 0.01)
    after = min(1.0, (done - plan.warmup) / max(1 - plan.warmup, 1e-9))
    return plan.learning_rate * (plan.final_rate + (1 - plan.final_rate) * (1 + math.cos(math.pi * after)) / 2)


def freeze(model: nn.Module, plan: PhaseSettings, where: str) -> None:
    """Freeze the weights whose names begin as `plan.frozen` says, and no others.

    Raises:
        UserError: when no weight begins so.
    """
    names = [name for name, _ in model.named_parameters()]
    for prefix in plan.frozen:
        if not any(name.startswith(prefix) for name in names):
            known = ", ".join(sorted({name.partition(".")[0] for name in names}))
            raise UserError(f"{where}: no weight begins with {prefix}; the network has {known}")
    for name, weight in model.named_parameters():
        weight.requires_grad_(not name.startswith(tuple(plan.frozen)))
