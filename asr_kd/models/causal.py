"""A depthwise convolution that hears no future, of the whole or piece by piece."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class CausalDepthwise(nn.Module):
    """Each channel by itself over the last `kernel` frames; before the first frame there are zeros."""

    def __init__(self, size: int, kernel: int) -> None:
        super().__init__()
        # of one row in two dimensions: twice as fast on a CPU as torch's convolution in one, which copies what lies time first
        self.convolution = nn.Conv2d(size, size, (1, kernel), groups=size)
        self.before = kernel - 1

    def forward(self, frames: Tensor, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Of frames [batch, frames, size], after those `before` [batch, kernel - 1, size]: as many, and the `before` of the next."""
        if before is None:
            before = frames.new_zeros(len(frames), self.before, frames.shape[2])
        heard = torch.cat([before, frames], 1)
        new = self.convolution(heard.mT[:, :, None])[:, :, 0].mT
        return new, heard[:, heard.shape[1] - self.before :]
