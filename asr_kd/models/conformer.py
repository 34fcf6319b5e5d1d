"""A Conformer encoder from torchaudio, full context: a teacher."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from asr_kd.models.network import AcousticModel, Outputs


class ConformerModel(AcousticModel):
    """Linear input, torchaudio's Conformer (Gulati et al. 2020, arXiv 2005.08100), linear output."""

    def __init__(
        self, inputs: int, num_units: int, layers: int, size: int, dropout: float, kernel: int, heads: int
    ) -> None:
        super().__init__()
        from torchaudio.models import Conformer

        self.input = nn.Linear(inputs, size)
        self.encoder = Conformer(size, heads, 4 * size, layers, kernel, dropout)
        self.output = nn.Linear(size, num_units)
        self.lookahead_frames = None
        self.taps = {f"layer.{layer}": size for layer in range(1, layers + 1)}
        self._within: Tensor | None = None
        # torchaudio masks padding in its attention but not in its convolutions, so that an utterance's output would
        # depend on what it was batched with; zeroing the input of each depthwise convolution fixes that.
        for layer in self.encoder.conformer_layers:
            layer.conv_module.sequential[2].register_forward_pre_hook(self._mask_padding)

    def _mask_padding(self, module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        assert self._within is not None
        return inputs[0] * self._within

    def forward(self, features: Tensor, lengths: Tensor, taps: Sequence[str] = ()) -> Outputs:
        """See `AcousticModel`."""
        lengths_here = lengths.to(features.device)
        self._within = (torch.arange(features.shape[1], device=features.device)[None, :] < lengths_here[:, None])[
            :, None, :
        ]
        held: dict[str, Tensor] = {}
        # torchaudio's encoder returns only its last layer: hooks catch the others
        hooks = [
            layer.register_forward_hook(
                lambda _, __, out, tap=f"layer.{number}": held.update({tap: out.transpose(0, 1)})
            )
            for number, layer in enumerate(self.encoder.conformer_layers, 1)
            if f"layer.{number}" in taps
        ]
        try:
            hidden, _ = self.encoder(self.input(features), lengths_here)
        finally:
            for hook in hooks:
                hook.remove()
        return Outputs(self.output(hidden), lengths, held)
