"""LSTM networks, the paper's family: bidirectional teachers and unidirectional students with an output delay."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


class LstmModel(nn.Module):
    """Stacked LSTM layers and a linear output.

    Args:
        delay: frames of future input seen before the output for a frame is given (unidirectional only). The delay is
            undone inside: the input is continued by `delay` zero frames and the first `delay` outputs are dropped.
    """

    def __init__(
        self, inputs: int, units: int, layers: int, size: int, dropout: float, bidirectional: bool, delay: int
    ) -> None:
        super().__init__()
        self.delay = delay
        self.lstm = nn.LSTM(
            inputs, size, layers, batch_first=True, bidirectional=bidirectional, dropout=dropout if layers > 1 else 0.0
        )
        self._initialise()
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(size * (2 if bidirectional else 1), units)
        #: how far the output looks ahead, in frames; None for the whole utterance
        self.lookahead_frames: int | None = None if bidirectional else delay

    def _initialise(self) -> None:
        """Gates that remember from the start: with torch's default, CTC stays on the blank for hundreds of steps more."""
        for name, weight in self.lstm.named_parameters():
            if "weight_ih" in name:
                nn.init.xavier_uniform_(weight)
            elif "weight_hh" in name:
                for gate in weight.data.chunk(4):
                    nn.init.orthogonal_(gate)
            else:
                nn.init.zeros_(weight)
                if "bias_ih" in name:
                    weight.data.chunk(4)[1].fill_(1.0)  # the forget gate

    def forward(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        frames = features.shape[1]
        if self.lstm.bidirectional:
            packed = pack_padded_sequence(features, lengths.cpu(), batch_first=True, enforce_sorted=False)
            hidden = pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=frames)[0]
        else:
            # padding lies in the future, so a causal network needs no packing
            if self.delay:
                within = torch.arange(frames, device=features.device)[None, :] < lengths.to(features.device)[:, None]
                features = nn.functional.pad(features * within[..., None], (0, 0, 0, self.delay))
            hidden = self.lstm(features)[0][:, self.delay :]
        return self.output(self.dropout(hidden)), lengths
