"""A small-context convolutional network: it hears too little around a frame to place a spike early, so it makes a good aligner."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn


class ConvModel(nn.Module):
    """Convolutions over time with residual connections; context is layers * (kernel - 1) / 2 frames to each side."""

    def __init__(self, inputs: int, units: int, layers: int, size: int, dropout: float, kernel: int) -> None:
        super().__init__()
        widths = [inputs] + [size] * layers
        self.convolutions = nn.ModuleList(
            nn.Conv1d(before, after, kernel, padding=kernel // 2) for before, after in pairwise(widths)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(size) for _ in range(layers))
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(size, units)
        self.lookahead_frames: int | None = layers * (kernel // 2)

    def forward(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        within = torch.arange(features.shape[1], device=features.device)[None, :] < lengths.to(features.device)[:, None]
        hidden = features
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            # masked before each layer: what lies past the end must look like silence's zeros, not like activations
            new = convolution((hidden * within[..., None]).transpose(1, 2)).transpose(1, 2)
            new = self.dropout(torch.relu(norm(new)))
            hidden = new + hidden if new.shape == hidden.shape else new
        return self.output(hidden), lengths
