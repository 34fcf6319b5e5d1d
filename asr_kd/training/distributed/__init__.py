"""Several processes training one model: DDP, with or without compressed gradients, and block-wise model-update filtering."""

from __future__ import annotations

import torch
from torch import nn

from asr_kd.training.distributed.bmuf import Bmuf
from asr_kd.training.distributed.compression import PowerSgd, ThresholdCompression
from asr_kd.training.distributed.ddp import DataParallel
from asr_kd.training.distributed.exchange import Exchange
from asr_kd.training.distributed.ranks import Ranks
from asr_kd.training.settings import DistributedSettings


def make_exchange(
    model: nn.Module, optimizer: torch.optim.Optimizer, settings: DistributedSettings, ranks: Ranks
) -> Exchange:
    """The exchange that `settings` ask for; a single process needs none, whatever they say.

    Args:
        model: what is trained, a `Pupil`.
        optimizer: its moments are averaged or reset by BMUF.
        settings: which exchange.
        ranks: who takes part.
    """
    if ranks.world == 1:
        return Exchange(model, ranks)
    if settings.method == "bmuf":
        return Bmuf(model, optimizer, settings.bmuf, ranks)
    if settings.compression == "threshold":
        return ThresholdCompression(model, settings.threshold, ranks)
    if settings.compression == "powersgd":
        return PowerSgd(model, settings.powersgd, ranks)
    return DataParallel(model, ranks)
