"""Processes that train a network which runs on rounded weights: what they average are slopes of its float weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from asr_kd.models.acoustic import build_model
from asr_kd.models.network import AcousticModel
from asr_kd.models.settings import ModelSettings
from asr_kd.training.distributed.ddp import DataParallel
from asr_kd.training.distributed.ranks import Ranks

Together = Callable[[int, Callable[..., dict[str, Any]]], list[dict[str, Any]]]


def network() -> AcousticModel:
    torch.manual_seed(0)
    return build_model(ModelSettings(layers=2, size=12, projection=6, dropout=0.0, bits=2), 8, 5)


def loss(model: torch.nn.Module, rank: int) -> Tensor:
    features = torch.randn(3, 10, 8, generator=torch.Generator().manual_seed(rank))
    logits: Tensor = model(features, torch.full((3,), 10)).logits
    return logits.square().mean()


def slopes(ranks: Ranks) -> dict[str, Tensor]:
    model = network()
    exchange = DataParallel(model, ranks)
    loss(exchange.network, ranks.rank).backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def test_two_take_the_step_of_one_with_both_batches(together: Together) -> None:
    first, second = together(2, slopes)
    model = network()
    ((loss(model, 0) + loss(model, 1)) / 2).backward()
    assert first.keys() == dict(model.named_parameters()).keys()
    for name, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.abs().sum() > 0
        torch.testing.assert_close(first[name], weight.grad, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(second[name], first[name], rtol=0, atol=0)
