"""A Conformer encoder from torchaudio, full context: a teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from asr_kd.models.network import AcousticModel, Condition, Outputs, within
from asr_kd.models.settings import ModelSettings


class ConformerModel(AcousticModel):
    """Linear input, torchaudio's Conformer (Gulati et al. 2020, arXiv 2005.08100), linear output."""

    def __init__(self, settings: ModelSettings, inputs: int, num_units: int) -> None:
        super().__init__()
        from torchaudio.models import Conformer

        size, layers = settings.size, settings.layers
        self.input = nn.Linear(inputs, size)
        self.encoder = Conformer(size, settings.heads, 4 * size, layers, settings.kernel, settings.dropout)
        self.output = nn.Linear(size, num_units)
        self.conditioned = frozenset(settings.conditioned)
        self.condition = Condition(num_units, size) if self.conditioned else None
        self.lookahead_frames = None
        self.taps = settings.taps
        self._within: Any = None
        # torchaudio masks padding in its attention but not in its convolutions, so that an utterance's output would
        # depend on what it was batched with; zeroing the input of each depthwise convolution fixes that.
        for layer in self.encoder.conformer_layers:
            layer.conv_module.sequential[2].register_forward_pre_hook(self._mask_padding)

    def _mask_padding(self, module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        masked: Tensor = inputs[0] * self._within
        return masked

    def forward(self, features: Tensor, lengths: Tensor, taps: Sequence[str] = ()) -> Outputs:
        inside, held = within(features, lengths), {}
        self._within = inside[:, None]
        hidden = self.input(features).transpose(0, 1)
        # layer by layer, as the encoder itself does, which returns only the last
        for number, layer in enumerate(self.encoder.conformer_layers, 1):
            if (tap := f"attention.{number}") in taps:
                hidden, asked = _with_attention(layer, hidden, ~inside)
                held[tap] = asked.transpose(0, 1)
            else:
                hidden = layer(hidden, ~inside)
            if (tap := f"layer.{number}") in taps:
                held[tap] = hidden.transpose(0, 1)
            if self.condition and number in self.conditioned:
                hidden, logits = self.condition(hidden, self.output, nn.Identity())
                held[f"logits.{number}"] = logits.transpose(0, 1)
        return Outputs(self.output(hidden.transpose(0, 1)), lengths, held)


def _with_attention(layer: Any, hidden: Tensor, outside: Tensor) -> tuple[Tensor, Tensor]:
    """A layer's output, and the queries, keys and values of its attention, [frames, batch, 3 × size]."""
    heard: list[Tensor] = []
    with layer.self_attn_layer_norm.register_forward_hook(lambda module, inputs, output: heard.append(output)):
        hidden = layer(hidden, outside)
    return hidden, nn.functional.linear(heard[0], layer.self_attn.in_proj_weight, layer.self_attn.in_proj_bias)
