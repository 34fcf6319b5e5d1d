"""Whole recordings: sound and its length in, log-probabilities out, for a network of any family."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from asr_kd.audio.features import Frontend
from asr_kd.export.frontend import add_energies, add_features
from asr_kd.export.graph import FLOAT, INT64, Graph, axes
from asr_kd.export.lstm import LstmNodes
from asr_kd.export.networks import END, add_network
from asr_kd.models.acoustic import OwnCheckpoint
from asr_kd.models.lstm import LstmModel


def offline_model(checkpoint: OwnCheckpoint, metadata: dict[str, str], version: str) -> onnx.ModelProto:
    """A network for whole recordings.

    Of our own front end: `samples` float32 [N, any], `lengths` int64 [N] → `log_probs` float32 [N, frames, units], `frames` int64 [N].
    What stands behind a recording's length does not matter, nor do the rows behind its frames.

    Of Kaldi's, which sherpa-onnx computes itself (its interface zipformer): `features` float32 [N, hops, mels] and `lengths`, in hops, to the same.
    """
    features, graph = checkpoint.features, Graph()
    front = Frontend(features)
    of_sound, spectrum, stack = features.kind == "own", front.spectrum, features.stack
    period = stack * spectrum.hop if of_sound else stack
    reach = (stack - 1) * spectrum.hop + spectrum.window if of_sound else stack
    if of_sound:
        given = graph.input("samples", FLOAT, ["N", "samples"])
    else:
        given = graph.input("features", FLOAT, ["N", "hops", features.mels])
        metadata = metadata | {"model_type": "zipformer2_ctc"}
    lengths = graph.input("lengths", INT64, ["N"])
    frames = graph("Div", graph("Max", graph("Sub", lengths, reach - period), 0), period)
    most = graph("Max", graph("ReduceMax", frames, keepdims=0), 1)
    needed = graph("Add", graph("Mul", graph("Sub", most, 1), period), reach)
    room = graph("Pad", given, axes(*(0, 0, 0, reach) if of_sound else (0, 0, 0, 0, reach, 0)))
    heard = graph("Slice", room, axes(0), graph.added_axis(needed, 0), axes(1))
    logs = add_energies(graph, spectrum, heard, graph("Mul", most, stack)) if of_sound else heard
    # zeros [N, 1] and [N, mels]
    nothing = graph.cast(graph.added_axis(graph("Mul", lengths, 0), 1), FLOAT)
    mean = graph("Mul", nothing, np.zeros((1, features.mels), np.float32))
    inputs, _ = add_features(graph, front, logs, most, mean, nothing)
    own = graph.added_axis(graph("Less", graph.counted(most), graph.added_axis(frames, 1)), 2)
    inputs = graph("Where", own, inputs, 0.0)
    model = checkpoint.model
    if isinstance(model, LstmModel):
        log_probs = _lstm(graph, model, inputs, frames)
    else:
        log_probs = graph("LogSoftmax", add_network(graph, model, inputs, frames), axis=2)
    graph.output("log_probs", log_probs)
    graph.output("frames", graph("Identity", frames))
    made: dict[str, tuple[int, list[Any]]] = {
        "log_probs": (FLOAT, ["N", "frames", checkpoint.units.size]), "frames": (INT64, ["N"])
    }  # fmt: skip
    return graph.model(made, metadata, version)


def _lstm(graph: Graph, model: LstmModel, features: str, frames: str) -> str:
    """Log-probabilities of an LSTM, whose delay is undone by as many frames of zeros."""
    if model.delay:
        features = graph("Pad", features, axes(0, 0, 0, 0, model.delay, 0))
        # of a recording without a frame nothing is asked
        frames = graph("Add", frames, model.delay)
    log_probs, _ = LstmNodes(graph, model).run(features, frames, None)
    if not model.delay:
        return log_probs
    return graph("Slice", log_probs, axes(model.delay), axes(END), axes(1))
