"""LSTM networks, the paper's family: bidirectional teachers and unidirectional students with an output delay."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from asr_kd.models.factored import FactoredLstm, ProjectedLstm, apart, jointly
from asr_kd.models.network import AcousticModel, Condition, Outputs, within
from asr_kd.models.settings import ModelSettings


class LstmModel(AcousticModel):
    """Stacked LSTM layers and a linear output.

    An output delay (unidirectional only) is undone inside: `delay` zero frames are appended to the input and the first
    `delay` outputs are dropped.
    """

    def __init__(self, settings: ModelSettings, inputs: int, num_units: int) -> None:
        super().__init__()
        layers, size, bidirectional = settings.layers, settings.size, settings.kind == "blstm"
        self.delay = settings.delay_frames
        width = settings.width
        widths = [inputs] + [width] * (layers - 1)
        self.projection, self.rank = settings.projection or 0, settings.rank or 0

        def layer(inputs: int) -> nn.Module:
            if self.rank:
                return FactoredLstm(inputs, size, self.rank)
            if self.projection:
                return ProjectedLstm(inputs, size, self.projection)
            return nn.LSTM(inputs, size, batch_first=True)

        # A second LSTM over the reversed utterance, in place of torch's bidirectional layer: that needs packed sequences
        # to keep padding out, which train at a third of the speed on a CPU.
        self.forwards = nn.ModuleList(layer(inputs) for inputs in widths)
        self.backwards = nn.ModuleList(layer(inputs) for inputs in (widths if bidirectional else []))
        self._initialise()
        self.dropout = nn.Dropout(settings.dropout)
        self.output = nn.Linear(width, num_units)
        self.conditioned = frozenset(settings.conditioned)
        self.condition = Condition(num_units, width) if self.conditioned else None
        self.lookahead_frames = None if bidirectional else self.delay
        self.streams = not bidirectional
        self.taps = settings.taps

    def _initialise(self) -> None:
        """Forget gates open at the start: with torch's default, CTC predicts only blanks for hundreds of steps more."""
        for lstm in [*self.forwards, *self.backwards]:
            if isinstance(lstm, FactoredLstm):
                lstm.initialise()
                continue
            for name, weight in lstm.named_parameters():
                if "weight_ih" in name or "weight_hr" in name:
                    nn.init.xavier_uniform_(weight)
                elif "weight_hh" in name:
                    for gate in weight.data.chunk(4):
                        nn.init.orthogonal_(gate)
                else:
                    nn.init.zeros_(weight)
                    if "bias_ih" in name:
                        weight.data.chunk(4)[1].fill_(1.0)  # the forget gate

    def forward(self, features: Tensor, lengths: Tensor, taps: Sequence[str] = ()) -> Outputs:
        hidden, held, inside = features, {}, within(features, lengths)
        if self.delay:
            hidden = nn.functional.pad(features * inside[..., None], (0, 0, 0, self.delay))
        # position of each frame in the reversed utterance; padding is not moved
        position, ends = torch.arange(features.shape[1], device=features.device), lengths.to(features.device)[:, None]
        reversed_at = torch.where(inside, ends - 1 - position, position)
        for layer, forwards in enumerate(self.forwards):
            inputs = self.dropout(hidden) if layer else hidden
            hidden = forwards(inputs)[0]
            if self.backwards:
                backwards = self.backwards[layer](_reordered(inputs, reversed_at))[0]
                hidden = torch.cat([hidden, _reordered(backwards, reversed_at)], dim=-1)
            if (tap := f"layer.{layer + 1}") in taps:
                held[tap] = hidden[:, self.delay :]
            if self.condition and layer + 1 in self.conditioned:
                hidden, logits = self.condition(hidden, self.output, self.dropout)
                held[f"logits.{layer + 1}"] = logits[:, self.delay :]
        return Outputs(self.output(self.dropout(hidden[:, self.delay :])), lengths, held)

    def stream(
        self, features: Tensor, state: list[tuple[Tensor, Tensor]] | None
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        hidden, after = features, []
        for layer, forwards in enumerate(self.forwards):
            hidden, one = forwards(self.dropout(hidden) if layer else hidden, None if state is None else state[layer])
            after.append(one)
            if self.condition and layer + 1 in self.conditioned:
                hidden, _ = self.condition(hidden, self.output, self.dropout)
        return self.output(self.dropout(hidden)), after

    def begin_as(self, other: AcousticModel, layers: Sequence[int] | None = None) -> None:
        """Take the weights of another LSTM, as any network; one of full rank, without a projection, is thinned to this network's.

        Raises:
            RuntimeError: it is another network.
        """
        weights = other.weights_of(layers)
        if self.rank:
            weights = apart(weights, self.rank)
        if self.projection:
            weights = jointly(weights, self.projection)
        self.load_state_dict(weights)


def _reordered(values: Tensor, at: Tensor) -> Tensor:
    """values[b, at[b, t]] for values [batch, frames, width] and at int64 [batch, frames]."""
    return values.gather(1, at[..., None].expand(-1, -1, values.shape[2]))
