"""Heads on lower layers of the student: early answers that learn from the text, from the teacher and from the student's own top.

A head is a linear layer beside the student, from the hidden state of one layer to the units, and is dropped when the student leaves.
What it learns also forms the layers below it. With its three weights it is

- `ctc`: intermediate CTC (Lee & Watanabe 2021, arXiv 2102.03216);
- `soft`: the teacher's soft targets at a lower layer too, as in Inter-KD (Yoon et al. 2022, arXiv 2211.15075);
- `top`: the student's own last layer as the teacher of the lower one (Zhang et al. 2019, arXiv 1905.08094), frame by frame (Kim, Kim & Lee
  2024, arXiv 2406.07909). Both hear the same frames with the same delay, so there is no timing to agree on.

With `shared` the head is the student's own output layer, where the network is conditioned on what it says there (`model.conditioned`; Nozaki &
Komatsu 2021, arXiv 2104.02724).
"""

from __future__ import annotations

from torch import Tensor, nn

from asr_kd.config.schedule import value_at
from asr_kd.distillation.ctc import ctc_loss
from asr_kd.distillation.knowledge import Seen
from asr_kd.distillation.response import Soft, divergence_from
from asr_kd.models.network import Outputs


class LayerHead(nn.Linear):
    """Logits [batch, frames, units] of a hidden state of the student."""

    def __init__(self, layer: str, width: int, units: int) -> None:
        super().__init__(width, units)
        self.layer = layer

    def forward(self, outputs: Outputs, features: Tensor, lengths: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return {"logits": super().forward(outputs.hidden[self.layer])}


class SharedHead(nn.Module):
    """Logits [batch, frames, units] that the student's output layer gives at a layer that it is conditioned on."""

    def __init__(self, layer: str) -> None:
        super().__init__()
        self.said = layer.replace("layer.", "logits.")

    def forward(self, outputs: Outputs, features: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        return {"logits": outputs.hidden[self.said]}


class Head(Soft):
    """`heads`: one head, with its losses weighted."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self.taps, self.alone = (self.settings.layer,), bool(self.settings.ctc or self.settings.top)

    def beside(self) -> nn.Module:
        if self.settings.shared:
            return SharedHead(self.settings.layer)
        assert self.task.units is not None
        return LayerHead(self.settings.layer, self.task.model.taps[self.settings.layer], self.task.units.size)

    def loss(self, seen: Seen) -> Tensor:
        """See `Knowledge`."""
        settings = self.settings
        logits = seen.beside["logits"].to(seen.logits.dtype)
        rows = logits[seen.learned]
        ctc, soft, top = (value_at(weight, seen.done) for weight in (settings.ctc, settings.soft, settings.top))
        loss = rows.sum() * 0.0  # a graph, whatever the weights are now
        # what has a weight at some time has its parts in every batch, what has none may lack them
        if ctc:
            loss = loss + ctc * ctc_loss(logits.log_softmax(-1), seen.lengths, seen.parts["text"])
        if soft and "soft.units" in seen.parts:  # else nobody has answered
            loss = loss + soft * self.of_frames(seen, rows).sum()
        if top:
            loss = loss + top * divergence_from(seen.rows, rows, settings.temperature)
        return loss
