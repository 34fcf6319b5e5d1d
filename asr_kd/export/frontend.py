"""The front end as nodes of a graph: sound → the features of `asr_kd.audio.features`, with the same rounding.

Spectra, energies and the running mean are computed anew from its description; the mean in closed form over all hops that arrive together,

    m_t = P_t (m_0 + Σ_s≤t a_s / P_s x_s)      P_t = Π_s≤t (1 - a_s)      a_s the weight of hop s in the mean behind it

in float64, so that one call can take as many hops as P_t needs to fall to its smallest number (`longest_hops`).
"""

from __future__ import annotations

import math

import numpy as np

from asr_kd.audio.features import LOG_SCALE, Frontend, cumulative
from asr_kd.audio.spectrum import Spectrum
from asr_kd.export.graph import DOUBLE, FLOAT, HALF, Graph, Value, axes

#: name of the node that makes mel energies, which must not be quantised
MEL = "mel"
#: P_t falls to e^-600 at the lowest: its smallest number in float64 is e^-708
FALL = 600.0


def longest_hops(mean_frames: int) -> int:
    """How many hops one call may hold."""
    return int(FALL / -math.log1p(-1 / mean_frames)) if mean_frames > 1 else 0


def add_energies(graph: Graph, spectrum: Spectrum, sound: Value, hops: Value) -> str:
    """Nodes from sound to log mel energies, float32 [batch, hops, mels].

    Args:
        graph: that they are added to.
        spectrum: of our own front end, whose windows begin with the sound, and are not prepared.
        sound: float32 [batch, samples], from the first window on, enough for all hops.
        hops: int64, how many to make of it.
    """
    assert not (spectrum.mirrored or spectrum.centring or spectrum.preemphasis) and spectrum.scale == 1
    starts = graph("Range", 0, graph("Mul", hops, spectrum.hop), spectrum.hop)
    windows = graph("Gather", sound, graph("Add", graph.added_axis(starts, 1), np.arange(spectrum.window)), axis=1)
    tapered = graph.added_axis(graph("Mul", windows, spectrum.taper), 3)
    power = graph("ReduceSumSquare", graph("DFT", tapered, spectrum.fft, axis=2, onesided=1), axes=[3], keepdims=0)
    energy, floor = graph("MatMul", power, spectrum.filters, name=MEL), float(spectrum.floor)
    return graph("Log", graph("Add", energy, floor) if spectrum.floor_added else graph("Max", energy, floor))


def add_features(graph: Graph, front: Frontend, logs: str, frames: Value, mean: Value, hops: Value) -> tuple[str, str]:
    """Nodes from log mel energies to features.

    Args:
        graph: that they are added to.
        front: the front end.
        logs: float32 [batch, frames × stack, mels].
        frames: int64, how many there are, at least one.
        mean: float32 [batch, mels], the running mean before, less the prior's.
        hops: float32 [batch, 1], how many it has heard; from `mean_head` on their number does not matter.

    Returns:
        features float32 [batch, frames, inputs], rounded to float16; and running means, float32 [batch, hops + 1, mels], less the prior's:
        after no hop, after one, and so on.
    """
    settings = front.settings
    less, means = _add_mean(graph, front, logs, graph("Mul", frames, settings.stack), mean, hops)
    features = graph("Div", graph("Sub", logs, less), LOG_SCALE)
    rounded = graph.cast(graph.cast(features, HALF), FLOAT)
    shape = graph("Concat", axes(0), graph.added_axis(frames, 0), axes(settings.dimension), axis=0)
    return graph("Reshape", rounded, shape), means


def mean_head(mean_frames: int) -> int:
    """Hops until the running mean is an exponential one, whose place in the sound does not matter."""
    return cumulative(mean_frames)[1]


def _add_mean(graph: Graph, front: Frontend, logs: str, count: Value, mean: Value, hops: Value) -> tuple[str, str]:
    """The running mean at each hop, float32 [batch, hops, mels], and the same as of `add_features`."""
    mean_frames, double = front.settings.mean_frames, np.float64
    prior, _ = cumulative(mean_frames)
    number = graph("Add", graph.cast(hops, DOUBLE), graph.cast(graph("Add", graph.counted(count), 1), DOUBLE))
    growing = graph("Div", double(1), graph("Add", number, double(prior)))
    weight = graph(
        "Where", graph("LessOrEqual", number, double(mean_head(mean_frames))), growing, double(1 / mean_frames)
    )
    weight = graph.added_axis(weight, 2)  # [batch, hops, 1]
    kept = graph("Exp", graph("CumSum", graph("Log", graph("Sub", double(1), weight)), 1))
    above = graph("Sub", graph.cast(logs, DOUBLE), double(front.prior_mean))
    sums = graph("CumSum", graph("Mul", graph("Div", weight, kept), above), 1)
    before = graph.added_axis(mean, 1)
    now = graph("Mul", kept, graph("Add", graph.cast(before, DOUBLE), sums))
    less = graph.cast(graph("Add", now, double(front.prior_mean)), FLOAT)
    return less, graph("Concat", before, graph.cast(now, FLOAT), axis=1)
