"""Streaming LSTM students on Kaldi's features behind sherpa-onnx's zipformer2 interface: any rate, and as early as a frame is full.

That interface has six states for each layer of a Zipformer, and two more. Their sizes follow from metadata, so that one layer holds ours: h and c of the
LSTM's layers in the keys of attention, the running mean in the first convolution's, the hops that were heard in `processed_lens`. The rest passes through.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from asr_kd.audio.features import Frontend
from asr_kd.errors import UserError
from asr_kd.export.frontend import add_features, mean_head
from asr_kd.export.graph import FLOAT, INT64, Graph, axes
from asr_kd.export.lstm import LstmNodes
from asr_kd.export.streaming import blank_row
from asr_kd.models.acoustic import OwnCheckpoint
from asr_kd.models.lstm import LstmModel

#: shape of the state of a Zipformer's first convolutions, which sherpa-onnx knows by heart
EMBED = [128, 3, 19]


def zipformer2_model(checkpoint: OwnCheckpoint, metadata: dict[str, str], version: str) -> onnx.ModelProto:
    """`x` float32 [N, stack, mels] and the states, all zeros at the start → `log_probs` float32 [N, 1, units] and the states behind them.

    Raises:
        UserError: when the network is not a streaming LSTM on Kaldi's features.
    """
    features, model, units = checkpoint.features, checkpoint.model, checkpoint.units.size
    if not isinstance(model, LstmModel) or not model.streams:
        raise UserError(
            f"interface: a network of kind {checkpoint.settings.kind} does not leave as zipformer2, kind lstm does; export this one as offline"
        )
    if features.kind != "kaldi":
        raise UserError(
            "interface: zipformer2 gives a network kaldi's features, this one hears our own; export it as stream"
        )
    if features.mels % 4:
        raise UserError(
            f"interface: zipformer2 holds a multiple of 4 mel filters, not {features.mels}; export it as offline"
        )
    stack, mels, layers, size = features.stack, features.mels, len(model.forwards), checkpoint.settings.size
    shapes: dict[str, list[Any]] = {
        "key": [2 * layers, "N", size], "nonlin_attn": [1, "N", 2 * layers, 3 * mels // 4], "val1": [2 * layers, "N", 1],
        "val2": [2 * layers, "N", 1], "conv1": ["N", mels, 1], "conv2": ["N", mels, 1], "embed": ["N", *EMBED],
    }  # fmt: skip
    graph = Graph()
    logs = graph.input("x", FLOAT, ["N", stack, mels])
    states = {name: graph.input(f"cached_{name}", FLOAT, shape) for name, shape in shapes.items()}
    heard = graph.input("processed_lens", INT64, ["N"])
    mean = graph("Squeeze", states["conv1"], axes(2))
    hops = graph.added_axis(graph.cast(graph("Min", heard, mean_head(features.mean_frames)), FLOAT), 1)
    inputs, means = add_features(graph, Frontend(features), logs, graph.constant(1), mean, hops)
    pairs = [
        (graph("Gather", states["key"], 2 * at, axis=0), graph("Gather", states["key"], 2 * at + 1, axis=0))
        for at in range(layers)
    ]
    one = graph("Add", graph("Mul", heard, 0), 1)
    log_probs, after = LstmNodes(graph, model).run(inputs, one, pairs)
    answered = graph("GreaterOrEqual", graph("Div", heard, stack), model.delay)
    graph.output("log_probs", graph("Where", graph("Unsqueeze", answered, axes(1, 2)), log_probs, blank_row(units)))
    kept = graph("Concat", *(graph.added_axis(part, 0) for pair in after for part in pair), axis=0)
    now = graph("Transpose", graph("Slice", means, axes(stack), axes(stack + 1), axes(1)), perm=[0, 2, 1])
    behind = {**states, "key": kept, "conv1": now}
    for name, tensor in behind.items():
        graph.output(f"new_cached_{name}", tensor)
    graph.output("new_processed_lens", graph("Add", heard, stack))
    made: dict[str, tuple[int, list[Any]]] = {"log_probs": (FLOAT, ["N", 1, units])}
    made |= {f"new_cached_{name}": (FLOAT, shape) for name, shape in shapes.items()}
    made["new_processed_lens"] = (INT64, ["N"])
    needed = {
        "model_type": "zipformer2", "encoder_dims": mels, "query_head_dims": size, "value_head_dims": 1, "num_heads": 1,
        "num_encoder_layers": 1, "cnn_module_kernels": 2, "left_context_len": 2 * layers, "T": stack, "decode_chunk_len": stack,
    }  # fmt: skip
    return graph.model(made, metadata | {name: str(value) for name, value in needed.items()}, version)


def zipformer2_timing(checkpoint: OwnCheckpoint) -> dict[str, Any]:
    """What a client should know: rows before that of the first frame, and how much silence brings out the last word."""
    lag = checkpoint.model.delay
    # sherpa-onnx hears a frame when a hop more than it is there
    return {
        "hears": "features",
        "lag_rows": lag,
        "lag_ms": lag * checkpoint.frame_ms,
        "tail_ms": (lag + 2) * checkpoint.frame_ms,
    }


class Zipformer2:
    """A recording heard in onnxruntime as sherpa-onnx does it."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._state = {
            one.name: np.zeros([size if isinstance(size, int) else 1 for size in one.shape], np.int64 if "int64" in one.type else np.float32)
            for one in session.get_inputs()[1:]
        }  # fmt: skip

    def push(self, logs: np.ndarray) -> np.ndarray:
        """Of the next log mel energies float32 [stack, mels], the log-probabilities float32 [1, units]."""
        rows, *state = self._session.run(None, {"x": logs[None], **self._state})
        self._state = dict(zip(self._state, state, strict=True))
        return np.asarray(rows[0])
