"""LSTM networks as nodes of a graph. ONNX orders gates i o f g, torch i f g o; both biases stay apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from asr_kd.export.graph import INT32, Graph, axes
from asr_kd.export.networks import conditioned, linear
from asr_kd.models.factored import FactoredLstm, ProjectedLstm
from asr_kd.models.lstm import LstmModel


@dataclass
class Layer:
    """The matrices of a layer in one direction, multiplied out, gates in the order of ONNX.

    Attributes:
        inputs: float32 [4 × size, inputs].
        recurrent: float32 [4 × size, size].
        bias: float32 [8 × size].
        projection: float32 [size, outputs], None where all that is remembered comes out.
    """

    inputs: np.ndarray
    recurrent: np.ndarray
    bias: np.ndarray
    projection: np.ndarray | None


@torch.no_grad()
def layer_of(layer: nn.Module) -> Layer:
    """The matrices of a layer of an `LstmModel`."""
    weights: list[Tensor]
    projection = None
    if isinstance(layer, FactoredLstm):
        weights = [layer.weight_ih(), layer.weight_hh(), layer.bias_ih, layer.bias_hh]
    else:
        assert isinstance(layer, nn.LSTM)
        weights = [getattr(layer, f"{name}_l0") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        if isinstance(layer, ProjectedLstm):
            project: Any = layer.weight_hr_l0
            weights[1] = weights[1] @ project
            projection = project.T.numpy()
    inputs, recurrent, *biases = (_reordered(weight.detach()).numpy() for weight in weights)
    return Layer(inputs, recurrent, np.concatenate(biases), projection)


def _reordered(weight: Tensor) -> Tensor:
    i, f, g, o = weight.chunk(4)
    return torch.cat([i, o, f, g])


class LstmNodes:
    """The nodes of an `LstmModel`, in parts: its layers and its output."""

    def __init__(self, graph: Graph, model: LstmModel) -> None:
        self._graph, self._model = graph, model
        self._forwards = [layer_of(one) for one in model.forwards]
        self._backwards = [layer_of(one) for one in model.backwards]
        self.size = self._forwards[0].recurrent.shape[1]

    def run(
        self, features: str, lengths: str, states: list[tuple[str, str]] | None
    ) -> tuple[str, list[tuple[str, str]]]:
        """Log-probabilities [batch, frames, units] of features [batch, frames, inputs], and the states behind them.

        Args:
            features: anything beyond an utterance's length.
            lengths: int64 [batch], may be 0.
            states: of each layer h and c, float32 [batch, size]; None: zeros, and none come out.
        """
        graph, model = self._graph, self._model
        # a runtime may refuse a length of 0: then one frame is heard, and its state dropped
        heard = graph.cast(graph("Max", lengths, 1), INT32)
        some = graph.added_axis(graph("Greater", lengths, 0), 1) if states else ""
        hidden, after = graph("Transpose", features, perm=[1, 0, 2]), []
        for number, forwards in enumerate(self._forwards):
            directions = [forwards, *self._backwards[number : number + 1]]
            state = states[number] if states else None
            hidden, ends = self._layer(hidden, heard, directions, state, number)
            if state:
                new = [graph("Squeeze", end, axes(0)) for end in ends]
                h, c = (graph("Where", some, one, old) for one, old in zip(new, state, strict=True))
                after.append((h, c))
            hidden = conditioned(graph, hidden, model, number + 1)
        logits = graph("Transpose", linear(graph, hidden, model.output), perm=[1, 0, 2])
        return graph("LogSoftmax", logits, axis=2), after

    def _layer(
        self, hidden: str, lengths: str, directions: list[Layer], state: tuple[str, str] | None, number: int
    ) -> tuple[str, list[str]]:
        """Of [frames, batch, inputs]: what comes out, and h and c behind the last frame, [directions, batch, size]."""
        graph = self._graph
        weights = [np.stack([getattr(one, name) for one in directions]) for name in ("inputs", "recurrent", "bias")]
        begin = [graph.added_axis(one, 0) for one in state] if state else ["", ""]
        out, *ends = graph.several(
            "LSTM", 3, hidden, *weights, lengths, *begin, name=f"lstm.{number}", hidden_size=self.size,
            direction="bidirectional" if len(directions) > 1 else "forward",
        )  # fmt: skip
        # [frames, directions, batch, size]
        parts = [graph("Gather", out, at, axis=1) for at in range(len(directions))]
        for at, one in enumerate(directions):
            if one.projection is not None:
                parts[at] = graph("MatMul", parts[at], one.projection, name=f"projection.{number}.{at}")
        return (graph("Concat", *parts, axis=2) if len(parts) > 1 else parts[0]), ends
