"""Causal depthwise-separable convolutions: a streaming network without recurrence (Kriman et al. 2019, arXiv 1910.10261, made causal)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from asr_kd.models.causal import CausalDepthwise
from asr_kd.models.network import AcousticModel, Condition, Outputs, within
from asr_kd.models.settings import ModelSettings


class Layer(nn.Module):
    """Over time channel by channel, then over channels frame by frame, with a residual connection; normalised within each frame."""

    def __init__(self, size: int, kernel: int, dropout: float) -> None:
        super().__init__()
        self.over_time, self.over_channels = CausalDepthwise(size, kernel), nn.Linear(size, size)
        self.norm, self.dropout = nn.LayerNorm(size), nn.Dropout(dropout)

    def forward(self, hidden: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        """Of [batch, frames, size]: as many, and what the next frames need."""
        new, after = self.over_time(hidden, before)
        return hidden + self.dropout(torch.relu(self.norm(self.over_channels(new)))), after


class SeparableModel(AcousticModel):
    """Linear input, layers, linear output. It hears layers * (kernel - 1) frames back, and as far ahead as its output is delayed."""

    streams = True

    def __init__(self, settings: ModelSettings, inputs: int, num_units: int) -> None:
        super().__init__()
        size = settings.size
        self.input = nn.Linear(inputs, size)
        self.layers = nn.ModuleList(Layer(size, settings.kernel, settings.dropout) for _ in range(settings.layers))
        self.output = nn.Linear(size, num_units)
        self.conditioned = frozenset(settings.conditioned)
        self.condition = Condition(num_units, size) if self.conditioned else None
        self.delay = self.lookahead_frames = settings.delay_frames
        self.taps = settings.taps

    def forward(self, features: Tensor, lengths: Tensor, taps: Sequence[str] = ()) -> Outputs:
        inside = within(features, lengths)[..., None]
        heard = nn.functional.pad(features * inside, (0, 0, 0, self.delay))
        logits, _, held = self._run(heard, None, taps)
        return Outputs(logits[:, self.delay :], lengths, {name: one[:, self.delay :] for name, one in held.items()})

    def stream(self, features: Tensor, state: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        return self._run(features, state, ())[:2]

    def _run(
        self, features: Tensor, state: list[Tensor] | None, taps: Sequence[str]
    ) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
        """Logits [batch, frames, units], the new state, and what is held of the hidden states, none of it aligned."""
        hidden, held, after = self.input(features), {}, []
        for number, layer in enumerate(self.layers, 1):
            hidden, one = layer(hidden, None if state is None else state[number - 1])
            after.append(one)
            if (tap := f"layer.{number}") in taps:
                held[tap] = hidden
            if self.condition and number in self.conditioned:
                hidden, held[f"logits.{number}"] = self.condition(hidden, self.output, nn.Identity())
        return self.output(hidden), after, held
