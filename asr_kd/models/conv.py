"""A convolutional network of small context: it sees too little around a frame to emit units early or late, a good aligner."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from asr_kd.models.network import AcousticModel, Outputs, within
from asr_kd.models.settings import ModelSettings


class ConvModel(AcousticModel):
    """Convolutions over time with residual connections; context is layers * (kernel - 1) / 2 frames to each side."""

    def __init__(self, settings: ModelSettings, inputs: int, num_units: int) -> None:
        super().__init__()
        layers, size, kernel = settings.layers, settings.size, settings.kernel
        widths = [inputs] + [size] * layers
        self.convolutions = nn.ModuleList(
            nn.Conv1d(before, after, kernel, padding=kernel // 2) for before, after in pairwise(widths)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(size) for _ in range(layers))
        self.dropout = nn.Dropout(settings.dropout)
        self.output = nn.Linear(size, num_units)
        self.lookahead_frames = layers * (kernel // 2)
        self.taps = settings.taps

    def forward(self, features: Tensor, lengths: Tensor, taps: Sequence[str] = ()) -> Outputs:
        inside = within(features, lengths)[..., None]
        hidden, held = features, {}
        for layer, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True), 1):
            # masked before each layer: past the end there must be zeros, not activations of padding
            new = convolution((hidden * inside).transpose(1, 2)).transpose(1, 2)
            new = self.dropout(torch.relu(norm(new)))
            hidden = new + hidden if new.shape == hidden.shape else new
            if (tap := f"layer.{layer}") in taps:
                held[tap] = hidden
        return Outputs(self.output(hidden), lengths, held)
