"""Streaming LSTM students as graphs: sound of any length and a flat state in, log-probabilities and the next state out.

The state holds what an utterance is made of so far: sound that waits for a full frame, the running mean, and the layers' own states. It
begins as zeros. `README.md` beside this file says what a client has to know.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from asr_kd.audio.features import Frontend
from asr_kd.errors import UserError
from asr_kd.export.frontend import add_energies, add_features, longest_hops, mean_head
from asr_kd.export.graph import FLOAT, HALF, INT32, INT64, Graph, axes
from asr_kd.export.lstm import LstmNodes
from asr_kd.export.networks import END
from asr_kd.models.acoustic import OwnCheckpoint
from asr_kd.models.lstm import LstmModel
from asr_kd.units import Units

#: sherpa-onnx's T-one interface: its rate, the milliseconds of a chunk, and the full scale that it multiplies samples by
T_ONE_RATE, T_ONE_MS = 8000, 300
FULL_SCALE = 32768.0
#: log-probability of what cannot be: frames before the first one are blank
NEVER = -100.0
#: a half keeps 11 binary digits; the rest of a number is kept in a second one, this much larger
LOW = 2048.0


@dataclass
class Shape:
    """How sound becomes frames, in samples and numbers of a state.

    Attributes:
        period: samples from one frame to the next.
        reach: samples that a frame's windows span.
        widths: numbers of each part of the state: sound that waits, three counts, the mean, h and c of each layer.
    """

    period: int
    reach: int
    widths: list[int]

    @property
    def state(self) -> int:
        """Numbers of the state."""
        return sum(self.widths)


def shape_of(checkpoint: OwnCheckpoint) -> Shape:
    """The shape of a streaming LSTM; UserError when it is none, naming the interface that can."""
    front, model = Frontend(checkpoint.features), checkpoint.model
    if not isinstance(model, LstmModel) or not model.streams:
        why = "hears whole utterances" if not model.streams else "has no graph that streams yet"
        raise UserError(
            f"interface: a network of kind {checkpoint.settings.kind} {why}; kind lstm leaves as stream or t-one, this one as offline"
        )
    if checkpoint.features.kind == "kaldi":
        raise UserError(
            "interface: this network hears kaldi's features, which stream and t-one do not make of sound; export it as offline"
        )
    size, stack = checkpoint.settings.size, checkpoint.features.stack
    reach = (stack - 1) * front.spectrum.hop + front.spectrum.window
    return Shape(
        stack * front.spectrum.hop,
        reach,
        [reach - 1, 1, 1, 1, checkpoint.features.mels] + [size] * (2 * len(model.forwards)),
    )


@dataclass
class Heard:
    """What the nodes of a stream make of the next sound.

    Attributes:
        log_probs: float32 [batch, answers, units], of each the first `answers`.
        answers: int64 [batch].
        dropped: int64 [batch], how many of these belong to no frame: those of the network's delay.
        state: float32 [batch, numbers].
    """

    log_probs: str
    answers: str
    dropped: str
    state: str


def _add_stream(
    graph: Graph, checkpoint: OwnCheckpoint, shape: Shape, sound: str, state: str, ends: str | None
) -> Heard:
    """Nodes that hear the next sound, float32 [batch, samples].

    Args:
        graph: that they are added to.
        checkpoint: a streaming LSTM.
        shape: its.
        sound: any number of samples.
        state: float32 [batch, numbers].
        ends: int64 [batch], 1 where an utterance ends with it; None: none does.
    """
    front, model = Frontend(checkpoint.features), checkpoint.model
    assert isinstance(model, LstmModel)
    room = shape.reach - 1
    waited, waiting, hops, dropped, mean, *layers = graph.parts(state, shape.widths)
    waiting, dropped = (graph("Squeeze", graph.cast(one, INT64), axes(1)) for one in (waiting, dropped))
    every = graph("Concat", waited, sound, axis=1)
    have = graph("Add", waiting, graph.size(sound, 1))
    # whole frames of each; below 0 the waiting sound is where a hop longer than its window has skipped
    frames = graph("Div", graph("Max", graph("Sub", have, shape.reach - shape.period), 0), shape.period)
    most = graph("Max", graph("ReduceMax", frames, keepdims=0), 1)
    needed = graph("Add", graph("Mul", graph("Sub", most, 1), shape.period), shape.reach)
    starts = graph.added_axis(graph("Sub", room, waiting), 1)
    last = graph("Sub", graph.size(every, 1), 1)
    at = graph("Min", graph("Add", starts, graph.counted(needed)), last)
    aligned = graph("GatherElements", every, at, axis=1)
    logs = add_energies(graph, front.spectrum, aligned, graph("Mul", most, checkpoint.features.stack))
    features, means = add_features(graph, front, logs, most, mean, hops)
    own = graph("Less", graph.counted(most), graph.added_axis(frames, 1))
    features = graph("Where", graph.added_axis(own, 2), features, 0.0)
    answers = frames
    if ends is not None and model.delay:
        # the network answers for the last frames when as many zeros have followed
        features = graph("Pad", features, axes(0, 0, 0, 0, model.delay, 0))
        answers = graph("Add", frames, graph("Mul", ends, model.delay))
    log_probs, after = LstmNodes(graph, model).run(features, answers, list(zip(layers[::2], layers[1::2], strict=True)))
    # what is no number would be bounded within an LSTM, and heard as something
    log_probs = graph("Add", log_probs, graph("ReduceSum", graph("Mul", features, 0.0), axes(2), keepdims=1))
    heard_hops = graph("Mul", frames, checkpoint.features.stack)
    now = graph("GatherND", means, graph.added_axis(heard_hops, 1), batch_dims=1)
    drop = graph("Min", graph("Sub", model.delay, dropped), answers)
    hop_count = graph("Add", hops, graph.added_axis(graph.cast(heard_hops, FLOAT), 1))
    kept = [
        graph("Slice", every, graph.added_axis(graph.size(sound, 1), 0), axes(END), axes(1)),
        _number(graph, graph("Sub", have, graph("Mul", frames, shape.period))),
        graph("Min", hop_count, float(mean_head(checkpoint.features.mean_frames))),
        _number(graph, graph("Add", dropped, drop)),
        now,
        *(one for pair in after for one in pair),
    ]
    return Heard(log_probs, answers, drop, graph("Concat", *kept, axis=1))


def _number(graph: Graph, count: str) -> str:
    """A count int64 [batch] as a part of the state."""
    return graph.added_axis(graph.cast(count, FLOAT), 1)


def blank_row(units: int) -> np.ndarray:
    """Log-probabilities float32 [units] of what is surely blank."""
    row = np.full(units, NEVER, np.float32)
    row[Units.blank] = 0.0
    return row


def stream_model(checkpoint: OwnCheckpoint, metadata: dict[str, str], version: str) -> onnx.ModelProto:
    """Our own interface: `samples` float32 [N, any], `state` float32 [N, S], `end` float32 [N] → `log_probs` float32 [N, frames, units],
    `frames` int32 [N], `next_state` float32 [N, S]. Row k of all that came out is frame k.

    Raises:
        UserError: when the network is not a streaming LSTM.
    """
    shape = shape_of(checkpoint)
    graph = Graph()
    sound = graph.input("samples", FLOAT, ["N", "samples"])
    state = graph.input("state", FLOAT, ["N", shape.state])
    end = graph.input("end", FLOAT, ["N"])
    heard = _add_stream(graph, checkpoint, shape, sound, state, graph.cast(graph("Greater", end, 0.0), INT64))
    frames = graph("Sub", heard.answers, heard.dropped)
    most = graph("ReduceMax", frames, keepdims=0)
    last = graph("Sub", graph.size(heard.log_probs, 1), 1)
    at = graph("Min", graph("Add", graph.added_axis(heard.dropped, 1), graph.counted(most)), last)
    graph.output("log_probs", graph("GatherND", heard.log_probs, graph.added_axis(at, 2), batch_dims=1))
    graph.output("frames", graph.cast(frames, INT32))
    graph.output("next_state", heard.state)
    made: dict[str, tuple[int, list[Any]]] = {
        "log_probs": (FLOAT, ["N", "frames", checkpoint.units.size]), "frames": (INT32, ["N"]), "next_state": (FLOAT, ["N", shape.state])
    }  # fmt: skip
    return graph.model(made, metadata, version)


def t_one_model(checkpoint: OwnCheckpoint, metadata: dict[str, str], version: str) -> onnx.ModelProto:
    """sherpa-onnx's T-one interface: `signal` int32 [N, 2400, 1], `state` float16 [N, S] → `log_probs` float32 [N, rows, units], `next_state`.

    A chunk gives as many rows as frames fit into it; those before the first frame are blank.

    Raises:
        UserError: when the network is not a streaming LSTM of 8 kHz, whose frames fill a chunk.
    """
    shape, features = shape_of(checkpoint), checkpoint.features
    if features.sample_rate != T_ONE_RATE:
        raise UserError(
            f"interface: t-one hears sound of {T_ONE_RATE} Hz, this network {features.sample_rate} Hz; export it as stream"
        )
    if T_ONE_MS % features.frame_ms:
        raise UserError(
            f"interface: t-one hears {T_ONE_MS} ms at once, which frames of {features.frame_ms} ms do not fill; export it as stream"
        )
    samples, rows = T_ONE_RATE * T_ONE_MS // 1000, T_ONE_MS // features.frame_ms
    graph = Graph()
    signal = graph.input("signal", INT32, ["N", samples, 1])
    halves = graph.input("state", HALF, ["N", 2 * shape.state])
    high, low = graph.parts(graph.cast(halves, FLOAT), [shape.state] * 2)
    state = graph("Add", high, graph("Div", low, LOW))
    # the client multiplies by 32767 and cuts off what is behind the point: one more gives a 16-bit sample back, but for 1
    whole = graph("Squeeze", signal, axes(2))
    sound = graph("Div", graph.cast(graph("Add", whole, graph("Sign", whole)), FLOAT), FULL_SCALE)
    heard = _add_stream(graph, checkpoint, shape, sound, state, None)
    # the last window of a chunk ends in the next: the first chunk has fewer frames, and begins with blank rows
    missing = graph("Sub", rows, heard.answers)
    own = graph("Sub", graph.counted(rows), graph.added_axis(missing, 1))
    last = graph("Sub", graph.size(heard.log_probs, 1), 1)
    at = graph("Min", graph("Max", own, 0), last)
    said = graph("GatherND", heard.log_probs, graph.added_axis(at, 2), batch_dims=1)
    answered = graph("GreaterOrEqual", own, graph.added_axis(heard.dropped, 1))
    graph.output("log_probs", graph("Where", graph.added_axis(answered, 2), said, blank_row(checkpoint.units.size)))
    top = graph.cast(graph.cast(heard.state, HALF), FLOAT)
    rest = graph("Mul", graph("Sub", heard.state, top), LOW)
    graph.output("next_state", graph.cast(graph("Concat", top, rest, axis=1), HALF))
    made: dict[str, tuple[int, list[Any]]] = {
        "log_probs": (FLOAT, ["N", rows, checkpoint.units.size]),
        "next_state": (HALF, ["N", 2 * shape.state]),
    }
    needed = {"frame_length_ms": T_ONE_MS, "state_dim": 2 * shape.state, "sample_rate": T_ONE_RATE}
    return graph.model(made, metadata | {name: str(value) for name, value in needed.items()}, version)


def longest_seconds(checkpoint: OwnCheckpoint) -> float:
    """How much sound one call may hold, in seconds; UserError when it is so little that the running mean cannot be computed."""
    features = checkpoint.features
    seconds = longest_hops(features.mean_frames) * features.hop_ms / 1000
    if seconds < 1:
        raise UserError(
            f"checkpoint: features.mean_frames is {features.mean_frames}, too few for a graph; train with the default, 300"
        )
    return seconds


def t_one_timing(checkpoint: OwnCheckpoint, shape: Shape) -> dict[str, int]:
    """What a client of T-one should know: rows before that of the first frame, and how much silence brings out the last word."""
    samples, rows = T_ONE_RATE * T_ONE_MS // 1000, T_ONE_MS // checkpoint.frame_ms
    first = max(0, (samples - shape.reach) // shape.period + 1)
    lag = rows - first + checkpoint.model.delay
    # sherpa-onnx hears a chunk when the one behind it is full
    return {
        "state": 2 * shape.state, "chunk_ms": T_ONE_MS, "rows": rows, "lag_rows": lag, "lag_ms": lag * checkpoint.frame_ms,
        "tail_ms": lag * checkpoint.frame_ms + 2 * T_ONE_MS,
    }  # fmt: skip
