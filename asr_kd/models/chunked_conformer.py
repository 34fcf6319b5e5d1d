"""A Conformer that streams: attention within a chunk and some frames before it, convolutions that hear no future.

As in WeNet (Zhang et al. 2020, arXiv 2012.05481), with chunks of one size. Of Gulati et al. (2020, arXiv 2005.08100) the block is kept, but for
the batch normalisation, which mixes frames: all is normalised within each frame. Where a frame lies to another is a learned bias of attention, by
their distance (Raffel et al. 2019, arXiv 1910.10683).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from asr_kd.models.causal import CausalDepthwise
from asr_kd.models.network import AcousticModel, Condition, Outputs, within
from asr_kd.models.settings import ModelSettings

#: of a layer: keys and values [batch, left, 2 × size], and input of the convolution [batch, kernel - 1, size], of the frames before
Before = tuple[Tensor, Tensor]
#: frames that were run, `Before` of each layer, and features [batch, frames, inputs] of a chunk that is not full
State = tuple[int, list[Before], Tensor]


class ChunkedAttention(nn.Module):
    """Self-attention in which each frame hears its chunk and `left_frames` before it."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        size, self.heads = settings.size, settings.heads
        self.chunk, self.left = settings.chunk_frames, settings.left_frames
        self.query, self.key_value = nn.Linear(size, size), nn.Linear(size, 2 * size)
        self.output = nn.Linear(size, size)
        #: [heads, distances], from the first frame heard by the last of a chunk to the last one heard by the first
        self.bias = nn.Parameter(torch.zeros(self.heads, self.left + 2 * self.chunk - 1))

    def forward(self, frames: Tensor, past: int, before: Tensor | None) -> tuple[Tensor, Tensor]:
        """Of whole chunks [batch, frames, size]: as many, and keys and values [batch, left, 2 × size] for the next.

        Args:
            past: frames before these.
            before: keys and values of the last `left` of them; None at the start.
        """
        batch, count, size = frames.shape
        key_value = self.key_value(frames)
        if before is None:
            before = key_value.new_zeros(batch, self.left, 2 * size)
        heard = torch.cat([before, key_value], 1)
        windows = heard.unfold(1, self.left + self.chunk, self.chunk)  # [batch, chunks, 2 × size, window]
        key, value = windows.unflatten(2, (2, self.heads, -1)).unbind(2)  # [batch, chunks, heads, width, window]
        query = self.query(frames).unflatten(1, (-1, self.chunk)).unflatten(3, (self.heads, -1)).transpose(2, 3)
        here, there = (torch.arange(length, device=frames.device) for length in (self.chunk, self.left + self.chunk))
        scores = query @ key * query.shape[-1] ** -0.5 + self.bias[:, there - here[:, None] + self.chunk - 1]
        # before the first frame there is nothing to hear
        begins = past - self.left + self.chunk * torch.arange(count // self.chunk, device=frames.device)
        nothing = (begins[:, None] + there < 0)[:, None, None]
        said = scores.masked_fill(nothing, -torch.inf).softmax(-1) @ value.mT
        said = said.transpose(2, 3).reshape(batch, count, size)
        return self.output(said), heard[:, heard.shape[1] - self.left :]


class Layer(nn.Module):
    """Half a feed-forward layer, attention, convolution, half a feed-forward layer."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        size, self.dropout = settings.size, nn.Dropout(settings.dropout)
        self.first, self.second = (_feed_forward(size, settings.dropout) for _ in range(2))
        self.attention_norm = nn.LayerNorm(size)
        self.attention = ChunkedAttention(settings)
        self.gated = nn.Sequential(nn.LayerNorm(size), nn.Linear(size, 2 * size), nn.GLU())
        self.over_time = CausalDepthwise(size, settings.kernel)
        self.over_channels = nn.Sequential(nn.LayerNorm(size), nn.SiLU(), nn.Linear(size, size))
        self.norm = nn.LayerNorm(size)

    def forward(self, hidden: Tensor, past: int, before: Before | None) -> tuple[Tensor, Before]:
        """Of whole chunks [batch, frames, size], after `past` frames: as many, and what the next need."""
        attended, convolved = (None, None) if before is None else before
        hidden = hidden + 0.5 * self.first(hidden)
        new, attended = self.attention(self.attention_norm(hidden), past, attended)
        hidden = hidden + self.dropout(new)
        new, convolved = self.over_time(self.gated(hidden), convolved)
        hidden = hidden + self.dropout(self.over_channels(new))
        return self.norm(hidden + 0.5 * self.second(hidden)), (attended, convolved)


def _feed_forward(size: int, dropout: float) -> nn.Module:
    inner = nn.Sequential(nn.LayerNorm(size), nn.Linear(size, 4 * size), nn.SiLU(), nn.Dropout(dropout))
    return nn.Sequential(inner, nn.Linear(4 * size, size), nn.Dropout(dropout))


class ChunkedConformerModel(AcousticModel):
    """Linear input, layers, linear output. A frame is answered for when its chunk is full: the first of a chunk looks ahead furthest."""

    streams = True

    def __init__(self, settings: ModelSettings, inputs: int, num_units: int) -> None:
        super().__init__()
        size, self.chunk = settings.size, settings.chunk_frames
        self.input = nn.Linear(inputs, size)
        self.layers = nn.ModuleList(Layer(settings) for _ in range(settings.layers))
        self.output = nn.Linear(size, num_units)
        self.conditioned = frozenset(settings.conditioned)
        self.condition = Condition(num_units, size) if self.conditioned else None
        self.lookahead_frames = self.chunk - 1
        self.taps = settings.taps

    def forward(self, features: Tensor, lengths: Tensor, taps: Sequence[str] = ()) -> Outputs:
        frames, inside = features.shape[1], within(features, lengths)[..., None]
        # the last chunk is filled with zeros, which are heard, as a stream would have them
        heard = nn.functional.pad(features * inside, (0, 0, 0, -frames % self.chunk))
        logits, _, held = self._run(heard, 0, None, taps)
        return Outputs(logits[:, :frames], lengths, {name: one[:, :frames] for name, one in held.items()})

    def stream(self, features: Tensor, state: State | None) -> tuple[Tensor, State]:
        past, before, waiting = state or (0, [], features[:, :0])
        heard = torch.cat([waiting, features], 1)
        full = heard.shape[1] // self.chunk * self.chunk
        if not full:
            return features.new_zeros(len(features), 0, self.output.out_features), (past, before, heard)
        logits, before, _ = self._run(heard[:, :full], past, before, ())
        return logits, (past + full, before, heard[:, full:])

    def _run(
        self, features: Tensor, past: int, before: list[Before] | None, taps: Sequence[str]
    ) -> tuple[Tensor, list[Before], dict[str, Tensor]]:
        """Of whole chunks: logits [batch, frames, units], what the next chunks need, and what is held of the hidden states."""
        hidden, held, after = self.input(features), {}, []
        for number, layer in enumerate(self.layers, 1):
            hidden, one = layer(hidden, past, before[number - 1] if before else None)
            after.append(one)
            if (tap := f"layer.{number}") in taps:
                held[tap] = hidden
            if self.condition and number in self.conditioned:
                hidden, held[f"logits.{number}"] = self.condition(hidden, self.output, nn.Identity())
        return self.output(hidden), after, held
