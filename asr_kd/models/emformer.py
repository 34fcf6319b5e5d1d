"""torchaudio's Emformer (Shi et al. 2020, arXiv 2010.10759): attention within a segment, a left and a right context, and a memory of earlier segments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from asr_kd.models.network import AcousticModel, Condition, Outputs, within
from asr_kd.models.settings import ModelSettings

#: the state of each layer, as torchaudio has it, none at the start; and features [batch, frames, inputs] that wait for a full segment
State = tuple[list[list[Tensor]], Tensor]


class EmformerModel(AcousticModel):
    """Linear input, torchaudio's Emformer layers, linear output; `chunk_frames` is the segment's length.

    Whole utterances go through the layers at once, under a mask; a stream goes segment by segment. The right context of each segment is
    computed for it alone, so that the look-ahead does not grow with the layers.
    """

    streams = True

    def __init__(self, settings: ModelSettings, inputs: int, num_units: int) -> None:
        super().__init__()
        from torchaudio.models import Emformer

        size = settings.size
        self.segment, self.right = settings.chunk_frames, settings.right_frames
        self.left, self.memory = settings.left_frames, settings.memory
        self.input = nn.Linear(inputs, size)
        self.encoder = Emformer(
            size, settings.heads, 4 * size, settings.layers, self.segment, settings.dropout, left_context_length=self.left,
            right_context_length=self.right, max_memory_size=self.memory,
        )  # fmt: skip
        self.output = nn.Linear(size, num_units)
        self.conditioned = frozenset(settings.conditioned)
        self.condition = Condition(num_units, size) if self.conditioned else None
        self.lookahead_frames = self.segment - 1 + self.right
        self.taps = settings.taps

    def forward(self, features: Tensor, lengths: Tensor, taps: Sequence[str] = ()) -> Outputs:
        batch, frames, _ = features.shape
        segments = -(-frames // self.segment)
        whole, device = segments * self.segment, features.device
        # the last segment and its right context are filled with zeros, which are heard, as a stream would have them
        heard = features * within(features, lengths)[..., None]
        heard = nn.functional.pad(heard, (0, 0, 0, whole + self.right - frames))
        hidden = self.input(heard).transpose(0, 1)
        behind = torch.arange(1, segments + 1, device=device)[:, None] * self.segment
        # of each segment, one after another
        right = hidden[(behind + torch.arange(self.right, device=device)).flatten()]
        hidden = hidden[:whole]
        mask, full = self._mask(segments, device), torch.full((batch,), whole, device=device)
        memory, held = self._summaries(hidden)[:-1], {}
        for number, layer in enumerate(self.encoder.emformer_layers, 1):
            hidden, right, memory = layer(hidden, full, right, memory, mask)
            if (tap := f"layer.{number}") in taps:
                held[tap] = hidden
            hidden, right, logits = self._conditioned(number, hidden, right)
            if logits is not None:
                held[f"logits.{number}"] = logits
        held = {name: one.transpose(0, 1)[:, :frames] for name, one in held.items()}
        return Outputs(self.output(hidden.transpose(0, 1)[:, :frames]), lengths, held)

    def stream(self, features: Tensor, state: State | None) -> tuple[Tensor, State]:
        before, waiting = state or ([], features[:, :0])
        heard = torch.cat([waiting, features], 1)
        said = [features.new_zeros(len(features), 0, self.output.out_features)]
        while heard.shape[1] >= self.segment + self.right:
            logits, before = self._next(heard[:, : self.segment + self.right], before)
            said.append(logits)
            heard = heard[:, self.segment :]
        return torch.cat(said, 1), (before, heard)

    def _next(self, features: Tensor, before: list[list[Tensor]]) -> tuple[Tensor, list[list[Tensor]]]:
        """Of a segment and its right context: logits [batch, segment, units], and the new state of the layers."""
        hidden, right = self.input(features).transpose(0, 1).split([self.segment, self.right])
        full, after = torch.full((len(features),), self.segment, device=features.device), []
        memory = self._summaries(hidden)
        for number, layer in enumerate(self.encoder.emformer_layers, 1):
            own = list(before[number - 1]) if before else None  # the layer writes into the list
            hidden, right, own, memory = layer.infer(hidden, full, right, own, memory)
            after.append(own)
            hidden, right, _ = self._conditioned(number, hidden, right)
        return self.output(hidden.transpose(0, 1)), after

    def _conditioned(self, number: int, hidden: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """A layer's output, and that for the right contexts, as the next layer hears them; and the logits, if there are any."""
        if not self.condition or number not in self.conditioned:
            return hidden, right, None
        (hidden, logits), (right, _) = (self.condition(one, self.output, nn.Identity()) for one in (hidden, right))
        return hidden, right, logits

    def _summaries(self, hidden: Tensor) -> Tensor:
        """Means of whole segments [frames, batch, size], which the first layer has for memory; nothing without a memory."""
        return hidden.unflatten(0, (-1, self.segment)).mean(1) if self.memory else hidden.new_empty(0)

    def _mask(self, segments: int, device: torch.device) -> Tensor:
        """Bool [queries, keys], where a query may not look.

        Queries are right contexts, frames, and with a memory a summary of each segment; keys summaries of all segments but the last,
        right contexts, and frames. A summary hears no other.
        """
        numbers = torch.arange(segments, device=device)
        right, frames = numbers.repeat_interleave(self.right), torch.arange(segments * self.segment, device=device)
        summaries = numbers if self.memory else numbers[:0]
        asks = torch.cat([right, numbers.repeat_interleave(self.segment), summaries])[:, None]
        earlier = (summaries[:-1] < asks) & (summaries[:-1] >= asks - self.memory)
        earlier[len(asks) - len(summaries) :] = False
        begin, end = asks * self.segment - self.left, (asks + 1) * self.segment
        return ~torch.cat([earlier, right == asks, (frames >= begin) & (frames < end)], 1)
